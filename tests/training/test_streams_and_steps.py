"""Streams whose batches do not fill the last step of an epoch: every step is full, and no row is left out.

A run without a step raises an error or says so.
"""

import logging

import pytest
import torch
from transformers import TrainerCallback

from hf_prefopt.console import finish_run
from hf_prefopt.reporting.record import read_record
from hf_prefopt.reporting.run_facts import NOTHING_TRAINED
from tests.tiny_models import tiny_model
from tests.trainers import logged, make_trainer, pairs, weights

SETTINGS = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}


def stream_trainer(folder, rows=5, **settings):
    return make_trainer(folder, tiny_model(), train_dataset=pairs(rows).to_iterable_dataset(), **SETTINGS, **settings)


def rows_of_steps(trainer):
    """Record the rows of each step; training fills the list."""
    steps, begin = [], trainer.global_batch.begin

    def watched(pieces, collect):
        steps.append([int(row) for piece in pieces for row in piece["rows"]])
        begin(pieces, collect)

    trainer.global_batch.begin = watched
    return steps


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_left_of_an_epoch_begins_the_next(workers, tmp_path):
    """Five rows, two per step: the third step has the last row and the first one.
    Losses, norms and weights are those of a dataset with the rows in this order.
    """
    trainer = stream_trainer(tmp_path, max_steps=5, dataloader_num_workers=workers)
    steps = rows_of_steps(trainer)
    trainer.train()
    assert steps == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    order = torch.tensor(steps).flatten().tolist()
    plain = make_trainer(
        tmp_path,
        tiny_model(),
        train_dataset=pairs(5).select(order),
        train_sampling_strategy="sequential",
        **SETTINGS,
    )
    plain.train()
    for name in ("loss", "grad_norm"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-5)
    expected = weights(plain.model)
    assert all((values - expected[name]).abs().max() < 1e-6 for name, values in weights(trainer.model).items())


def test_a_second_run_begins_with_the_first_row(tmp_path):
    """The rows that were left after the last epoch of the first run are not used."""
    trainer = stream_trainer(tmp_path, max_steps=3)
    steps = rows_of_steps(trainer)
    trainer.train()
    trainer.train()
    assert steps == [[0, 1], [2, 3], [4, 0]] * 2


def test_a_stream_of_less_than_a_step_is_an_error(tmp_path):
    """Without the error, the stream would be read again and again without a step."""
    trainer = stream_trainer(tmp_path, rows=1, max_steps=2)
    with pytest.raises(ValueError, match="has only 1 batches, but a step needs gradient_accumulation_steps=2"):
        trainer.train()


def test_a_run_that_is_resumed_behind_the_streams_end_is_an_error(tmp_path):
    """The position is searched from the beginning of the stream, in one pass."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    stream_trainer(tmp_path, **settings).train()
    resumed = stream_trainer(tmp_path, **settings)
    steps = rows_of_steps(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert steps[:2] == [[2, 3], [4, 0]]
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"ended before step 4, where training resumes.* ignore_data_skip=True"):
        stream_trainer(tmp_path, **settings).train(resume_from_checkpoint=checkpoint)
    anew = stream_trainer(tmp_path, ignore_data_skip=True, **settings)
    steps = rows_of_steps(anew)
    anew.train(resume_from_checkpoint=checkpoint)
    assert steps == [[0, 1], [2, 3]]


@pytest.mark.parametrize("setting", ["max_steps", "num_train_epochs"])
def test_a_run_of_no_steps_is_an_error_where_the_settings_were_changed_later(setting, tmp_path):
    """With max_steps=0, the Trainer would make one step with a learning rate of 0."""
    trainer = make_trainer(tmp_path)
    before = weights(trainer.model)
    trainer.args.max_steps = -1
    setattr(trainer.args, setting, 0)
    with pytest.raises(ValueError, match=r"the run has 0 steps: set args\.max_steps above 0"):
        trainer.train()
    assert all(torch.equal(values, before[name]) for name, values in weights(trainer.model).items())


class StopsAtOnce(TrainerCallback):
    """Ends the run after the first micro-batch, before the optimizer steps."""

    def on_step_begin(self, args, state, control, **_):
        control.should_training_stop = True


@pytest.mark.parametrize("has_step", [False, True])
def test_a_run_that_ends_before_its_first_step_says_so(has_step, tmp_path, caplog):
    """In the log, in the model card and in the record; after a run with a step, in none of them."""
    accumulated = 1 if has_step else 2
    trainer = make_trainer(tmp_path, callbacks=[StopsAtOnce()], gradient_accumulation_steps=accumulated)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    finish_run(trainer)
    assert trainer.state.global_step == has_step
    card, record = (tmp_path / "README.md").read_text(), read_record(tmp_path).run
    for places in (caplog.messages, card.splitlines(), [f"- {text}" for text in record["warnings"]]):
        assert any(NOTHING_TRAINED in line for line in places) is not has_step
