"""A step's loss is the mean over the examples of the global batch, and an evaluation is the mean over the rows.

This holds for any micro-batches, padding and logging. The runs are in float64 with plain
gradient descent, whose steps are linear in the gradient: Adam would turn the sign of a rounding
error into a full step. transformers computes norms inside the models in fp32, row by row.
"""

import pytest
import torch
from datasets import Dataset

from hf_prefopt.losses import list_losses
from hf_prefopt.objective.objective import loss_inputs
from hf_prefopt.scoring.forward import VOCABULARY_KL, score
from tests.tiny_models import perturbed, random_rows, tiny_model
from tests.trainers import examples, first_batch, logged, make_config, make_trainer, pairs, values_read, weights

# Every loss, and some combinations of losses.
OBJECTIVES = {
    **{name: {"loss_type": name} for name in list_losses()},
    # Squared losses with targets 1/(2β), which are 500 nats by default: three steps of plain descent would diverge.
    **{name: {"loss_type": name, "beta": 0.1} for name in ("sppo_hard", "cal_dpo", "sppo")},
    "with sft_weight": {"loss_type": "dpo", "sft_weight": 0.5},
    "with use_weighting": {"loss_type": "hinge", "use_weighting": True},
    "several losses": {"loss_type": ["dpo", "kto_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "a pair's loss beside a triple's": {"loss_type": ["tpo", "dpo"], "loss_weights": [1.0, 0.5], "sft_weight": 0.2},
    "dpo_shift, λ with the step": {"loss_type": "dpo_shift", "loss_params": {"lambda_coef": 0.9, "lambda_end": 0.1}},
    "reference-free": {"loss_type": "ipo", "reference_free": True},
    "f_divergence": {"loss_type": ["dpo", "sft"], "f_divergence_type": "js_divergence"},
    "modified tokens": {"loss_type": "kto_pair", "humanline": True, "ld_alpha": 0.3, "use_token_weights": True},
    "humanline": {"loss_type": "kto", "humanline": True},
}
# One loss of each kind that the trainer treats differently.
KINDS = {
    name: OBJECTIVES[name]
    for name in (
        *("dpo", "sft", "kto_pair", "with use_weighting", "several losses", "kto", "bco", "plackett_luce"),
        *("sampo", "tdpo2", "mallows_dpo", "modified tokens", "tpo"),
    )
}
each_kind = pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
DESCENT = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def off_reference(objective):
    """Return a policy that differs by about half a nat from its reference, if the loss has a reference."""
    model = perturbed(tiny_model(dtype=torch.float64), scale=0.05)
    needed = make_config("unused", **objective).build_objective().needs_reference_model
    return model, {"ref_model": tiny_model(dtype=torch.float64)} if needed else {}


def rows_for(objective, count):
    return examples(make_config("unused", **objective).build_objective(), count)


def run(folder, objective, batch_size, accumulation, **settings):
    model, reference = off_reference(objective)
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(folder, model, **reference, **objective, **{**DESCENT, **sizes, **settings})
    before = weights(trainer.model)
    trainer.train()
    change = {name: value - before[name] for name, value in weights(trainer.model).items()}
    return trainer, change


def assert_same_change(actual, expected, tolerance):
    for name, change in expected.items():
        torch.testing.assert_close(actual[name], change, rtol=0, atol=tolerance * change.abs().max().item() + 1e-300)


@pytest.mark.parametrize(
    ("objective", "layout"),
    [(objective, "padded") for objective in OBJECTIVES.values()] + [(kind, "shared") for kind in KINDS.values()],
    ids=[*OBJECTIVES, *(f"{name}, shared" for name in KINDS)],
)
def test_a_step_is_the_gradient_of_the_mean_over_its_examples(objective, layout, tmp_path):
    """There are eight micro-batches of one pair, in both layouts. At learning rate 1,
    the change of the weights is minus the gradient (by autograd) of the objective's
    mean over the eight pairs, scored at once and padded. The logged loss is this mean.

    For "padded", the same sums are rounded in float64: 1e-10. The other layout adds attention in another order, and
    this may change a rounding of the fp32 norms by about 1e-7; the tolerance is 1e-6.
    """
    trainer, change = run(tmp_path, objective, 1, 8, max_steps=1, layout=layout)
    model, _ = off_reference(objective)
    fresh = make_trainer(tmp_path, model, **off_reference(objective)[1], **objective, per_device_train_batch_size=8)
    batch = first_batch(fresh)
    reference = fresh.reference.score(batch, fresh.criterion.reference_token_stats) if fresh.reference else None
    compared = VOCABULARY_KL in fresh.criterion.token_stats
    predictions = fresh.reference.predictions(reference) if compared else None
    policy = score(model, batch, fresh.criterion.token_stats, predictions)
    inputs = loss_inputs(fresh.criterion.inputs, batch, policy, reference)
    fresh.criterion.update_state(inputs)
    loss = fresh.criterion(inputs).losses.mean()
    gradients = dict(zip(change, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    tolerance = {"padded": 1e-10, "shared": 1e-6}[layout]
    assert_same_change({name: -value for name, value in change.items()}, gradients, tolerance)
    # The Trainer's running loss is in fp32.
    assert logged(trainer, "loss") == pytest.approx([loss.item()], rel=1e-6)


@pytest.mark.parametrize(
    "objective",
    [pytest.param(o, marks=() if n in KINDS else pytest.mark.nightly, id=n) for n, o in OBJECTIVES.items()],
)
def test_accumulation_changes_nothing(objective, tmp_path):
    """1×8 = 8×1 over 12 pairs, and the last step has only four pairs: weights,
    losses and metrics of both steps are compared.

    The gradient is clipped to norm 1, because the squares of some losses would make
    the first step so large that the second one amplifies every rounding.
    """
    settings = {"train_dataset": rows_for(objective, 12), "learning_rate": 0.01, "max_grad_norm": 1.0}
    whole, expected = run(tmp_path, objective, 8, 1, **settings)
    split, change = run(tmp_path, objective, 1, 8, **settings)
    assert_same_change(change, expected, 1e-9)
    assert len(logged(whole, "loss")) == 2
    for name in {name for entry in whole.state.log_history for name in entry if "/" in name or name == "loss"}:
        assert logged(split, name) == pytest.approx(logged(whole, name), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("objective", ["dpo", "kto_pair", "simpo"])  # the last one divides by lengths
@pytest.mark.parametrize(
    ("other", "tolerance"), [({"layout": "padded", "pad_to_multiple_of": 64}, 1e-9), ({"layout": "shared"}, 1e-6)]
)
def test_padding_changes_nothing(objective, other, tolerance, tmp_path):
    """Runs with rows padded to multiples of 64, or without padding, end with the same weights."""
    settings = {"train_dataset": pairs(12), "learning_rate": 0.01}
    _, expected = run(tmp_path, OBJECTIVES[objective], 4, 2, **settings, layout="padded")
    _, change = run(tmp_path, OBJECTIVES[objective], 4, 2, **settings, **other)
    assert_same_change(change, expected, tolerance)


@each_objective
def test_evaluation_is_of_the_rows(objective, tmp_path):
    """Seven rows in batches of 1, 2 and 3 have the loss and metrics of all seven at once, which are the objective's on
    all rows. A mean of batch means would give the last row another weight.
    """
    model, reference = off_reference(objective)
    trainer = make_trainer(tmp_path, model, **reference, **objective, eval_dataset=rows_for(objective, 7))
    results = []
    for size in (7, 1, 2, 3):
        trainer.args.per_device_eval_batch_size = size
        results.append({k: v for k, v in trainer.evaluate().items() if "/" in k or k == "eval_loss"})
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-9, abs=1e-9)


def test_evaluation_counts_every_pair_of_a_prompt(tmp_path):
    """A row with responses (a, b, c) and pairs (a, b), (a, c), and a row with one pair, are three examples: the mean of
    the metrics is that of three rows with one pair each.
    """
    first, second = random_rows(2)
    extra = [11, 12, 2]
    group = {**first, "response_ids": [*first["response_ids"], extra], "pairs": [[0, 1], [0, 2]]}
    group["scored_masks"] = [*first["scored_masks"], [1, 1, 1]]
    single = {**first, "response_ids": [first["response_ids"][0], extra], "row": 2}
    single["scored_masks"] = [first["scored_masks"][0], [1, 1, 1]]
    model = perturbed(tiny_model(dtype=torch.float64))
    results = []
    for rows in ([group, second], [first, single, second]):
        trainer = make_trainer(tmp_path, model, ref_model=tiny_model(dtype=torch.float64))
        results.append(trainer.evaluate(Dataset.from_list(rows)))
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-9)


def test_evaluation_counts_rows_that_share_a_number(tmp_path):
    """Two concatenated prepared datasets have each row number twice; every row still counts."""
    one, other = random_rows(3, seed=1), random_rows(3, seed=2)
    trainer = make_trainer(tmp_path, perturbed(tiny_model()), ref_model=tiny_model())
    together = trainer.evaluate(Dataset.from_list(one + other))["eval_loss"]
    apart = [trainer.evaluate(Dataset.from_list(rows))["eval_loss"] for rows in (one, other)]
    assert together == pytest.approx(sum(apart) / 2, rel=1e-5)
    assert abs(apart[0] - apart[1]) > 1e-3


def test_a_tie_is_half_a_win(tmp_path):
    """An untrained policy equals its reference, so all rewards are 0 and the accuracy is 0.5, not 0."""
    trainer = make_trainer(tmp_path, eval_dataset=pairs(5))
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 0.5
    assert metrics["eval_rewards/margins"] == 0.0


def test_logged_metrics_are_means_over_the_examples_since_the_last_log(tmp_path):
    """At learning rate 0, the policy does not change. A log over an epoch of 4 + 4 + 2 pairs has the metrics of an
    evaluation of the ten pairs, and the logs of single steps, weighted 4, 4, 2, give the same.
    """
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "train_dataset": pairs(10)}
    runs = {}
    for steps in (1, 3):
        trainer = make_trainer(
            tmp_path, perturbed(tiny_model()), ref_model=tiny_model(), logging_steps=steps, **settings
        )
        trainer.train()
        runs[steps] = trainer
    evaluation = runs[3].evaluate(pairs(10))
    names = [name for name in runs[3].state.log_history[0] if "/" in name]
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"} <= {*names}
    for name in names:
        (mean,) = logged(runs[3], name)
        assert mean == pytest.approx(evaluation[f"eval_{name}"], rel=1e-5, abs=1e-6)
        if name.startswith("log_ratios/margins_"):
            continue  # quantiles are not means
        by_step = logged(runs[1], name)
        assert sum(w * v for w, v in zip((4, 4, 2), by_step, strict=True)) / 10 == pytest.approx(
            mean, rel=1e-5, abs=1e-6
        )
    assert len(set(logged(runs[1], "logps/chosen"))) == 3


@each_kind
def test_no_step_waits_for_the_device(objective, tmp_path, monkeypatch):
    """Between logs, the package's own code reads no value from a tensor, which would wait for a GPU.

    The layout is "padded", because attention of the other layout runs by segment on a CPU, and in one kernel on a GPU.
    """
    model, reference = off_reference(objective)
    settings = {"logging_steps": 100, "max_steps": 2, "gradient_accumulation_steps": 2, "layout": "padded"}
    trainer = make_trainer(tmp_path, model, **settings, **reference, **objective)
    monkeypatch.setattr(trainer, "log", lambda *_, **__: None)
    trainer.scorer.settle()  # the model is tested once, before the first step
    seen = values_read(monkeypatch)
    trainer.train()
    assert seen == []


def test_predictions_are_of_examples_and_not_of_rows(tmp_path):
    """Five rows of three pairs in batches of two: 15 predictions, and their mean is the metric."""
    rows = [
        {**row, "response_ids": [*row["response_ids"], *other["response_ids"]], "pairs": [[0, 1], [0, 2], [3, 1]]}
        for row, other in zip(random_rows(5, longest=8), random_rows(5, seed=1, longest=8), strict=True)
    ]
    rows = [{**row, "scored_masks": [[1] * len(ids) for ids in row["response_ids"]]} for row in rows]
    seen = []
    trainer = make_trainer(
        tmp_path,
        perturbed(tiny_model(), 0.1),
        ref_model=tiny_model(),
        eval_dataset=Dataset.from_list(rows),
        compute_metrics=lambda found: seen.append(found.predictions) or {},
    )
    metrics = trainer.evaluate()
    assert seen[0].shape == trainer.predict(trainer.eval_dataset).predictions.shape == (15, 2)
    assert seen[0][:, 0].mean() == pytest.approx(metrics["eval_rewards/chosen"], rel=1e-5)
