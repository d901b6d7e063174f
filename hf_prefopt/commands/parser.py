"""The argument parser of a command. Its error messages are one line, and suggest the option that was probably meant."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast, get_args, get_type_hints

from transformers import HfArgumentParser

from hf_prefopt.config_docs import default_of
from hf_prefopt.config_names import as_option, hint_for, nearest_setting


class CommandParser(HfArgumentParser):
    """An argparse parser with one-line error messages, options for dataclass fields, and a short and a full help."""

    def __init__(self, prog: str, **settings: Any):
        super().__init__(prog=prog, **{"formatter_class": _Help, "allow_abbrev": False, **settings})
        self.short_help: str | None = None

    def format_help(self) -> str:
        """Return the short help if there is one. `--help-all` prints the full help."""
        return self.short_help or super().format_help()

    def parse_args(self, words: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse arguments like argparse. The error for an unknown option suggests the most similar option.

        Options may be written with hyphens or with underscores.
        """
        given = sys.argv[1:] if words is None else words
        options, unknown = self.parse_known_args([self._as_known(word) for word in given], namespace)
        if unknown:
            self.error(self._unknown(*unknown[:2]))
        return options

    def error(self, message: str) -> NoReturn:
        """Print the error as one line, without the usage, and exit with code 2."""
        required = re.fullmatch("the following arguments are required: (.*)", message)
        self.exit(2, f"error: {self._missing(required[1]) if required else _plain(message)}\n")

    def _missing(self, names: str) -> str:
        """Return a message that names the missing arguments, and shows the first example from the command's help."""
        names = re.sub(r"/--[\w-]+", "", names)  # remove other spellings of an option
        example = re.search(rf"^ *({re.escape(self.prog)} .+)$", self.description or "", re.MULTILINE)
        return f"{names} {'are' if ',' in names else 'is'} missing" + (f"; example: {example[1]}" if example else "")

    def _as_known(self, word: str) -> str:
        """Replace hyphens in the name of an option by underscores if the parser knows only that spelling."""
        option, is_pair, value = word.partition("=")
        plain = "--" + option.removeprefix("--").replace("-", "_")
        is_other = option.startswith("--") and option not in self._option_string_actions
        return plain + is_pair + value if is_other and plain in self._option_string_actions else word

    def _unknown(self, word: str, following: str = "-") -> str:
        option, _, value = word.partition("=")
        value = value or ("..." if following.startswith("--") or following == "-" else following)
        known = {name.lstrip("-").replace("-", "_"): name for name in reversed(self._option_string_actions)}
        if not option.startswith("-"):
            meant = next(
                (name for name, ending in _FILES.items() if name in known.values() and ending.search(word)), ""
            )
            return f"unexpected argument {word}" + (f": did you mean {meant} {word}?" if meant else "")
        plain = option.lstrip("-").replace("-", "_")
        hint = hint_for(plain, as_option, value) if "loss_type" in known else ""
        near = nearest_setting(plain, known)
        return f"unknown argument {option}" + (hint or (f": did you mean {known[near]}?" if near else ""))

    def add_full_help(self) -> None:
        """Add the option `--help-all`, which prints the full help."""
        self.add_argument("--help-all", "--help_all", action=_FullHelp, nargs=0, help="show every option")

    def add_settings(self, heading: str, dataclass: type, without: Collection[str] = ()) -> None:
        """Add an option for each field of a dataclass, except the fields in `without`.

        The parsed options contain only values from the command line, no defaults.
        """
        group, hints = self.add_argument_group(heading), get_type_hints(dataclass)
        for field in fields(dataclass):
            if field.init and field.name not in without:
                field.type = hints[field.name]
                before = len(self._actions)
                self._parse_dataclass_field(cast(argparse.ArgumentParser, group), field)  # only adds arguments
                for option in self._actions[before:]:
                    _finish(option, field, type(None) in get_args(hints[field.name]))
                    if field.name in getattr(dataclass, "_VALID_DICT_FIELDS", ()):
                        option.type = _mapping_for(field.name)

    def option_names(self) -> set[str]:
        """Return the names of all options, without their hyphens."""
        return {option.dest for option in self._actions if option.option_strings}

    def settings(self) -> dict[str, argparse.Action]:
        """Return the options that are settings of a run, keyed by the name of the setting."""
        return {option.dest: option for option in reversed(self._actions) if option.default == argparse.SUPPRESS}


