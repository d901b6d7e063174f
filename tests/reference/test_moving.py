"""A moving reference has the weights of the formula, and a resumed run restores them."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import first_batch, logged, make_config, make_trainer, pairs, weights

POLICIES = {
    "full": tiny_model,
    "full, tied": lambda: tiny_model(tie_word_embeddings=True),
    "fresh adapter": lambda: with_lora(tiny_model()),
    "trained adapter": lambda: perturbed(with_lora(tiny_model())),
    "adapter and modules_to_save": lambda: with_lora(tiny_model(), modules_to_save=["lm_head"]),
}
each_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
SOFT = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
HARD = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}


class Watch(TrainerCallback):
    """A callback that records the policy's trained weights after every step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.after.append({name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad})


@each_policy
def test_the_reference_is_the_mixture(make, tmp_path):
    """Six steps with updates after 2, 4 and 6: θ_ref = .3·θ_6 + .7·(.3·θ_4 + .7·(.3·θ_2 + .7·θ_0)), in float64.

    Each of three updates rounds in fp32 once or twice: 1e-6 relative to the largest weight.
    """
    model, watch = make(), Watch()
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(tmp_path, model, callbacks=[watch], max_steps=6, **SOFT)
    trainer.train()
    for step in (2, 4, 6):
        for name in expected:
            expected[name] = 0.3 * watch.after[step - 1][name] + 0.7 * expected[name]
    moved = trainer.reference.copies.tensors
    assert moved.keys() == expected.keys()
    for name, tensor in moved.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6 * scale + 1e-12)
    assert any(not torch.equal(tensor.double(), watch.after[-1][name]) for name, tensor in moved.items())


@pytest.mark.parametrize(
    ("make", "layout"),
    [(make, "padded") for make in POLICIES.values()] + [(POLICIES["fresh adapter"], "shared")],
    ids=[*POLICIES, "fresh adapter, shared"],
)
def test_after_a_hard_update_the_loss_is_log_2(make, layout, tmp_path):
    """The reference equals the policy at steps 1, 3 and 5, but not at steps 2 and 4. In evaluations after steps 2 and
    4, all rewards are 0, which would not be so with stored log-probs of the old reference.
    """
    settings = {"max_steps": 5, "eval_dataset": pairs(3), "eval_strategy": "steps", "eval_steps": 1, "layout": layout}
    trainer = make_trainer(tmp_path, make(), **settings, **HARD)
    trainer.train()
    distances = [abs(loss - math.log(2)) for loss in logged(trainer, "loss")]
    # Both layouts run the same forward here, but sums of β·(log-ratio) are rounded: 1e-6, as in other tests.
    assert max(distances[::2]) < 1e-6 and min(distances[1::2]) > 1e-5
    margins = [abs(margin) for margin in logged(trainer, "eval_rewards/margins")]
    assert margins[1] < 1e-5 and margins[3] < 1e-5 and min(margins[0], margins[2]) > 1e-5


@pytest.mark.parametrize(
    ("make", "settings"),
    [(POLICIES["full"], SOFT), (POLICIES["trained adapter"], SOFT), (POLICIES["fresh adapter"], HARD)],
    ids=["full, soft", "trained adapter, soft", "fresh adapter, hard"],
)
def test_a_resumed_run_is_the_uninterrupted_one(make, settings, tmp_path):
    """The run stops after step 3 of 6, between two updates, and a new trainer resumes it: losses, policy and reference
    are bit-equal. The checkpoint contains the moved tensors, and the saved model does not.
    """
    settings = {"train_dataset": pairs(6), "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, **settings}
    whole = make_trainer(tmp_path / "whole", make(), **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = make_trainer(tmp_path / "again", make(), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "loss")[3:] == logged(whole, "loss")[3:]
    final = weights(whole.model)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed.model).items())
    moved = whole.reference.copies.tensors
    assert all(torch.equal(value, moved[name]) for name, value in resumed.reference.copies.tensors.items())
    assert load_file(checkpoint / "moving_reference.safetensors").keys() == moved.keys()
    whole.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("moving*"))


@each_policy
def test_humanline_beside_a_reference_that_is_the_policy(make, tmp_path):
    """With a hard update after every step, all log-ratios are exactly 0, clamped or not, so the loss is log 2. The
    gradient is DPO's, because a ratio of 0 is inside the bounds: the norms of four steps agree up to Adam's
    amplification of rounding in sums of another order.
    """
    steps = {"max_steps": 4, "layout": "padded", **HARD, "ref_model_sync_steps": 1}
    human = make_trainer(tmp_path, make(), humanline=True, **steps)
    human.train()
    assert logged(human, "rewards/chosen") == logged(human, "rewards/rejected") == [0.0] * 4
    assert logged(human, "loss") == pytest.approx([math.log(2)] * 4, rel=1e-6)
    plain = make_trainer(tmp_path, make(), **steps)
    plain.train()
    norms = logged(human, "grad_norm")
    assert min(norms) > 1e-4 and norms == pytest.approx(logged(plain, "grad_norm"), rel=1e-3)


