"""Rows that repeat to fill the last batches of the ranks are recognized, and their examples are not counted."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import BatchSampler, SequentialSampler

from hf_prefopt.data.collator import EvenStream, LoaderCollator, examples_of_first_rows, keep_examples, rows_that_count
from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from tests.tiny_models import random_rows


@pytest.mark.parametrize("rows", range(1, 25))
@pytest.mark.parametrize(("share", "world_size"), [(1, 2), (2, 2), (3, 2), (2, 4)])
def test_the_rows_that_count_are_each_row_once(rows, share, world_size):
    """The rows that count are those that accelerate's sampler gives to all ranks,
    without the repeated rows of the last batch.
    """
    seen = []
    for rank in range(world_size):
        batches = list(BatchSamplerShard(BatchSampler(SequentialSampler(range(rows)), share, False), world_size, rank))
        count = rows_that_count(rows, share, rank, world_size)
        seen += [row for batch in batches[:-1] for row in batch] + batches[-1][:count]
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_a_filled_up_stream_says_which_rows_come_again(rows):
    """Two ranks get two rows at a time: the unmarked rows are each row once, and
    both ranks get the same number of rows.
    """
    stream = EvenStream([{"row": row} for row in range(rows)], 4)
    shards = [list(IterableDatasetShard(stream, 2, num_processes=2, process_index=rank)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1])
    assert sorted(row["row"] for shard in shards for row in shard if "repeated" not in row) == list(range(rows))


def test_examples_are_told_by_their_rows():
    """Rows have 2, 1 and 3 pairs, in pieces of two rows and one row: the first two
    rows have the first three examples.
    """
    pieces = [{"rows": torch.zeros(3), "pair_in_row": torch.tensor([0, 1, 0])}]
    pieces.append({"rows": torch.zeros(3), "pair_in_row": torch.tensor([0, 1, 2])})
    kept = [mask.tolist() for mask in examples_of_first_rows(pieces, 2)]
    assert kept == [[True, True, True], [False, False, False]]
    assert [mask.tolist() for mask in examples_of_first_rows(pieces, 1)] == [[True, True, False], [False] * 3]


def test_repeated_rows_of_a_batch_are_marked_in_each_piece():
    """The last two of four rows are repeated, and a token budget splits the batch into several pieces."""
    rows = random_rows(4)
    rows[2:] = [{**row, "repeated": True} for row in rows[:2]]
    collators = {"padded": PaddedCollator(0), "shared": SharedCollator()}
    (whole,) = LoaderCollator(collators)(rows)["pieces"]
    pieces = LoaderCollator(collators, max_tokens=1)(rows)["pieces"]
    assert whole["counted"].tolist() == [True, True, False, False]
    assert [piece["counted"].tolist() for piece in pieces] == [[True], [True], [False], [False]]
    kept = keep_examples(whole, whole["counted"])
    assert kept["chosen"].tolist() == whole["chosen"][:2].tolist()
    assert kept["input_ids"] is whole["input_ids"]
