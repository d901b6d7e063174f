"""The command line: `hf_prefopt COMMAND …`, or `python -m hf_prefopt COMMAND …`.

Each command is a module of this package, listed in `COMMANDS`. The module's docstring is the help text,
`add_options(parser)` adds the options, and `run(options)` runs the command and returns the exit code. An error is
printed as one line, and the exit code is 1. Only the module of the chosen command is imported, because the libraries
that most commands need take seconds to import.
"""

import ast
import io
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module

from hf_prefopt.recipe.help import HELP
from hf_prefopt.recipe.shipped import listing
from hf_prefopt.version import __version__

COMMANDS = ("train", "inspect", "report", "compare", "chat", "merge", "losses", "env")
# Command lines that are answered by printing a text, without importing the module of the command.
ANSWERS: Mapping[tuple[str, ...], Callable[[], str]] = {
    ("train", "--help"): HELP.rstrip,
    ("train", "-h"): HELP.rstrip,
    ("train", "--list"): listing,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command given by `arguments` (default: the arguments of the process), and return the exit code."""
    try:
        code = _answered(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _answered(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print "?" for characters that the terminal cannot encode
    name, *words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"hf_prefopt {__version__}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: there is no command {name}: {hint}", file=sys.stderr)
        return 2
    if answer := ANSWERS.get((name, *words)):
        print(answer())
        return 0
    return _run(name, words)


def _run(name: str, words: list[str]) -> int:
    """Import a command, parse its arguments and run it."""
    from hf_prefopt.commands.faults import reported
    from hf_prefopt.commands.parser import parser_of

    command = import_module(f"{__name__}.{name}")
    parser = parser_of(command, f"hf_prefopt {name}")
    options = parser.parse_args(words)
    options.command_line = ["hf_prefopt", name, *words]
    return reported(lambda: command.run(options), options.traceback, parser.option_names())


def overview() -> str:
    """Return the help of the command line, with one line per command."""
    lines = [f"  {name:<10} {summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: hf_prefopt COMMAND ...\n",
            "Preference optimization of Hugging Face models.\n",
            *lines,
            "\nhf_prefopt COMMAND --help prints the options of a command; --version prints the version.",
        ]
    )


def summary(name: str) -> str:
    """Return the first line of a command's docstring, read from its source without importing it."""
    source = pkgutil.get_data(__name__, f"{name}.py") or b""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
