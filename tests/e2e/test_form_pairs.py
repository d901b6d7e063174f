"""The demo's data equal the output of their script, and neither length nor form alone tells which response is right."""

import gzip
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "recipes" / "data"
MADE = runpy.run_path(str(DATA / "make_form_pairs.py"))


def rows(split: str) -> list[dict]:
    with gzip.open(DATA / "form_pairs" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return list(map(json.loads, lines))


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_pair_of_responses_occurs_once_in_either_order(split):
    found = Counter((row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows(split))
    assert set(found.values()) == {1}
    assert all(found[rejected, chosen] == 1 for chosen, rejected in found)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_files_are_those_of_the_script(split):
    made = [row for question, answer in MADE["answers"](split).items() for row in MADE["pairs"](question, answer)]
    assert sorted(map(json.dumps, made)) == sorted(map(json.dumps, rows(split)))


def test_no_question_is_in_both_splits():
    assert not MADE["answers"]("train").keys() & MADE["answers"]("test").keys()
