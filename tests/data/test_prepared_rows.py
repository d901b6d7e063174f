"""Prepared rows that were made by hand: columns that do not match each other are an error that names the row."""

import re

import pytest
from datasets import Dataset

from hf_prefopt.data.prepare import prepare_dataset
from tests.tokenizers import tiny_tokenizer
from tests.trainers import lists, pairs, triples, unpaired

TOKENIZER = tiny_tokenizer()
MAKERS = {"pairs": pairs, "triples": triples, "unpaired": unpaired, "lists": lists}


def changed(kind, **columns):
    """Four rows, with other columns in row 2; each column is a function of the row."""
    rows = [dict(row) for row in MAKERS[kind](4)]
    return [{**row, **{n: f(row) for n, f in columns.items()}} if at == 2 else row for at, row in enumerate(rows)]


WRONG = {
    "a mask too long": (
        "pairs",
        {"scored_masks": lambda row: [[*m, 1] for m in row["scored_masks"]]},
        "tokens and `sc",
    ),
    "a mask too few": ("pairs", {"scored_masks": lambda row: row["scored_masks"][:1]}, "one entry per response token"),
    "other masks": ("pairs", {"scored_masks": lambda row: [[2] * len(m) for m in row["scored_masks"]]}, "0 and 1: [2]"),
    "nothing scored": (
        "pairs",
        {"scored_masks": lambda row: [[0] * len(m) for m in row["scored_masks"]]},
        "response 0",
    ),
    "no prompt": ("pairs", {"prompt_ids": lambda row: []}, "nothing predicts the first token"),
    "no response": ("pairs", {"response_ids": lambda row: [], "scored_masks": lambda row: []}, "has no response"),
    "a negative id": ("pairs", {"prompt_ids": lambda row: [5, -100]}, "has token id -100"),
    "no pair": ("pairs", {"pairs": lambda row: []}, "has no example in `pairs`"),
    "a place behind the end": ("pairs", {"pairs": lambda row: [[0, 2]]}, "has 2 in `pairs`, but its 2 responses"),
    "a negative place": ("pairs", {"pairs": lambda row: [[0, -1]]}, "has -1 in `pairs`"),
    "a response and itself": ("pairs", {"pairs": lambda row: [[1, 1]]}, "two different responses"),
    "three of a pair": ("pairs", {"pairs": lambda row: [[0, 1, 0]]}, "two different responses"),
    "a gold place": ("triples", {"golds": lambda row: [3]}, "has 3 in `golds`"),
    "golds": ("triples", {"golds": lambda row: [2, 2]}, "has 2 entries in `golds` for 1 examples"),
    "labels": ("unpaired", {"labels": lambda row: [True, False]}, "has 2 entries in `labels` for 1 responses"),
    "ranks": ("lists", {"ranks": lambda row: [*row["ranks"], 9.0]}, "entries in `ranks` for"),
    "scores": ("lists", {"scores": lambda row: row["scores"][1:]}, "entries in `scores` for"),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize(("kind", "columns", "said"), WRONG.values(), ids=WRONG)
def test_columns_that_do_not_match_are_named_with_the_row(kind, columns, said, streamed):
    rows = Dataset.from_list(changed(kind, **columns))
    rows = rows.to_iterable_dataset() if streamed else rows
    with pytest.raises(ValueError, match="row 2 of this prepared dataset .*" + re.escape(said)):
        list(prepare_dataset(rows, TOKENIZER))


@pytest.mark.parametrize("column", ["weights", "margins"])
def test_a_number_too_many_is_not_the_next_examples(column):
    """Two numbers for one pair and none for the next: together as many as there are pairs."""
    rows = pairs(4).add_column(column, [[1.0], [2.0, 3.0], [], [4.0]])
    with pytest.raises(ValueError, match=f"row 1 .* has 2 entries in `{column}` for 1 examples"):
        prepare_dataset(rows, TOKENIZER)


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_that_match_stay_as_they_are(kind):
    rows = MAKERS[kind](4)
    assert prepare_dataset(rows, TOKENIZER) is rows
    without_scores = rows.remove_columns("scores").add_column("scores", [[]] * 4) if kind == "lists" else rows
    assert list(prepare_dataset(without_scores.to_iterable_dataset(), TOKENIZER)) == list(without_scores)


class TestShown:
    """A dataset is what it shows: not its hidden columns, and not the rows from which a function makes others."""

    RAW = Dataset.from_dict(
        {"prompt": ["Q: "] * 2, "chosen": ["Yes."] * 2, "rejected": ["No."] * 2, "margin": [3.0] * 2}
    )

    def test_hidden_columns_are_not_read(self):
        shown = self.RAW.with_format(columns=["prompt", "chosen", "rejected"])
        assert "margins" in prepare_dataset(self.RAW, TOKENIZER).column_names
        assert "margins" not in prepare_dataset(shown, TOKENIZER).column_names

    def test_columns_without_a_format_that_are_shown_are_read(self):
        shown = self.RAW.with_format("numpy", columns=["margin"], output_all_columns=True)
        assert "margins" in prepare_dataset(shown, TOKENIZER).column_names

    @pytest.mark.parametrize("rows", [RAW, pairs(2)], ids=["raw", "prepared"])
    def test_rows_made_by_a_function_are_refused(self, rows):
        with pytest.raises(ValueError, match=r"train: .*set_transform.*map\(function, batched=True\)"):
            prepare_dataset(rows.with_transform(lambda batch: batch), TOKENIZER)
