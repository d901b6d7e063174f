"""In all cases in which TRL 1.16 is right, we agree with it: the loss, every gradient and the metrics of one batch.

The tolerances are 1e-5 for losses, and 1e-4 of the largest entry for the gradient of each parameter. Both sides compute
in fp32, where sums of about 50 nats have a rounding error of 4e-6, and ratios of a few nats have five digits or more.
"""

import pytest

from tests.parity.peers import (
    concatenated_step,
    dpo_step,
    kto_step,
    labeled_rows,
    our_step,
    reference,
    rows,
    tpo_step,
)
from tests.scoring.plain import assert_same_gradients
from tests.trainers import triples

pytest.importorskip("trl")

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)

# Our losses, and TRL's if it has another name or needs other settings.
DPO = {
    "sigmoid": ({"loss_type": "sigmoid"}, {}),
    "sigmoid, beta": ({"loss_type": "sigmoid", "beta": 0.5}, {}),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm", "beta": 5.0}, {}),
    "ipo": ({"loss_type": "ipo", "beta": 0.3}, {}),
    "hinge": ({"loss_type": "hinge", "beta": 0.05}, {}),
    "sigmoid, use_weighting": ({"loss_type": "sigmoid", "use_weighting": True}, {}),
    "sigmoid + hinge": ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.3], "beta": 0.2}, {}),
}


# A log-ratio is a difference of two such sums, for both trainers; the absolute error of r is a relative error of e^r.
OF_AN_EXPONENTIAL = 1e-5 + 4 * 4e-6


def compare(ours, theirs, metrics=METRICS, loss_rtol=1e-5):
    assert ours.loss == pytest.approx(theirs.loss, rel=loss_rtol)
    assert_same_gradients(ours.gradients, theirs.gradients, rtol=1e-4)
    for name in metrics:
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(("ours", "also"), DPO.values(), ids=DPO)
def test_dpo_trainer(ours, also, tmp_path):
    """TRL logs β·(summed log-ratio) for every loss. We do the same, except for
    losses of averages, whose reward here is β·(log-ratio per token).
    """
    averaged = ours["loss_type"] in ("sigmoid_norm", "ipo")
    metrics = METRICS[-2:] if averaged else METRICS
    compare(our_step(tmp_path, ref_model=reference(), **ours), dpo_step(tmp_path, **ours, **also), metrics)


F_DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "alpha_divergence, 0.2": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
    "alpha_divergence, 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
}


# IPO squares exponentials of log-ratios (for all divergences but one), which also amplifies rounding of fp32 sums.
@pytest.mark.parametrize(
    ("loss_type", "divergence"),
    [(loss_type, name) for loss_type in ("sigmoid", "sigmoid_norm", "hinge") for name in F_DIVERGENCES]
    + [("ipo", "js_divergence")],
)
def test_dpo_trainer_with_an_f_divergence(loss_type, divergence, tmp_path):
    """Loss, gradients and log-probs agree; the rewards are β·f′ here and β·(log-ratio) in TRL.

    The Jensen-Shannon divergence's f′ is a log-sigmoid; those of the others are powers of e^r.
    """
    settings = {"loss_type": loss_type, "beta": 0.3, **F_DIVERGENCES[divergence]}
    ours, theirs = our_step(tmp_path, ref_model=reference(), **settings), dpo_step(tmp_path, **settings)
    compare(ours, theirs, METRICS[-2:], 1e-5 if divergence == "js_divergence" else OF_AN_EXPONENTIAL)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "apo_zero"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_dpo_trainer_with_ld_alpha(ld_alpha, loss_type, tmp_path):
    """Loss, gradients and rewards agree; the logged log-probs are the policy's own
    here and the weighted ones in TRL.
    """
    settings = {"loss_type": loss_type, "beta": 0.3, "ld_alpha": ld_alpha}
    compare(our_step(tmp_path, ref_model=reference(), **settings), dpo_step(tmp_path, **settings), METRICS[:4])


