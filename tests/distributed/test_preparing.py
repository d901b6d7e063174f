"""Under DDP, an evaluation before training does not change the trained model, and ranks that diverge are detected.

Plain gradient descent in fp32, as in `cases`: weights of about 1 change by 1e-2 to
1e-1, a unit in the last place is 1.2e-7, and 1e-4 of the largest change is about ten
units. Gradients that are not averaged change the weights by another half of that.
"""

import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from hf_prefopt.losses import register_loss, registry
from hf_prefopt.training import engines, replicas
from hf_prefopt.training.replicas import checksum
from tests.distributed.cases import DESCENT, GLOBAL_BATCH
from tests.distributed.launch import largest_difference
from tests.distributed.scenes import play
from tests.tiny_models import tiny_model, with_lora
from tests.trainers import make_trainer, pairs, weights


def make(folder, model=None, **settings):
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    share = GLOBAL_BATCH // (2 * world_size)
    sizes = {"per_device_train_batch_size": share, "per_device_eval_batch_size": share}
    data = {"train_dataset": pairs(7), "eval_dataset": pairs(5, seed=1)}
    return make_trainer(folder, model or tiny_model(), **{**DESCENT, **sizes, **data, **settings})


def trained(trainer):
    trainer.train()
    return weights(trainer.model)


def train_alone(folder):
    return trained(make(folder))


def evaluate_first(folder):
    trainer = make(folder)
    trainer.evaluate()
    return trained(trainer)


def predict_first(folder):
    trainer = make(folder)
    trainer.predict(pairs(5, seed=1))
    return trained(trainer)


def evaluate_twice_before_an_adapter(folder):
    trainer = make(folder, with_lora(tiny_model()))
    trainer.evaluate()
    trainer.evaluate()
    return trained(trainer)


def adapter_alone(folder):
    return trained(make(folder, with_lora(tiny_model())))


def evaluate_first_in_bf16(folder):
    trainer = make(folder, bf16=True)
    trainer.evaluate()
    return trained(trainer)


def bf16_alone(folder):
    return trained(make(folder, bf16=True))


def train_twice(folder):
    trainer = make(folder)
    trainer.train()
    return trained(trainer)


def train_evaluate_train(folder):
    trainer = make(folder)
    trainer.train()
    trainer.evaluate()
    return trained(trainer)


def broken(folder):
    """Call `evaluate()` before `train()` without our fix, which unwraps the model after the evaluation."""
    trainer = make(folder)
    trainer.evaluate()
    with mock.patch.object(engines, "unwrapped_after_evaluation", lambda accelerator, model, wrapped: wrapped):
        trainer.train()


def broken_behind_a_warm_up(folder):
    """The learning rate of the first step is 0, so the step changes no weight on either rank."""
    trainer = make(folder, lr_scheduler_type="linear", warmup_steps=1)
    trainer.evaluate()
    with mock.patch.object(engines, "unwrapped_after_evaluation", lambda accelerator, model, wrapped: wrapped):
        trainer.train()


def changed_on_one_rank(folder):
    """A callback changes one weight of one rank in the first step; the other ranks do not change."""
    trainer = make(folder)
    before = replicas.RanksAgree.on_step_end

    def on_step_end(self, args, state, control, model=None, **rest):
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.lm_head.weight[3, 5] += 1e-6
        return before(self, args, state, control, model=model, **rest)

    with mock.patch.object(replicas.RanksAgree, "on_step_end", on_step_end):
        trainer.train()


class ChangesOneRank(TrainerCallback):
    """A callback that changes one weight of one rank after the second step. The next comparison is at a checkpoint."""

    def on_step_end(self, args, state, control, model=None, **rest):
        if dist.get_rank() == 1 and state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight[3, 5] += 1e-6


def changed_before_a_checkpoint(folder):
    trainer = make(folder, callbacks=[ChangesOneRank()], num_train_epochs=2, save_strategy="steps", save_steps=1)
    try:
        trainer.train()
    finally:
        written = sorted(path.name for path in folder.glob("checkpoint-*"))
        assert written == ["checkpoint-1"], written


def changed_before_the_end(folder):
    make(folder, callbacks=[ChangesOneRank()]).train()


