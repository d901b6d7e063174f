"""Everything public has documentation: a docstring with its parameters, and an entry in docs/api.md."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import hf_prefopt
from hf_prefopt import get_loss, list_losses, losses

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
# Modules whose public names are all on the page, and those whose functions have a page of their own or are looked up.
ON_THE_PAGE = ("hf_prefopt", "hf_prefopt.callbacks", "hf_prefopt.console", "hf_prefopt.serving", "hf_prefopt.trl")
OTHER = ("hf_prefopt.losses", "hf_prefopt.testing")
NAMED = re.findall(r"^::: (hf_prefopt\.\S+)$", API, re.MULTILINE)
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]


def public(module_name: str) -> list[str]:
    """Return the names in `__all__` or, without it, the names that the module itself defines."""
    module = importlib.import_module(module_name)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module_name)
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def resolved(dotted: str) -> Any:
    """The module, class, function or attribute of that name."""
    module, _, name = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        return getattr(resolved(module), name)


def imported_by_the_pages() -> set[str]:
    """Each name of the package that a page imports, or writes with its dots."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for module, names in re.findall(r"from (hf_prefopt[\w.]*) import ([\w, ]+)", text):
            found |= {f"{module}.{name.strip()}" for name in names.split(",")}
        found |= set(re.findall(r"(?<![\w/])hf_prefopt(?:\.\w+)+(?![\w/])", text))
    return found - {"hf_prefopt.egg"}


@pytest.mark.parametrize("module_name", [*ON_THE_PAGE, *OTHER])
def test_public_names_have_docstrings(module_name):
    values = {name: getattr(importlib.import_module(module_name), name) for name in public(module_name)}
    assert values and [name for name, value in values.items() if callable(value) and not value.__doc__] == []


@pytest.mark.parametrize("module_name", ON_THE_PAGE)
def test_the_page_names_what_can_be_imported(module_name):
    assert [name for name in public(module_name) if f"{module_name}.{name}" not in NAMED] == []


def test_names_on_other_pages_exist_and_are_on_this_one():
    """A name that is no module; the functions of the losses are on their own page."""
    names = {name: resolved(name) for name in imported_by_the_pages()}
    told = {name for name, value in names.items() if not inspect.ismodule(value) and not name.endswith("_loss")}
    assert told - set(NAMED) == set()


def parameters_without_description(value: Any) -> list[str]:
    """Parameters that the sections `Args:` and `Attributes:` of a docstring leave out."""
    told = set(re.findall(r"^    \*{0,2}(\w+): ", inspect.getdoc(value) or "", re.MULTILINE))
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.name not in told]
    return [name for name in inspect.signature(value).parameters if name not in told]


@pytest.mark.parametrize("name", [name for name in NAMED if not name.endswith(("Config", "Trainer"))])
def test_docstrings_describe_every_parameter(name):
    """Configurations have generated docstrings, and trainers pass most arguments on."""
    assert parameters_without_description(resolved(name)) == []


def test_the_trainers_own_arguments_are_described():
    assert parameters_without_description(hf_prefopt.PreferenceTrainer) == []


def with_those_it_names(loss: str, seen: frozenset[str] = frozenset()) -> str:
    """The docstring of a loss, and of the losses to which it refers: "as `dpo_loss`"."""
    text, seen = inspect.getdoc(getattr(losses, loss)) or "", seen | {loss}
    return text + "".join(with_those_it_names(name, seen) for name in set(re.findall(r"`(\w+_loss)`", text)) - seen)


@pytest.mark.parametrize("name", [name for name in list_losses() if "hf_prefopt" in get_loss(name).function.__module__])
def test_every_hyperparameter_of_a_loss_is_described(name):
    spec = get_loss(name)
    text = with_those_it_names(spec.function.__name__)
    assert "Raises:" in text and [p for p in spec.defaults if not re.search(rf"\b{p}\b", text)] == []


@pytest.mark.parametrize(
    ("docstring", "missing"), [("A loss.", ["beta"]), ("A loss.\n\n    Args:\n        beta: β.", [])]
)
def test_an_undescribed_parameter_is_found(docstring, missing):
    def loss(beta): ...

    loss.__doc__ = docstring
    assert parameters_without_description(loss) == missing
