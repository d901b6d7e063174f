"""The state of the losses is in `trainer_state.json`, so it is restored in every way of resuming."""

import json
import logging

import pytest
from transformers import TrainerCallback, TrainerState

from hf_prefopt.objective.build import build_objective
from hf_prefopt.training.saved_run import LOSSES, keep_losses, restore_losses
from tests.trainers import make_trainer, pairs

BCO = {"loss_type": "bco_pair", "train_dataset": pairs(8), "save_strategy": "steps", "save_steps": 2}


class AtBegin(TrainerCallback):
    """A callback that calls a function when training begins."""

    def __init__(self, function=None):
        self.function = function

    def on_train_begin(self, *_, **__):
        self.function()


def moved():
    """Change BCO's δ from its initial value."""
    objective = build_objective(["bco_pair"])
    (loss,) = objective.state
    objective.load_state_dict({loss: dict.fromkeys(objective.state[loss], 0.25)})
    return objective


def test_the_state_survives_a_file(tmp_path):
    state, objective = TrainerState(), moved()
    keep_losses(state, objective)
    state.save_to_json(str(tmp_path / "state.json"))
    loaded, fresh = TrainerState.load_from_json(str(tmp_path / "state.json")), build_objective(["bco_pair"])
    restore_losses(loaded, fresh)
    assert fresh.state_dict() == objective.state_dict() != build_objective(["bco_pair"]).state_dict()
    assert LOSSES not in loaded.stateful_callbacks  # the Trainer would search for a callback of this name


def test_losses_without_state_leave_their_names(caplog):
    """The Trainer gets no state of the losses, because it treats remaining entries as states of callbacks."""
    state = TrainerState()
    keep_losses(state, build_objective(["dpo"]))
    assert state.stateful_callbacks == {
        "hf_prefopt_objective": {"losses": ["1 × dpo, beta=0.1, label_smoothing=0.0"]},
    }
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        restore_losses(state, build_objective(["dpo"]))
    assert not caplog.text and not state.stateful_callbacks


def test_a_state_that_is_not_there_starts_afresh(caplog):
    """If a checkpoint has no state, the losses start with a new state, even in a trainer that has trained before."""
    objective = moved()
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        restore_losses(TrainerState(), objective)
    assert objective.state_dict() == build_objective(["bco_pair"]).state_dict()
    assert "no state for bco_pair: using the initial state" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"save_only_model": True}, {"restore_callback_states_from_checkpoint": True}])
def test_a_resumed_bco_keeps_its_delta(settings, tmp_path):
    """δ is that after step 2, for any other saved or restored state."""
    whole = make_trainer(tmp_path, **BCO, **settings, max_steps=2)
    whole.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"][LOSSES] == whole.criterion.state_dict()
    resumed, seen = make_trainer(tmp_path / "again", **BCO, **settings, max_steps=3), []
    resumed.add_callback(AtBegin(lambda: seen.append(resumed.criterion.state_dict())))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen == [whole.criterion.state_dict()] != [resumed.criterion.state_dict()]


PAIRS = {"train_dataset": pairs(8), "save_strategy": "steps", "save_steps": 1}


def test_another_number_of_rows_a_step_is_an_error(tmp_path):
    """With half the rows per step, the position in the data and the learning rates would be different."""
    make_trainer(tmp_path, **PAIRS, gradient_accumulation_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"4 rows per step .*=2 × .*=2 × 1 rank\), but this run has 2 rows per step"):
        make_trainer(tmp_path, **PAIRS).train(resume_from_checkpoint=checkpoint)
    same = make_trainer(tmp_path, **PAIRS, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    same.train(resume_from_checkpoint=checkpoint)
    assert same.state.global_step == 2
    skipping = make_trainer(tmp_path, **PAIRS, ignore_data_skip=True)
    skipping.train(resume_from_checkpoint=checkpoint)
    assert skipping.state.global_step > 1


def test_weights_alone_resume_with_a_warning(tmp_path, caplog):
    make_trainer(tmp_path, **PAIRS, save_only_model=True).train()
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        make_trainer(tmp_path, **PAIRS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "has only weights (save_only_model=True): the optimizer and the learning-rate schedule" in caplog.text


@pytest.mark.parametrize(("name", "engine"), [("global_step1", "DeepSpeed"), ("optimizer_0", "FSDP")])
def test_a_checkpoint_of_another_engine_is_an_error(name, engine, tmp_path):
    """Without the error, the Trainer would continue with a new optimizer and a new
    learning rate schedule, without a message.
    """
    make_trainer(tmp_path, **PAIRS, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / name).mkdir()
    with pytest.raises(ValueError, match=f"was written under {engine}, but this run is under one process or DDP"):
        make_trainer(tmp_path, **PAIRS).train(resume_from_checkpoint=str(checkpoint))


def test_the_last_of_several_runs_checkpoints_has_to_be_named(tmp_path):
    """A shorter run in the folder of a longer one leaves the last checkpoints of the longer one."""
    make_trainer(tmp_path, **PAIRS).train()
    make_trainer(tmp_path, **PAIRS, max_steps=2).train()
    with pytest.raises(ValueError, match="several runs: checkpoint-2 was written after checkpoint-4"):
        make_trainer(tmp_path, **PAIRS).train(resume_from_checkpoint=True)
    named = make_trainer(tmp_path, **PAIRS)
    named.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert named.state.global_step == 4
    make_trainer(tmp_path, **PAIRS).train(resume_from_checkpoint=True)


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(tmp_path, caplog):
    make_trainer(tmp_path, **PAIRS, max_steps=2).train()
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        make_trainer(tmp_path, **PAIRS, max_steps=2).train(resume_from_checkpoint=True)
    assert "nothing was trained" in caplog.text and "the run ends at step 2" in caplog.text
