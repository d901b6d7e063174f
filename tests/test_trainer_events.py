"""A callback gets the same events under `PreferenceTrainer` as under `transformers.Trainer`.

For the same schedule, the events have the same order, arguments, flags, steps and
epochs, and the flags that a callback sets have the same effect.
"""

import inspect
import itertools

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.tiny_models import tiny_model
from tests.trainers import QUIET, make_trainer, pairs

EVENTS = [name for name, _ in inspect.getmembers(TrainerCallback, inspect.isfunction) if name.startswith("on_")]
FLAGS = ["should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log"]
# Arguments of callbacks that belong to the trainer.
OWNED = ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader", "processing_class")
# Names of the Trainer's metrics; the metrics of the losses are additional.
TRAINERS = {"loss", "grad_norm", "learning_rate", "epoch", "train_loss", "total_flos", "step"}
SETTINGS = {**QUIET, "num_train_epochs": 2, "learning_rate": 0.0}


class Witness(TrainerCallback):
    """A callback that records every event as (name, step, epoch, flags, arguments,
    trainer's values, metrics), and sets one flag.

    Args:
        asks: (event, flag): the flag is set at every second occurrence of the event.
    """

    def __init__(self, asks=None):
        self.seen, self.asks, self.trainer, self.times = [], asks, None, itertools.count()

    def note(self, event, args, state, control, **given):
        handler = self.trainer.callback_handler if self.trainer else None
        owned = {name: given[name] is getattr(handler, name) for name in OWNED if name in given and handler}
        if "model" in owned:
            owned["model"] &= given["model"] is self.trainer.model
        figures = [*given.get("logs", ()), *given.get("metrics", ())]
        self.seen.append(
            (
                event,
                state.global_step,
                state.epoch and round(state.epoch, 9),
                (state.max_steps, state.num_train_epochs, len(state.log_history)),
                [flag for flag in FLAGS if getattr(control, flag)],
                sorted(given),
                owned,
                [
                    name
                    for name in figures
                    if name in TRAINERS or name.endswith(("_loss", "runtime", "samples_per_second", "steps_per_second"))
                ],
            )
        )
        if self.asks and event == self.asks[0] and next(self.times) % 2 == 1:
            setattr(control, self.asks[1], True)


def _noting(event):
    def method(self, args, state, control, **given):
        self.note(event, args, state, control, **given)

    return method


for _event in EVENTS:
    setattr(Witness, _event, _noting(_event))


def plain_rows(count, seed=0):
    """Return rows for a causal language model, as many as there are pairs."""
    ids = torch.randint(3, 300, (count, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 9} for row in ids])


def plain(folder, train, evaluation, callbacks=(), **settings):
    """Return transformers' own Trainer."""
    args = TrainingArguments(str(folder), **{**SETTINGS, **settings})
    return Trainer(tiny_model(), args, train_dataset=train, eval_dataset=evaluation, callbacks=list(callbacks))


def ours(folder, train, evaluation, callbacks=(), **settings):
    data = {"train_dataset": train, "eval_dataset": evaluation, "callbacks": list(callbacks)}
    return make_trainer(folder, **{**SETTINGS, **settings}, **data)


def seen_by(make, rows, folder, asks=None, also=(), sets=False, **settings):
    """Return the events of a run, of an evaluation and of a prediction after it,
    with other callbacks that set flags.
    """
    evaluation = {"a": rows(3, seed=1), "b": rows(2, seed=2)} if sets else rows(3, seed=1)
    witness = Witness(asks)
    trainer = make(folder, rows(7), evaluation, [witness, *map(Witness, also)], **settings)
    # The tokenizer does not affect the schedule.
    witness.trainer = trainer
    trainer.train()
    trainer.evaluate()
    trainer.predict(rows(3, seed=1))
    return witness.seen


