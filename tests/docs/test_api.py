"""Everything public has documentation, and docs/api.md lists it."""

import importlib
from pathlib import Path

import pytest

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
MODULES = (
    "hf_prefopt",
    "hf_prefopt.callbacks",
    "hf_prefopt.console",
    "hf_prefopt.losses",
    "hf_prefopt.testing",
    "hf_prefopt.trl",
)


def public(module_name: str) -> list[str]:
    """Return the names in `__all__` or, without it, the names that the module itself defines."""
    module = importlib.import_module(module_name)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module_name)
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_have_docstrings(module_name):
    values = {name: getattr(importlib.import_module(module_name), name) for name in public(module_name)}
    assert values and [name for name, value in values.items() if callable(value) and not value.__doc__] == []


def test_the_page_names_what_can_be_imported():
    for module in ("hf_prefopt", "hf_prefopt.trl", "hf_prefopt.console"):
        assert [name for name in public(module) if f"::: {module}.{name}\n" not in API + "\n"] == []