def test_humanline_clamps_between_two_moves(tmp_path):
    """With an update after every second step, the policy is the reference at steps 1 and 3, and bounds of a thousandth
    of a nat have no effect; at steps 2 and 4, they clamp the log-ratio of every token.
    """
    bounds = {"humanline": True, "humanline_log_eps_p": -1e-3, "humanline_log_eps_r": 1e-3}
    settings = {"max_steps": 4, "layout": "padded", "learning_rate": 1e-2, **HARD}
    runs = [make_trainer(tmp_path, tiny_model(), **settings, **given) for given in ({}, bounds)]
    for trainer in runs:
        trainer.train()
    plain, clamped = ([abs(value) for value in logged(trainer, "rewards/chosen")] for trainer in runs)
    assert plain[0] == clamped[0] == clamped[2] == 0
    # β = 0.1 times at most a thousandth of a nat for each of ten tokens and an EOS.
    assert all(0 < value <= 0.1 * 1e-3 * 11 for value in (clamped[1], clamped[3])) and plain[1] > 0.1 * 1e-3 * 11


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, **HARD}
    one = make_trainer(tmp_path, with_lora(tiny_model()), **settings)
    one.train()
    other = make_trainer(tmp_path / "other", with_lora(tiny_model(), target_modules=["q_proj"]), **settings)
    with pytest.raises(ValueError, match=r"differ in \d+ trained tensors"):
        other.scorer.load(tmp_path / "checkpoint-1")


def test_a_move_leaves_the_policy_alone(tmp_path):
    """An update changes no parameter of the policy, but the reference's log-probs."""
    trainer = make_trainer(tmp_path, tiny_model(), **HARD)
    batch, before = first_batch(trainer), weights(trainer.model)
    perturbed(trainer.model)
    policy, scores = weights(trainer.model), trainer.reference.score(batch).token_logps
    trainer.scorer.move_reference(2)
    assert all(torch.equal(value, policy[name]) for name, value in weights(trainer.model).items())
    assert not torch.equal(trainer.reference.score(batch).token_logps, scores)
    assert any(not torch.equal(policy[name], before[name]) for name in policy)
    assert trainer.reference.description == (
        "a copy of the policy that is updated every 2 steps (1.0 × policy + 0 × copy)"
    )


MOVE = {"sync_ref_model": True}
REFUSALS = {
    "no reference": ({**MOVE, "loss_type": "simpo"}, "simpo needs no reference"),
    "reference none": ({**MOVE, "reference": "none"}, "reference='none' is no such copy"),
    "adapter off": ({**MOVE, "reference": "adapter_off"}, "reference='adapter_off' is no such copy"),
    "a named adapter": ({**MOVE, "reference": "adapter:x"}, "reference='adapter:x' is no such copy"),
    "a cache": ({**MOVE, "precompute_ref_log_probs": True}, "caches its scores"),
    "a cache, said otherwise": ({**MOVE, "reference": "cache"}, "caches its scores"),
    "α of 0": ({**MOVE, "ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha=0.0 must be above 0 and at most 1"),
    "α above 1": ({**MOVE, "ref_model_mixup_alpha": 1.1}, "ref_model_mixup_alpha=1.1"),
    "never": ({**MOVE, "ref_model_sync_steps": 0}, "ref_model_sync_steps=0"),
    "α unused": ({"ref_model_mixup_alpha": 0.3}, "only used with sync_ref_model=True"),
    "steps unused": ({"ref_model_sync_steps": 3}, "only used with sync_ref_model=True"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSALS.values(), ids=REFUSALS)
def test_contradictions_are_refused_at_construction(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


def test_a_reference_model_does_not_move(tmp_path):
    with pytest.raises(ValueError, match="not a ref_model"):
        make_trainer(tmp_path, tiny_model(), ref_model=tiny_model(), **MOVE)


def test_an_evaluation_before_resuming_is_forgotten(tmp_path):
    """Evaluations after resuming use the reference of the checkpoint, although an earlier evaluation has stored
    log-probs of the first reference: they equal those of the uninterrupted run.
    """
    settings = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"eval_dataset": pairs(5, seed=3), "learning_rate": 2e-2}
    whole = make_trainer(tmp_path / "whole", tiny_model(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", tiny_model(), **settings)
    resumed.evaluate()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "eval_rewards/margins")[-2:] == logged(whole, "eval_rewards/margins")[-2:]


@pytest.mark.parametrize("make", [POLICIES["full"], POLICIES["trained adapter"]], ids=["full", "adapter"])
def test_the_best_checkpoint_comes_back_with_its_reference(make, tmp_path):
    """An evaluation after training equals the one at the best checkpoint, bit for bit."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    settings |= {"load_best_model_at_end": True, "eval_dataset": pairs(5, seed=3), "learning_rate": 0.3}
    trainer = make_trainer(tmp_path, make(), **{**HARD, "ref_model_sync_steps": 3}, **settings)
    trainer.train()
    measured = logged(trainer, "eval_loss")
    assert measured.index(min(measured)) < 4
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric == min(measured)


@pytest.mark.parametrize(("metric", "warns"), [("loss", True), ("eval_rewards/margins", True), ("logps/chosen", False)])
def test_a_best_checkpoint_by_what_the_reference_moves_is_warned_of(metric, warns, tmp_path, caplog):
    make_trainer(tmp_path, tiny_model(), metric_for_best_model=metric, **HARD)
    assert ("are not comparable" in caplog.text) is warns
