"""Every row in docs/data.md is read as the page says, and every layout has a row on the page."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from hf_prefopt.data.layout_table import LAYOUTS
from hf_prefopt.data.prepare import prepare
from hf_prefopt.kinds import TRIPLES
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAGE = Path(__file__).parents[2].joinpath("docs/data.md").read_text(encoding="utf-8")
# The row in our own columns and the rows that are converted to it, keyed by the heading of the section.
SECTIONS = {
    title: (json.loads(block[1]), [json.loads(row) for row in re.findall(r"^\|[^|]*\| `(\{.*\})` \|$", text, re.M)])
    for title, text in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    if (block := re.search(r"```json\n(.*?)\n```", text))
}
CASES = [(title, place) for title, (_, rows) in SECTIONS.items() for place in range(len(rows))]
ERRORS = re.findall(r"^\| `(\{.*?\})` \| (?:``? ?)(.*?)(?: ?``?) \| [^|]*\|$", PAGE, re.M)


def prepared(row: dict):
    kind = TRIPLES if {"reference", "reference_ids"}.intersection(row) else None
    return prepare(Dataset.from_list([row]), TOKENIZER, max_length=None, kind=kind)


def tokens(row: dict) -> dict:
    """Return the prepared row, without the optional columns of scores."""
    (made,) = prepared(row).dataset
    return {key: value for key, value in made.items() if key not in ("row", "chosen_scores", "rejected_scores")}


def test_the_page_is_read():
    """Every table of rows belongs to a section with a JSON block, and no line of a table is missed."""
    lines = [line for line in PAGE.splitlines() if re.match(r"\|.*`\{", line)]
    assert len(lines) == len(CASES) + len(ERRORS)
    assert all(rows for _, rows in SECTIONS.values()) and len(CASES) > 50 and len(ERRORS) > 10


@pytest.mark.parametrize(("title", "place"), CASES)
def test_a_row_becomes_what_stands_above_it(title, place):
    meaning, rows = SECTIONS[title]
    assert tokens(rows[place]) == tokens(meaning)


@pytest.mark.parametrize(("row", "message"), ERRORS)
def test_an_error_says_what_the_page_says(row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepared(json.loads(row))


def test_every_layout_has_a_row():
    """Some layouts count as one here: question, and instruction with input; two responses, and two conversations."""

    def plainly(name: str) -> str:
        return name.split(", ")[0].replace("two conversations and", "two responses and")

    rows = [row for meaning, given in SECTIONS.values() for row in (meaning, *given)]
    shown = {plainly(prepared(row).layout.name) for row in rows}
    assert {plainly(layout.name) for layout in LAYOUTS} - shown == {"pairs in lists"}  # only read for losses of pairs
