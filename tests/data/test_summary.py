"""The counts of a prepared dataset equal those of a simple count, row by row."""

import math
from itertools import product

import numpy as np
import pytest
from datasets import Dataset

from hf_prefopt.data import summary as module
from hf_prefopt.data.group import group_rows
from hf_prefopt.data.prepare import prepared_features
from hf_prefopt.data.summary import DataSummary, summarize
from hf_prefopt.kinds import KINDS, LISTS, SCORED, UNPAIRED

RANDOM = np.random.default_rng(7)


def tokens(low: int, high: int) -> list[int]:
    return RANDOM.integers(0, 5, int(RANDOM.integers(low, high))).tolist()


# There are few tokens and short texts, so that prompts, responses and lengths repeat.
EXAMPLES = {
    "pairs": lambda: ({"pairs": [[0, 1]]}, 2),
    "triples": lambda: ({"pairs": [[0, 1]], "golds": [2]}, 3),
    "unpaired examples": lambda: ({"labels": [bool(RANDOM.integers(2))]}, 1),
    "scored responses": lambda: ({"quantiles": [float(RANDOM.integers(3)) / 2]}, 1),
    "lists": lambda: (lambda count: ({"ranks": RANDOM.integers(1, 4, count).tolist(), "scores": []}, count))(
        int(RANDOM.integers(2, 5))
    ),
}


def rows_of(kind, count: int = 60) -> Dataset:
    """Return random rows; some have an empty prompt, or responses without scored tokens."""
    rows = []
    for row in range(count):
        columns, responses = EXAMPLES[kind.name]()
        ids = [tokens(1, 5) for _ in range(responses)]
        masks = [RANDOM.integers(0, 2, len(response)).tolist() for response in ids]
        rows.append({"prompt_ids": tokens(0, 3), "response_ids": ids, "scored_masks": masks, **columns, "row": row})
    return Dataset.from_list(rows, features=prepared_features(kind.columns))


def compared(kind, rows) -> list[tuple[int, int]]:
    """Return the numbers of scored tokens of the better and the worse response of each comparison."""
    if kind is UNPAIRED:
        lengths = {label: [sum(r["scored_masks"][0]) for r in rows if r["labels"][0] == label] for label in (0, 1)}
        return list(product(lengths[1], lengths[0]))
    if kind is SCORED:  # no comparisons
        return []
    found = []
    for row in rows:
        lengths = list(map(sum, row["scored_masks"]))
        places = product(range(len(lengths)), repeat=2) if kind is LISTS else row["pairs"]
        found += [(lengths[a], lengths[b]) for a, b in places if kind is not LISTS or row["ranks"][a] < row["ranks"][b]]
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_counts_are_those_of_a_plain_count(kind, batch_rows, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", batch_rows)
    # A selection of rows, so that the arrays are not complete columns.
    dataset = rows_of(kind).select([*range(3, 50), 3, 4])
    rows, found = list(dataset), summarize(dataset)
    responses = [(row, k) for row in rows for k in range(len(row["response_ids"]))]
    assert (found.kind, found.rows, found.responses) == (kind.name, len(rows), len(responses))
    assert found.examples == sum(map(kind.count_examples, rows))
    assert found.prompts == len({tuple(row["prompt_ids"]) for row in rows})
    whole = {repr([row[c] for c in ("prompt_ids", "response_ids", "scored_masks", kind.columns[0])]) for row in rows}
    assert found.repeated_rows == len(rows) - len(whole) >= 2
    assert found.tokens == sum(len(row["prompt_ids"]) + len(row["response_ids"][k]) for row, k in responses)
    assert found.tokens_by_row == sum(len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows)
    assert found.tokens_by_prompt == sum(group.tokens for group in group_rows(rows).groups)
    assert found.scored_tokens == sum(sum(row["scored_masks"][k]) for row, k in responses)
    pairs = compared(kind, rows)
    assert found.comparisons == len(pairs)
    if not pairs:
        assert math.isnan(found.longer)
    else:
        assert found.longer == pytest.approx(np.mean([a > b for a, b in pairs]))
        assert found.longer_accuracy == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))
    assert found.identical_pairs == sum(
        row["response_ids"][a] == row["response_ids"][b] for row in rows for a, b in row.get("pairs", ())
    )
    labels = [label for row in rows for label in row.get("labels", ())]
    assert (found.desirable, found.undesirable) == (sum(labels), len(labels) - sum(labels))
    prompts = sorted(len(row["prompt_ids"]) for row in rows)
    assert found.lengths["prompt"].longest == prompts[-1]
    # The smallest length that this share of the prompts does not exceed.
    for share, length in ((0.5, found.lengths["prompt"].median), (0.95, found.lengths["prompt"].p95)):
        assert length == prompts[math.ceil(share * len(prompts)) - 1]


def test_no_rows_and_labels_of_one_kind():
    empty = rows_of(UNPAIRED).select([])
    assert summarize(empty) == DataSummary("unpaired examples") and summarize(empty).saved_by_row == 0
    desirable = summarize(rows_of(UNPAIRED).filter(lambda row: row["labels"][0]))
    assert desirable.comparisons == 0 and math.isnan(desirable.longer) and desirable.kto_weights is None


def test_what_sharing_saves_and_kto_s_weights():
    """Two pairs have one prompt (4 tokens), one chosen response (2), and two rejected ones (1 and 3).

    As sequences they have 4·4 + 2·2 + 1 + 3 = 24 tokens, shared by row 2·4 + 8 = 16,
    shared by prompt 4 + 2 + 1 + 3 = 10.
    """
    rows = [
        {"prompt_ids": [1] * 4, "response_ids": [[2, 3], other], "scored_masks": [[1, 1], [1] * len(other)],
         "pairs": [[0, 1]], "row": row}
        for row, other in enumerate(([4], [5, 6, 7]))
    ]  # fmt: skip
    found = summarize(Dataset.from_list(rows, features=prepared_features(["pairs"])))
    assert (found.tokens, found.tokens_by_row, found.tokens_by_prompt) == (24, 16, 10)
    assert (found.saved_by_row, found.saved_by_prompt) == (pytest.approx(1 / 3), pytest.approx(14 / 24))
    assert (found.longer, found.longer_accuracy) == (0.5, 0.5)
    assert DataSummary("unpaired examples", desirable=100, undesirable=200).kto_weights == (2.0, 1.0)


def test_rows_that_are_not_prepared():
    with pytest.raises(ValueError, match="columns prompt, chosen are not those of prepared rows"):
        summarize(Dataset.from_list([{"prompt": "a", "chosen": "b"}]))