def not_finite_on_one_rank(folder):
    """The loss of one row is not finite; one of the ranks has this row in the second
    of two steps. No loss is logged.
    """
    with mock.patch.dict(registry._LOSSES):

        @register_loss("fails_in_row_5")
        def fails_in_row_5(policy_chosen_logps, policy_rejected_logps, rows):
            return policy_rejected_logps - policy_chosen_logps + torch.where(rows == 5, torch.nan, 0.0)

        settings = {"loss_type": "fails_in_row_5", "logging_strategy": "no", "save_strategy": "steps", "save_steps": 1}
        make(folder, train_sampling_strategy="sequential", **settings).train()


SAME = [
    (evaluate_first, train_alone),
    (predict_first, train_alone),
    (evaluate_twice_before_an_adapter, adapter_alone),
    (evaluate_first_in_bf16, bf16_alone),
    (train_evaluate_train, train_twice),
]
BROKEN = [
    broken,
    broken_behind_a_warm_up,
    changed_on_one_rank,
    changed_before_a_checkpoint,
    changed_before_the_end,
]
WHEN = {
    changed_before_a_checkpoint: "at the checkpoint of step 2, 1 of",
    changed_before_the_end: "at the end, after step 2, 1 of",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    scenes = dict.fromkeys([scene for pair in SAME for scene in pair] + [*BROKEN, not_finite_on_one_rank])
    return play(list(scenes), tmp_path_factory.mktemp("scenes"))


@functools.cache
def before():
    return weights(tiny_model())


@pytest.mark.parametrize(("scene", "plain"), SAME, ids=lambda scene: scene.__name__)
def test_an_evaluation_before_training_changes_nothing(outcomes, scene, plain):
    """The weights on both ranks are equal, bit for bit, and training has changed them."""
    (first, second), (expected, _) = outcomes[scene.__name__], outcomes[plain.__name__]
    assert isinstance(first, dict), first
    assert largest_difference(first, second) == 0
    assert largest_difference(first, expected) == 0


@pytest.mark.parametrize("scene", [train_alone, evaluate_first, predict_first, train_evaluate_train])
def test_two_processes_do_what_one_does(outcomes, scene, tmp_path):
    expected = scene(tmp_path)
    change = largest_difference(expected, before())
    assert change > 1e-3
    assert largest_difference(outcomes[scene.__name__][0], expected) <= 1e-4 * change


@pytest.mark.parametrize("scene", BROKEN, ids=lambda scene: scene.__name__)
def test_ranks_that_drift_apart_stop_on_every_rank(outcomes, scene):
    for error in outcomes[scene.__name__]:
        assert "RuntimeError" in error and "not the same on all 2 ranks" in error, error
    if scene is changed_on_one_rank:
        assert "after step 1, 1 of" in error and "lm_head.weight" in error
        assert WHEN.get(scene, "") in error
    if scene is broken_behind_a_warm_up:
        assert "after step 2" in error


def test_a_loss_that_is_not_finite_stops_every_rank(outcomes):
    for error in outcomes["not_finite_on_one_rank"]:
        assert "FloatingPointError: step 2: the loss fails_in_row_5 is nan for row 5 of" in error, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_sees_every_change(dtype):
    """The checksum detects a change of one element by one unit in the last place,
    two swapped elements, and the sign of a zero.
    """
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    swapped, nudged, signed = values.clone(), values.clone(), torch.zeros(3, dtype=dtype)
    swapped[0, 0], swapped[6, 10] = values[6, 10], values[0, 0]
    nudged[3, 4] = torch.nextafter(nudged[3, 4], nudged[3, 4] + 1)
    assert not torch.equal(checksum(values), checksum(swapped))
    assert not torch.equal(checksum(values), checksum(nudged))
    assert not torch.equal(checksum(signed), checksum(-signed))
    assert torch.equal(checksum(values), checksum(values.clone().T.contiguous().T))


def test_a_checksum_is_the_same_however_it_is_cut(monkeypatch):
    values = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    whole = checksum(values)
    monkeypatch.setattr(replicas, "_CHUNK", 7)
    assert torch.equal(checksum(values), whole)
