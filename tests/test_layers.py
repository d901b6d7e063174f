"""Imports have one direction: a module imports from its own layer or from an earlier one, without cycles.

docs/design.md shows the same table.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_prefopt"
# The order in which they may be imported. A name is a module or a package of hf_prefopt.
LAYERS = (
    ("version", "noise", "folders", "kinds"),
    ("batch",),
    ("losses",),
    ("objective",),
    ("testing",),
    ("config_checks", "config_docs", "config_names", "config_trainer", "config"),
    ("data",),
    ("scoring",),
    ("reference",),
    ("evaluation",),
    ("reporting",),
    ("loading", "adapted", "policy", "training", "trainer"),
    ("inspection",),
    ("generation", "serving"),
    ("callbacks", "recording", "console"),
    ("recipe",),
    ("commands", "__main__"),
    ("trl",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """Return the modules of the package that a module imports, anywhere, including imports for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports are not read here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "hf_prefopt"}


def rank(module: str) -> int:
    return RANK[module.split(".")[1]]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"hf_prefopt"}))
def test_a_module_imports_from_its_layer_or_those_before_it(module):
    above = {name for name in imports(module) if name == "hf_prefopt" or rank(name) > rank(module)}
    assert not above


def test_no_module_imports_itself_through_others():
    reached = {module: imports(module) - {"hf_prefopt"} for module in MODULES}
    for _ in MODULES:
        reached = {module: found.union(*(reached[name] for name in found)) for module, found in reached.items()}
    circular = {m for m, found in reached.items() if m in found and not is_package(m)}
    assert not circular


def is_package(module: str) -> bool:
    """A package's `__init__` exports names of its own modules."""
    return MODULES[module].name == "__init__.py"


def test_the_map_in_the_design_is_this_table():
    """The page has a line for each layer, which begins with the modules and packages of the layer, in this order."""
    page = (ROOT / "docs" / "design.md").read_text()
    table = page.split("## The map", 1)[1].split("\n## ", 1)[0]
    lines = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = tuple(tuple(name.strip(" `/") for name in line.split(",")) for line in lines)
    assert named == LAYERS


@pytest.mark.parametrize("package", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_the_design_names_every_file_of_a_package(package):
    """Every file is in the list of files or in the table of data preparation, and every file in the list exists."""
    page = (ROOT / "docs" / "design.md").read_text()
    (listed,) = re.findall(rf"^- `{package}/`: (.*?)(?=^- |^\n)", page, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(\w+)`", listed))
    files = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__"}
    assert named <= files
    assert files - named <= set(re.findall(rf"`{package}/(\w+)\.py`", page))
