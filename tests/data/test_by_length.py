"""Sampling by length: `group_by_length` and `batch_rebalance`, in every layout."""

from unittest.mock import patch

import numpy as np
import pytest
from datasets import Dataset

from hf_prefopt.data.by_length import LengthSampler, RowLengths, deal
from hf_prefopt.reporting.metrics import TrainingRecord
from tests.tiny_models import random_rows
from tests.trainers import logged, make_trainer, pairs

STRATEGIES = ["group_by_length", "batch_rebalance"]


def rows_of_lengths(*lengths):
    """Return pairs with a prompt of 3 tokens and responses of 2 and n − 5 tokens, which are n tokens in total."""
    return Dataset.from_list(
        [{"prompt_ids": [1] * 3, "response_ids": [[1] * 2, [1] * (length - 5)]} for length in lengths]
    )


def sampler(strategy, lengths, layout="shared", seed=0, rows_at_once=4, micro_batches=4):
    rows = rows_of_lengths(*lengths)
    return LengthSampler(strategy, RowLengths(rows), lambda: layout, rows_at_once, micro_batches, seed, len(rows))


def test_the_length_of_a_row():
    """A prompt of 3 and responses of 2 and 7 tokens: 12 tokens in the shared row, and 10 in the longest sequence."""
    lengths = RowLengths(rows_of_lengths(12, 6))
    assert lengths.of_layout("shared").tolist() == lengths.of_layout("around").tolist() == [12, 6]
    assert lengths.of_layout("padded").tolist() == [10, 5]


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_row_once_in_another_order_each_epoch_and_the_same_on_every_rank(strategy, layout):
    lengths = np.random.default_rng(0).integers(6, 300, 70)
    orders = []
    for epoch in (0, 1):
        ranks = [sampler(strategy, lengths, layout) for _ in range(2)]
        for rank in ranks:
            rank.set_epoch(epoch)
        first, second = map(list, ranks)
        assert first == second and sorted(first) == [*range(70)] and len(ranks[0]) == 70
        orders.append(first)
    assert orders[0] != orders[1] != list(sampler(strategy, lengths, layout, seed=7))


def test_the_micro_batches_of_a_step_are_equally_long():
    """The longest of 4 micro-batches exceeds the mean by at most the largest
    difference of two rows; random ones exceed it more.
    """
    lengths = np.random.default_rng(0).integers(6, 300, 160)
    order = np.array(list(sampler("batch_rebalance", lengths)))
    dealt = lengths[order].reshape(10, 4, 4).sum(2)
    drawn = lengths.reshape(10, 4, 4).sum(2)
    excess, at_random = (step.max(1) / step.mean(1) - 1 for step in (dealt, drawn))
    assert excess.max() < 0.1 < at_random.mean()
    # The micro-batches that two ranks run at the same time have about the same length.
    assert (dealt[:, 0] >= dealt[:, 1]).all() and (dealt[:, 2] >= dealt[:, 3]).all()


def test_a_padded_step_pads_little():
    """The rows are sorted within a step, so a micro-batch has rows of similar lengths."""
    lengths = np.random.default_rng(0).integers(6, 300, 160)
    order = np.array(list(sampler("batch_rebalance", lengths, "padded")))
    batches = lengths[order].reshape(10, 4, 4)
    assert (batches.min(2)[:, :-1] >= batches.max(2)[:, 1:]).all()


def test_rows_of_one_length_come_together():
    """There are two lengths, equally often. Rows are sorted within groups of three
    steps: one step per group has both lengths.
    """
    lengths = np.array([6, 200] * 96)
    order = np.array(list(sampler("group_by_length", lengths)))
    kinds = [len(set(lengths[order[start : start + 16]])) for start in range(0, 192, 16)]
    assert kinds.count(2) <= 192 // 16 // 3 + 1


@pytest.mark.parametrize("numbers", [[9, 8, 7, 6, 5, 4, 3, 2], [1, 1, 1, 1], [100, 1, 1, 1]])
def test_dealt_groups_have_equal_sizes(numbers):
    dealt = deal(np.array(numbers), 2)
    assert [len(group) for group in dealt] == [len(numbers) // 2] * 2
    assert sorted(place for group in dealt for place in group) == [*range(len(numbers))]


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_takes_every_row_once(strategy, layout, tmp_path):
    """An epoch has 11 rows in batches of 2. Predictions are in the order of the rows
    and equal those of each row alone.
    """
    rows, seen = Dataset.from_list(random_rows(11)), []
    trainer = make_trainer(
        tmp_path, train_dataset=rows, layout=layout, train_sampling_strategy=strategy, gradient_accumulation_steps=2
    )
    with patch.object(TrainingRecord, "add", lambda self, step, rows, *others: seen.extend(rows.tolist())):
        trainer.train()
    assert sorted(seen) == [*range(11)] and seen != [*range(11)]
    predicted = trainer.predict(rows).predictions
    alone = [trainer.predict(rows.select([row])).predictions for row in (0, 7)]
    assert np.allclose(predicted[[0, 7]], np.concatenate(alone), atol=1e-5)  # rounding of 50 nats, times β


def test_a_column_of_lengths_is_used_or_missed(tmp_path):
    """The length column says that the last rows are the longest, whatever their
    tokens; raw rows have no such column.
    """
    rows = Dataset.from_list(random_rows(8)).add_column("size", [*range(8)])
    settings = {"train_sampling_strategy": "group_by_length", "length_column_name": "size"}
    trainer = make_trainer(tmp_path, train_dataset=rows, per_device_train_batch_size=8, **settings)
    order = list(trainer._get_train_sampler())
    assert order == [*reversed(range(8))]
    trainer.train()
    with pytest.raises(ValueError, match="length_column_name='size': the prepared rows have no such column"):
        make_trainer(tmp_path, train_dataset=pairs(8), **settings).train()


@pytest.mark.parametrize("lengths", [[*range(7), None], [*range(7), -1], [*range(7), float("nan")], list("abcdefgh")])
def test_a_length_that_is_no_number_of_tokens_is_an_error(lengths, tmp_path):
    """Before the first step, with the row."""
    rows = Dataset.from_list(random_rows(8)).add_column("length", lengths)
    trainer = make_trainer(tmp_path, train_dataset=rows, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match=r"'length': row \d has .*, which is not a number of tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stream_is_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=f"'{strategy}' needs the lengths of all rows.*without streaming"):
        make_trainer(
            tmp_path, train_dataset=pairs(8).to_iterable_dataset(), max_steps=2, train_sampling_strategy=strategy
        )


def test_mismatched_responses_and_unpaired_rows(tmp_path):
    """KTO's rows, and those that get a response to another prompt."""
    for loss in ("kto", "kto_pair"):
        trainer = make_trainer(tmp_path, loss_type=loss, train_sampling_strategy="batch_rebalance")
        trainer.train()
        assert len(logged(trainer, "loss")) == 4
