"""The settings of a command line of `hf_prefopt train`."""

from typing import Any

from hf_prefopt.commands import train
from hf_prefopt.commands.parser import parser_of
from hf_prefopt.recipe.settings import Recipe, read_recipe


def read(*options: str, script: dict[str, Any] | None = None) -> Recipe:
    """Return the run of a command line, with the settings of a script as defaults, if there are any."""
    parsed = parser_of(train, "hf_prefopt train").parse_args(options)
    parsed.command_line, parsed.script = ["hf_prefopt", "train", *options], script or {}
    return read_recipe(parsed)
