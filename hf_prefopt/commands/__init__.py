"""The command line: `hf_prefopt COMMAND …`, or `python -m hf_prefopt COMMAND …`.

A command is a module of this package with an entry in `COMMANDS`: its docstring is its help, `add_options(parser)` adds
its options, `run(options)` does the work and returns the exit code. A `ValueError` becomes one line, and exit code 1.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType

from hf_prefopt.commands import chat, inspect, merge

COMMANDS: dict[str, ModuleType] = {"inspect": inspect, "merge": merge, "chat": chat}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, by default those of the process. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it lacks
    parser, parsers = _parsers()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(unknown[0], parsers[options.command])
    try:
        return COMMANDS[options.command].run(options)
    except ValueError as error:
        if options.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and that of each command."""
    parser = argparse.ArgumentParser("hf_prefopt", description="Preference optimization of Hugging Face models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for name, command in COMMANDS.items():
        purpose, _, more = (command.__doc__ or "").partition("\n")
        parsers[name] = commands.add_parser(
            name,
            help=purpose,
            description=purpose + "\n" + more,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
            allow_abbrev=False,
        )
        command.add_options(parsers[name])
        parsers[name].add_argument(
            "--traceback", action="store_true", help="show where in the code an error comes from"
        )
    return parser, parsers


def _refuse(argument: str, parser: argparse.ArgumentParser) -> None:
    """End the process: an argument is unknown; the option that it resembles is named."""
    option = argument.split("=")[0]
    near = get_close_matches(option.replace("-", "_"), [known.replace("-", "_") for known in _options(parser)], 1)
    known = next((known for known in _options(parser) if near and known.replace("-", "_") == near[0]), None)
    parser.error(f"unknown argument {option}" + (f": did you mean {known}?" if known else ""))


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return list(parser._option_string_actions)
