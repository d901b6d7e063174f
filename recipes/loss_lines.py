"""The lines of a YAML file that belong to its loss: another loss on the command line does not take them over."""

from argparse import ArgumentParser
from typing import Any

from hf_prefopt import get_loss

OF_A_LOSS = ("beta", "label_smoothing", "loss_params", "loss_weights")


def without_other_loss(settings: dict[str, Any], command_line: list[str]) -> dict[str, Any]:
    """The settings of a YAML file, without its loss's own where the command line names another; a line says so."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--loss_type", nargs="+")
    asked = parser.parse_known_args(command_line)[0].loss_type
    written = settings.get("loss_type")
    written = [written] if isinstance(written, str) else written
    dropped = [name for name in OF_A_LOSS if name in settings]
    if not asked or not written or not dropped or list(map(_own_name, asked)) == list(map(_own_name, written)):
        return settings
    print(
        f"{', '.join(dropped)} in the YAML file: of {' + '.join(written)}, not used for {' + '.join(asked)}, which has "
        "its own defaults",
        flush=True,
    )
    return {name: value for name, value in settings.items() if name not in dropped}


def _own_name(loss: str) -> str:
    """The name that an alias stands for; losses of a user's own are registered later."""
    try:
        return get_loss(loss).name
    except ValueError:
        return loss