def test_dpo_trainer_with_ld_alpha_and_an_f_divergence(tmp_path):
    """The divergence is computed from the weighted log-ratios."""
    settings = {"loss_type": "sigmoid", "ld_alpha": 0.4, "f_divergence_type": "js_divergence"}
    compare(our_step(tmp_path, ref_model=reference(), **settings), dpo_step(tmp_path, **settings), ())


@pytest.mark.parametrize("weights", [None, [1.0, 0.25]])
def test_dpo_trainer_with_sft(weights, tmp_path):
    """On a single pair, TRL's mean over tokens and our mean over examples are equal for ["sigmoid", "sft"]."""
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": weights, "beta": 0.2}
    one = rows(1)
    compare(our_step(tmp_path, one, ref_model=reference(), **settings), dpo_step(tmp_path, one, **settings))


def test_dpo_trainer_with_sft_alone(tmp_path):
    """The loss is the NLL of the chosen response. It has no rewards, so we log none."""
    one = rows(1)
    compare(our_step(tmp_path, one, loss_type="sft"), dpo_step(tmp_path, one, loss_type=["sft"]), METRICS[-2:])


def test_dpo_trainer_with_an_adapter(tmp_path):
    """With a fresh adapter, the loss is log 2, and the gradients of all LoRA matrices with a gradient agree."""
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = dpo_step_with_adapter(tmp_path, adapter)
    ours = our_step_with_adapter(tmp_path, adapter)
    compare(ours, theirs)


def dpo_step_with_adapter(folder, adapter):
    from tests.parity.peers import dpo_trainer, step_of, trl_rows

    trainer = dpo_trainer(folder, peft_config=adapter)
    trainer.model.train()
    step = step_of(trainer.compute_loss(trainer.model, trainer.data_collator(trl_rows(rows()))), trainer.model, {})
    step.metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return step


def our_step_with_adapter(folder, adapter):
    from peft import get_peft_model
    from transformers import set_seed

    from tests.parity.peers import policy

    base = policy()
    set_seed(42)  # TRL's default seed, which TRL sets before it creates the adapter
    return our_step(folder, model=get_peft_model(base, adapter), reference="adapter_off")


CPO = {
    "cpo": ({"loss_type": "cpo"}, {"loss_type": "sigmoid"}),
    "cpo, alpha": ({"loss_type": "cpo", "loss_params": {"cpo_alpha": 0.3}}, {"loss_type": "sigmoid", "cpo_alpha": 0.3}),
    "cpo, smoothed": ({"loss_type": "cpo", "label_smoothing": 0.2}, {"loss_type": "sigmoid", "label_smoothing": 0.2}),
    "hinge": (
        {"loss_type": "hinge", "beta": 0.1, "reference_free": True, "sft_weight": 1.0},
        {"loss_type": "hinge", "beta": 0.1},
    ),
    "ipo": ({"loss_type": "ipo", "reference_free": True, "sft_weight": 1.0}, {"loss_type": "ipo"}),
    "simpo": (
        {"loss_type": "simpo", "beta": 2.0, "loss_params": {"gamma": 1.2}},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2, "cpo_alpha": 0.0},
    ),
    "simpo, smoothed": (
        {"loss_type": "simpo", "beta": 2.0, "loss_params": {"gamma": 0.5}, "label_smoothing": 0.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0, "label_smoothing": 0.1},
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), CPO.values(), ids=CPO)
def test_cpo_trainer(ours, theirs, tmp_path):
    """There is one pair, because the NLL is a mean over the batch's tokens. For
    averaged losses, the logps are per token.
    """
    one = rows(1)
    averaged = theirs["loss_type"] in ("ipo", "simpo")
    metrics = METRICS[:4] if averaged else METRICS
    compare(our_step(tmp_path, one, **ours), concatenated_step("cpo", tmp_path, one, **theirs), metrics)