def both(tmp_path, **settings):
    return (
        seen_by(plain, plain_rows, tmp_path / "plain", **settings),
        seen_by(ours, pairs, tmp_path / "ours", **settings),
    )


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
SCHEDULES = {
    "epochs": {},
    "steps, accumulated": {**ACCUMULATED, **STEPS},
    "by epoch": {**EPOCHS, **ACCUMULATED},
    "max_steps over an epoch": {"max_steps": 5, **STEPS, "logging_steps": 2, "logging_first_step": True},
    "max_steps in an epoch": {"max_steps": 2, **EPOCHS},
    "part of an epoch": {"num_train_epochs": 1.5, **STEPS, "logging_steps": 0.25},
    "on start, delayed": {**STEPS, "eval_on_start": True, "eval_delay": 3, "eval_steps": 1},
    "several sets": {**STEPS, "sets": True},
    "the best": {**STEPS, "save_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1},
    # Evaluations drop no row here.
    "dropped rest": {
        **ACCUMULATED,
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        **STEPS,
    },
}


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_a_callback_sees_what_plain_trainer_shows(settings, tmp_path):
    expected, found = both(tmp_path, **settings)
    assert found == expected
    assert {event for event, *_ in found} >= {"on_init_end", "on_train_begin", "on_step_end", "on_predict"}


# Each event and each flag at least once, at unusual moments.
ODD = [
    ("on_train_begin", "should_evaluate"),
    ("on_epoch_begin", "should_save"),
    ("on_step_begin", "should_training_stop"),
    ("on_step_begin", "should_log"),
    ("on_substep_end", "should_epoch_stop"),
    ("on_substep_end", "should_evaluate"),
    ("on_pre_optimizer_step", "should_save"),
    ("on_optimizer_step", "should_training_stop"),
    ("on_step_end", "should_evaluate"),
    ("on_step_end", "should_save"),
    ("on_step_end", "should_epoch_stop"),
    ("on_log", "should_training_stop"),
    ("on_log", "should_save"),
    ("on_evaluate", "should_training_stop"),
    ("on_evaluate", "should_log"),
    ("on_save", "should_evaluate"),
    ("on_save", "should_training_stop"),
    ("on_epoch_end", "should_log"),
    ("on_epoch_end", "should_evaluate"),
    ("on_prediction_step", "should_training_stop"),
]
REST = [pair for pair in itertools.product(EVENTS, FLAGS) if pair not in ODD]


@pytest.mark.parametrize(("event", "flag"), [*ODD, *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in REST)])
def test_what_a_callback_asks_for_is_done_as_by_plain_trainer(event, flag, tmp_path):
    expected, found = both(tmp_path, asks=(event, flag), **ACCUMULATED, **{**STEPS, "logging_steps": 2})
    assert found == expected


# The requests of two callbacks.
TWO = [
    (("on_step_end", "should_save"), ("on_step_end", "should_training_stop")),
    (("on_log", "should_evaluate"), ("on_evaluate", "should_save")),
    (("on_step_begin", "should_epoch_stop"), ("on_save", "should_log")),
]


@pytest.mark.parametrize(("asks", "other"), TWO)
def test_what_two_callbacks_ask_for_is_done_as_by_plain_trainer(asks, other, tmp_path):
    expected, found = both(tmp_path, asks=asks, also=[other], **ACCUMULATED, **{**STEPS, "logging_steps": 2})
    assert found == expected


class First(TrainerCallback):
    pass


class Second(TrainerCallback):
    pass


def handled(make, rows, folder):
    """Return the callbacks of a trainer after all ways to add and remove them, without our own callbacks."""
    second = Second()
    trainer = make(folder, rows(4), None, [First, second])
    lists = []

    def note():
        callbacks = trainer.callback_handler.callbacks
        lists.append([type(c).__name__ for c in callbacks if not type(c).__module__.startswith("hf_prefopt")])

    note()
    third = Second()
    trainer.add_callback(third)
    note()
    popped = trainer.pop_callback(First)
    note()
    assert isinstance(popped, First) and trainer.pop_callback(First) is None
    trainer.remove_callback(second)
    note()
    assert trainer.pop_callback(third) is third
    trainer.add_callback(First)
    note()
    trainer.remove_callback(First)
    note()
    trainer.train()
    return lists


def test_callbacks_come_and_go_as_in_plain_trainer(tmp_path):
    """Callbacks are classes and instances, in the same order."""
    assert handled(ours, pairs, tmp_path / "ours") == handled(plain, plain_rows, tmp_path / "plain")
