"""The loss catalog, the paper index and the configurations of all losses match the registry."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_prefopt import get_loss, list_losses
from hf_prefopt.reporting.loss_page import loss_page
from hf_prefopt.reporting.papers_page import papers_page
from tests.e2e.typed import read

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "recipes" / "configs").glob("*.yaml") if path.stem != "base")


def test_the_pages_are_current():
    """The pages are generated in a new interpreter, because other tests register losses."""
    program = (
        "from hf_prefopt.reporting import loss_page, papers_page; import json; "
        "print(json.dumps([loss_page.loss_page(), papers_page.papers_page()]))"
    )
    command = [sys.executable, "-c", program]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert made == [(ROOT / "docs" / page).read_text() for page in ("losses.md", "papers.md")], "run: make docs"


def test_every_loss_with_a_paper_is_in_the_index():
    """The loss is in the row of its paper, with a link to an existing section of losses.md."""
    rows = dict(re.findall(r"^\| \[([0-9.]+)\]\(https://arxiv.org/abs/\1\) \| (.*) \|$", papers_page(), re.MULTILINE))
    catalog = loss_page()
    for name in list_losses():
        linked = {paper for paper, losses in rows.items() if f"[{name}](losses.md#{name})" in losses}
        assert linked == {get_loss(name).paper} - {""} and f"\n### {name}\n" in catalog


def test_the_pages_link_to_nothing_outside_docs():
    pages = [loss_page(), papers_page(), *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    assert not [link for page in pages for link in re.findall(r"\]\((\.\./[^)]*)\)", page)]


def test_every_loss_has_its_section_its_source_and_its_file():
    page, names = loss_page(), {path.stem for path in CONFIGS}
    for name in names:
        spec = get_loss(name)
        assert spec.name == name and f"\n### {name}\n" in page and spec.description in page
    made = subprocess.run(
        [sys.executable, "-c", "import hf_prefopt; print(*hf_prefopt.list_losses())"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert names == set(made.stdout.split()), "run: make docs"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_loss_with_its_published_defaults(path):
    """The file sets the loss's defaults; together with the base file, it is a complete run."""
    entries = yaml.safe_load(path.read_text())
    spec = get_loss(path.stem)
    given = {name: entries[name] for name in ("beta", "label_smoothing") if name in entries}
    given |= entries.get("loss_params", {})
    assert given == {name: value for name, value in spec.defaults.items() if value is not None}
    recipe = read("--config", str(path), "--use_cpu")
    assert [term.spec.name for term in recipe.training.build_objective().terms] == [spec.name]
    assert (ROOT / recipe.data.dataset_name).is_dir() and recipe.training.output_dir == f"runs/{spec.name}"
    assert entries.keys() <= {"base", "loss_type", "beta", "label_smoothing", "loss_params", "dataset_name", "unpair"}
