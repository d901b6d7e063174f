"""YAML files of settings. The line of each key is recorded, so errors name the file and the line."""

from argparse import Action, ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_prefopt.config_names import as_yaml, hint_for, nearest_setting
from hf_prefopt.recipe.shipped import find_config

# Keys that are not settings: the base file, and environment variables (as in TRL).
BASE, ENVIRONMENT = "base", "env"
COMMAND_LINE = "the command line"
# The key that merges another mapping into a mapping in YAML. The merged keys have no line of their own.
_MERGED = "<<"


@dataclass(frozen=True)
class Layer:
    """The settings from one origin: a file, a script or the command line.

    Attributes:
        where: Name of the origin in messages.
        settings: Settings, keyed by name.
        environment: Environment variables that a file sets.
    """

    where: str
    settings: Mapping[str, Any]
    environment: Mapping[str, str]


def read_layers(given: list[str], options: Mapping[str, Action]) -> list[Layer]:
    """Read the files given by `--config`, in their order, as one layer per file.

    The key `base` of the first file names a file that is read before it. The key `base` of later files is ignored,
    because the files before them replace the base.

    Args:
        options: Options of the command line, keyed by the name of the setting. The type of an option determines
            how its value in a file is parsed.

    Raises:
        ValueError: If a file is missing or is not a mapping, or has an unknown key, a duplicate key or a value of the
            wrong type.
    """
    files = [find_config(name) for name in given]
    while files and (base := _values(files[0]).get(BASE)):
        files.insert(0, _base(files[0], base, files))
    return [_layer(file, options) for file in files]


def _base(file: Path, base: Any, above: list[Path]) -> Path:
    path = file.parent / str(base)
    if not path.is_file():
        where = f"{file}, line {_lines(file)[BASE]}"
        raise ValueError(f"{where}: base: there is no file {base} in {file.parent.resolve()}: correct the path")
    resolved = [other.resolve() for other in above]
    if path.resolve() in resolved:
        chain = [*reversed(above[: resolved.index(path.resolve()) + 1]), path]
        raise ValueError(
            f"{file}, line {_lines(file)[BASE]}: base: {base} includes {'itself' if len(chain) == 2 else 'this file'} "
            f"({' -> '.join(map(str, chain))}): remove this line"
        )
    return path


def _layer(file: Path, options: Mapping[str, Action]) -> Layer:
    values, lines = _values(file), _lines(file)
    values.pop(BASE, None)
    environment = values.pop(ENVIRONMENT, None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{file}, line {lines[ENVIRONMENT]}: env must be a mapping of names to values")
    settings = {}
    for name in values:
        if not isinstance(name, str):
            raise ValueError(
                f"{file}: {name!r} is not the name of a setting (YAML reads an unquoted yes or no as a truth)"
            )
    for name, value in values.items():
        where = f"{file}, line {lines.get(name, lines.get(_MERGED))}"
        if name not in options:
            nested = "; settings are not nested: write them at the left margin" if isinstance(value, dict) else ""
            raise ValueError(f"{where}: {unknown_setting(str(name), options, nested, str(value))}")
        try:
            settings[name] = _read(options[name], value)
        except (ValueError, TypeError, ArgumentTypeError) as error:
            raise ValueError(f"{where}: {_wanted(options[name], value, error)}") from None
    return Layer(str(file), settings, {name: str(value) for name, value in environment.items()})


def unknown_setting(name: str, options: Mapping[str, Action], reason: str = "", value: str = "...") -> str:
    """Return the message for a name that is not a setting.

    Args:
        options: See `read_layers`.
        reason: Why the name is not a setting, if this is known. It replaces the suggestion of a similar name.
        value: The value that was given.
    """
    plain = name.replace("-", "_")
    near = plain if plain in options else nearest_setting(plain, options)
    hint = f"; did you mean {near}?" if near else "; `hf_prefopt train --help-all` names all"
    return f"there is no setting {name}{hint_for(name, as_yaml, value) or reason or hint}"


def _values(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{file}{_fault(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: invalid YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        kind = _TYPES.get(type(found), "single value")
        raise ValueError(f"{file}: expected lines such as learning_rate: 1e-4, but the file is a {kind}")
    return found


_TYPES: dict[type, str] = {list: "list", str: "text"}


def _fault(error: yaml.MarkedYAMLError) -> str:
    """Return a text that says where and why a file is invalid YAML. Name the start of an unclosed bracket or quote."""
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = error.problem or error.context or "unknown fault"
    problem = problem.replace("that cannot start any token", "where a value begins: put the value in quotes")
    if "'\\t'" in problem:
        return f"{where}: YAML does not allow a tab here: use spaces"
    if start and (error.context or "").startswith(("while parsing a flow", "while scanning a quoted")):
        opened = (start.buffer or "")[start.pointer : start.pointer + 1] or "part that begins"
        return f", line {start.line + 1}, column {start.column + 1}: the {opened} here is not closed ({problem}{where})"
    return f"{where}: invalid YAML: {problem}"


def _lines(file: Path) -> dict[str, int]:
    """Return the line of each key. Raises `ValueError` if a key occurs twice, because YAML would use the last one."""
    lines: dict[str, int] = {}
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for key, _ in node.value if node else ():
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"{file}, line {line}: {key.value} is in line {lines[key.value]} already: leave one out")
        lines[key.value] = line
    return lines


def _read(option: Action, value: Any) -> Any:
    """Parse a value from a YAML file in the same way as a value from the command line."""
    if value is None or isinstance(value, dict):
        return _checked(option, value)
    if isinstance(value, list):
        if option.nargs != "+" and not isinstance(option.default, list) and option.dest not in _ALSO_LISTS:
            raise TypeError
        return [item if isinstance(item, dict) else _scalar(option, item) for item in value]
    scalar = _scalar(option, value)
    return [scalar] if option.nargs == "+" else scalar


# Options that take one text on the command line, but may be lists in a file.
_ALSO_LISTS = ("report_to", "debug", "fsdp")


def _checked(option: Action, value: Any) -> Any:
    kind = getattr(option.type, "__name__", "")
    if isinstance(value, dict) and (kind not in ("str", "_mapping") or (kind == "str" and option.nargs == "+")):
        raise TypeError
    return value


def _scalar(option: Action, value: Any) -> Any:
    if isinstance(value, bool) and not _is_switch(option):
        raise TypeError
    read = option.type(str(value)) if callable(option.type) else value
    if option.choices is not None and read not in option.choices:
        raise ValueError
    return read


def _is_switch(option: Action) -> bool:
    return getattr(option.type, "__name__", "") == "string_to_bool"


def _wanted(option: Action, value: Any, error: Exception) -> str:
    if isinstance(value, bool) and not _is_switch(option):
        words, quoted = ("yes, on or true", "yes") if value else ("no, off or false", "no")
        return f'YAML reads an unquoted {words} as {value}: write {option.dest}: "{quoted}" in quotes, or another value'
    given = f"{option.dest}: {value!r}"
    if option.choices is not None:
        return f"{given} is not one of {', '.join(map(str, option.choices))}"
    if isinstance(error, TypeError):
        wanted = "a value or a list of values" if option.nargs == "+" else "one value"
        return f"{given} must be {wanted}, and not a {type(value).__name__}"
    if isinstance(error, ArgumentTypeError):
        return f"{option.dest}: {error}"
    kind = _KINDS.get(getattr(option.type, "__name__", ""))
    return f"{given} is not {kind}" if kind else f"{given}: {error}"


_KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
