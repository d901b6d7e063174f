"""What the recipes train on, where they are told to take fewer rows than there are."""

import sys
from pathlib import Path

import pytest
from datasets import Dataset

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import common

    yield common
    sys.modules.pop("common")


ROWS = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": c}] for c in "aabbbcddde"], "chosen": list("0123456789")}
)


def test_rows_are_drawn_at_random_and_stay_in_their_order(common):
    drawn = common.draw(ROWS, 4, seed=1)["chosen"]
    assert len(drawn) == 4 and drawn == sorted(drawn)
    assert drawn == common.draw(ROWS, 4, seed=1)["chosen"] != common.draw(ROWS, 4, seed=2)["chosen"]
    assert len(common.draw(ROWS, None, seed=1)) == len(common.draw(ROWS, 99, seed=1)) == 10


def test_prompts_are_drawn_with_all_their_rows(common):
    """Of all prompts but the last one drawn, every row is there."""
    for seed in range(20):
        prompts = [row["prompt"][0]["content"] for row in common.draw_prompts(ROWS, 6, seed)]
        assert len(prompts) == 6
        cut = [name for name in set(prompts) if prompts.count(name) < "aabbbcddde".count(name)]
        assert len(cut) <= 1


def test_rows_that_begin_with_their_prompt_are_drawn_one_by_one(common):
    rows = ROWS.remove_columns("prompt")
    assert common.draw_prompts(rows, 4, seed=1)["chosen"] == common.draw(rows, 4, seed=1)["chosen"]


def test_of_a_stream_the_first_rows_are_taken(common):
    stream = ROWS.to_iterable_dataset()
    for draw in (common.draw, common.draw_prompts):
        assert [row["chosen"] for row in draw(stream, 3, seed=1)] == ["0", "1", "2"]


def test_the_length_of_a_row_is_that_of_its_texts(common):
    assert common.characters({"prompt": [{"role": "user", "content": "ab"}], "chosen": "cde", "score": 1.5}) == 9
