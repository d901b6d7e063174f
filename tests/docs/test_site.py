"""The site builds without warnings: no broken links, no pages missing in the navigation, no unknown API names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Markdown that is read in the repository, not on the site.
FOLDERS = ("benchmarks", "recipes", "tests", "LICENSES")
FILES = [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The HTML of each page."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {page.stem: page.read_text(encoding="utf-8") for page in folder.glob("*.html") if page.stem != "404"}


def test_the_site_builds_in_strict_mode_and_loads_nothing_from_elsewhere(pages):
    assert 'id="hf_prefopt.PreferenceTrainer"' in pages["api"]
    outside = re.compile(r'(?:src|href)="https?://(?!arxiv\.org|squidfunk\.github\.io)[^"]*\.(?:js|css|woff2?)"')
    assert [name for name, page in pages.items() if outside.search(page)] == []


def test_every_page_begins_with_what_it_is_for(pages):
    """docs/theme/hooks.py makes the first paragraph the description; without one, a page has the site's."""
    described = {name: re.findall(r'<meta name="description" content="([^"]*)"', page) for name, page in pages.items()}
    assert {name: text for name, text in described.items() if len(text) != 1 or len(text[0]) < 60} == {}
    assert len({text for (text,) in described.values()}) == len(pages)


def test_names_in_tables_break_between_words(pages):
    assert "<code>label_<wbr>smoothing</code>" in pages["settings"]


@pytest.mark.parametrize("page", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_exist(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
