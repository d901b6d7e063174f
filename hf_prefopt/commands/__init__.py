"""The command line: `hf_prefopt COMMAND …`, or `python -m hf_prefopt COMMAND …`.

A command is a module of this package with an entry in `COMMANDS`. The module's docstring is the help text,
`add_options(parser)` adds the options, and `run(options)` runs the command and returns the exit code. An error is
printed as one line, and the exit code is 1.
"""

import io
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType

from hf_prefopt.commands import chat, compare, env, inspect, losses, merge, report, train
from hf_prefopt.commands.faults import reported
from hf_prefopt.commands.parser import parser_of
from hf_prefopt.version import __version__

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "inspect": inspect,
    "report": report,
    "compare": compare,
    "chat": chat,
    "merge": merge,
    "losses": losses,
    "env": env,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command given by `arguments` (default: the arguments of the process), and return the exit code."""
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
    parser = parser_of(COMMANDS[name], f"hf_prefopt {name}")
    options = parser.parse_args(words)
    options.command_line = ["hf_prefopt", name, *words]
    return reported(lambda: COMMANDS[name].run(options), options.traceback, parser.option_names())


def overview() -> str:
    """Return the help of the command line, with one line per command."""
    lines = [f"  {name:<10} {(command.__doc__ or '').partition(chr(10))[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf_prefopt COMMAND ...\n",
            "Preference optimization of Hugging Face models.\n",
            *lines,
            "\nhf_prefopt COMMAND --help says more; --version prints the version.",
        ]
    )