@pytest.mark.parametrize("name", ["simpo"])
def test_cpo_trainer_on_three_pairs(name, tmp_path):
    """Without an NLL, the batch size has no effect."""
    ours, theirs = CPO[name]
    compare(our_step(tmp_path, **ours), concatenated_step("cpo", tmp_path, **theirs), METRICS[:4])


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_orpo_trainer(beta, tmp_path):
    """TRL's NLL includes the prompt. A prompt of one token is not predicted, so the NLL then equals ours."""
    one = [{**rows(1)[0], "prompt_ids": [7]}]
    ours = our_step(tmp_path, one, loss_type="orpo", beta=beta)
    theirs = concatenated_step("orpo", tmp_path, one, beta=beta)
    compare(ours, theirs, METRICS[:4])
    assert ours.metrics["loss/orpo_nll"] == pytest.approx(theirs.metrics["nll_loss"], rel=1e-5)
    assert ours.metrics["loss/orpo_log_odds_ratio"] == pytest.approx(theirs.metrics["log_odds_chosen"], rel=1e-5)


TPO = {
    "tpo": ({"loss_type": "tpo"}, {}),
    "tpo, alpha": ({"loss_type": "tpo", "beta": 0.4, "loss_params": {"tpo_alpha": 0.3}}, {"tpo_alpha": 0.3}),
    "tpo, smoothed": ({"loss_type": "tpo", "beta": 0.4, "label_smoothing": 0.2}, {}),
    "tpo-l": ({"loss_type": "tpo-l"}, {}),
    "tpo-l, margin": ({"loss_type": "tpo-l", "beta": 2.0, "loss_params": {"gamma": 1.1}}, {"tpo_l_gamma": 1.1}),
}


@pytest.mark.parametrize(("ours", "also"), TPO.values(), ids=TPO)
def test_tpo_trainer(ours, also, tmp_path):
    """There is one triple, because the NLL is a mean over the batch's tokens. The
    log-probs logged for TPO-L are per token.
    """
    one = [*triples(1, seed=5)]
    plain = {name: value for name, value in ours.items() if name not in ("loss_type", "loss_params")}
    their_name = "sigmoid" if ours["loss_type"] == "tpo" else "tpo-l"
    theirs = tpo_step(tmp_path, one, loss_type=their_name, **plain, **also)
    compare(our_step(tmp_path, one, **ours), theirs, METRICS[:4] if ours["loss_type"] == "tpo-l" else METRICS)


@pytest.mark.parametrize(("ours", "also"), [TPO["tpo-l, margin"]])
def test_tpo_trainer_on_three_triples(ours, also, tmp_path):
    """Without the NLL, the batch size has no effect."""
    three = [*triples(3, seed=5)]
    given = {"loss_type": "tpo-l", "beta": 2.0, "tpo_alpha": 0.0}
    ours = ours | {"loss_params": {"gamma": 1.1, "tpo_alpha": 0.0}}
    compare(our_step(tmp_path, three, **ours), tpo_step(tmp_path, three, **given, **also), METRICS[:4])


KTO = {
    "kto": {"loss_type": "kto"},
    "kto, weights": {"loss_type": "kto", "beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "beta": 0.3},
}
KTO_METRICS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


@pytest.mark.parametrize("labels", [(True, False, True, False, False), (True, True), (False, False)])
@pytest.mark.parametrize("settings", KTO.values(), ids=KTO)
def test_kto_trainer(settings, labels, tmp_path):
    """Both get the same rows and mismatched responses, of both classes or of one. For the whole batch, TRL's z equals
    ours. Both leave out the metrics of a missing class.
    """
    data = labeled_rows(labels, mismatched=settings["loss_type"] == "kto")
    weights = {name: value for name, value in settings.items() if name.endswith("weight")}
    others = {name: value for name, value in settings.items() if name not in weights}
    theirs = kto_step(tmp_path, data, **settings)
    ours = our_step(tmp_path, data, ref_model=reference(), loss_params=weights, **others)
    compare(ours, theirs, [name for name in KTO_METRICS if name in theirs.metrics])
    assert {*KTO_METRICS} & ours.metrics.keys() == {*KTO_METRICS} & theirs.metrics.keys()
    if settings["loss_type"] == "kto":
        assert ours.metrics["loss/kto_kl"] == pytest.approx(theirs.metrics["kl"], rel=1e-5, abs=1e-5)
