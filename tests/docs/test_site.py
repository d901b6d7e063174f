"""The site builds without warnings: no broken links, no pages missing in the navigation, no unknown API names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_in_strict_mode(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert 'id="hf_prefopt.PreferenceTrainer"' in (tmp_path / "api.html").read_text(encoding="utf-8")
    outside = re.compile(r'(?:src|href)="https?://(?!arxiv\.org|squidfunk\.github\.io)[^"]*\.(?:js|css|woff2?)"')
    assert [page.name for page in tmp_path.glob("*.html") if outside.search(page.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_front_pages_exist(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
