"""Generate docstrings, `--help` and docs/settings.md from the help texts of the settings."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from textwrap import fill
from typing import Any

_WIDTH = 120
# For each documented configuration, the headings of its groups, keyed by the first field of each group.
_GROUPS: dict[type, Mapping[str, str]] = {}


def documented(groups: Mapping[str, str]) -> Callable[[type], type]:
    """Return a class decorator that inserts the list of settings into a configuration's docstring, before `Raises:`.

    Args:
        groups: the headings of the groups, keyed by the first field of each group.
    """

    def decorate(config: type) -> type:
        _GROUPS[config] = groups
        summary, _, raises = (config.__doc__ or "").partition("    Raises:")
        lines: list[str] = []
        for group, found in settings_by_group(config).items():
            lines += [f"    {group}:", *map(_entry, found), ""]
        config.__doc__ = summary + "\n".join(lines) + "\n    Raises:" + raises
        return config

    return decorate


def settings_by_group(config: type) -> dict[str, list[Field]]:
    """Return the settings that a configuration itself defines, in order, keyed by the heading of their group."""
    by_name, groups = {field.name: field for field in fields(config)}, _GROUPS[config]
    found: dict[str, list[Field]] = {}
    for name in filter(by_name.get, config.__annotations__):
        if name in groups:
            group = found[groups[name]] = []
        group.append(by_name[name])
    return found


def default_of(setting: Field) -> Any:
    """Return the default value of a field."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def settings_page(config: type) -> str:
    """Return a Markdown page of the settings, with a table for each group."""
    summary = f"`{config.__name__}` has all fields of `transformers.TrainingArguments`, and the fields on this page."
    sections = [f"# Settings\n\n{summary}"]
    for group, found in settings_by_group(config).items():
        rows = [f"| `{s.name}` | `{default_of(s)!r}` | {s.metadata['help']} |" for s in found]
        sections.append("\n".join([f"## {group}", "", "| field | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(sections) + "\n"


def _entry(setting: Field) -> str:
    text = f"{setting.name}: {setting.metadata['help']} Default: {default_of(setting)!r}."
    return fill(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)