class _FullHelp(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser.short_help = None
        parser.print_help()
        parser.exit()


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def parser_of(command: ModuleType, prog: str) -> CommandParser:
    """Build the parser of a command module; see `hf_prefopt.commands`."""
    parser = CommandParser(prog, description=command.__doc__)
    command.add_options(parser)
    parser.add_argument("--traceback", action="store_true", help="print the Python traceback of an error")
    return parser


# If an unexpected positional argument has one of these file endings, the error suggests the option.
_FILES = {
    "--config": re.compile(r"\.ya?ml$"),
    "--dataset_name": re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow)(\.\w+)?$"),
    "--losses_from": re.compile(r"\.py$"),
}


# The names that other libraries use for dtypes, mapped to the names in torch.
_SHORT_NAMES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
_NO_LOSS = "name at least one loss, such as --loss_type dpo; `hf_prefopt losses` lists them"


def _plain(message: str) -> str:
    """Shorten an error message of argparse. For an invalid choice, suggest similar choices."""
    message = re.sub(r"^argument (-[\w-]+)(/--?[\w-]+)*:", r"argument \1:", message)
    message = re.sub(r"Truthy value expected: got (.*) but expected one of .*", r"'\1' is not true or false", message)
    message = re.sub(r"(argument --loss_type: )expected at least one argument", rf"\1{_NO_LOSS}", message)
    message = re.sub(r"expected (one|at least one) argument$", "the value is missing", message)
    message = re.sub(r"^the following arguments are required: (.*)$", r"\1 is missing: see --help", message)
    message = re.sub(r"invalid int value: (.*)$", r"\1 is not a whole number", message)
    message = re.sub(r"invalid float value: (.*)$", r"\1 is not a number", message)
    message = re.sub(r"invalid \w+ value: (.*)$", r"\1 is not a valid value", message)
    if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$", message):
        given, choices = found[1], [choice.strip("'") for choice in found[2].split(", ")]
        near = [name for name in (_SHORT_NAMES.get(given), *get_close_matches(given, choices, 3)) if name in choices]
        offered = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(choices)}"
        message = message[: found.start()] + f"{given} is not a choice; {offered}"
    return message


def _finish(option: argparse.Action, field: Field, may_be_none: bool) -> None:
    """Add the default to the help text of an option. If `may_be_none`, a number option also accepts the word `none`."""
    if may_be_none and option.type in (int, float):
        option.type = _or_none(option.type)
    option.metavar = option.metavar or ("VALUE" if option.nargs != 0 else None)
    default = default_of(field)
    option.help = (option.help or "") + ("" if default is None else f" (default: {default})".replace("%", "%%"))
    option.default = argparse.SUPPRESS


# Examples of what to type for settings that are dicts.
_EXAMPLES = {
    "column_mapping": """'{"prompt": "asked"}' (standard name: your column)""",
    "loss_params": """'{"gamma": 1.0}'""",
    "model_init_kwargs": """'{"trust_remote_code": true}'""",
}


def json_object(text: str, setting: str) -> dict[str, Any]:
    """Parse the value of a setting that is a dict. Raises `ArgumentTypeError` if the text is not a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        example = _EXAMPLES.get(setting, """'{"name": "value"}'""")
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object: write one in single quotes, such as {example}")
    return found


def _mapping_for(setting: str) -> Callable[[str], Any]:
    """Return a function that parses a setting that is a dict, given as a JSON object or as the path of a file."""

    def _mapping(text: str) -> Any:
        if Path(text).is_file():
            return _checked_json(text)
        if text.endswith((".json", ".yaml", ".yml")):
            raise argparse.ArgumentTypeError(f"there is no file {text}")
        return json_object(text, setting)

    return _mapping


def _checked_json(file: str) -> str:
    """Return the path of a file. If it is a .json file with invalid JSON, raise `ArgumentTypeError` with the place."""
    try:
        if file.endswith(".json"):
            json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"{file}, line {error.lineno}, column {error.colno}"
        raise argparse.ArgumentTypeError(f"{where}: invalid JSON: {error.msg[0].lower()}{error.msg[1:]}") from None
    return file


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a function that parses like `read`, but returns `None` for the word `none`."""

    @wraps(read, updated=())
    def reading(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    return reading
