"""Compare `hf_prefopt.trl` with TRL 1.16's running trainers: the loss, every gradient and every shared metric.

Both get the same settings, with TRL's names; the policy differs by some nats from the reference. The tolerances are
those of test_same_numbers.py. test_dropin_faults.py has the cases in which TRL has an error, with both numbers.
"""

import pytest
import torch
from datasets import Dataset

from tests.parity.peers import (
    QUIET,
    concatenated_step,
    dpo_step,
    kto_step,
    labeled_rows,
    policy,
    reference,
    rows,
    step_of,
    tpo_step,
)
from tests.scoring.plain import assert_same_gradients
from tests.tokenizers import tiny_tokenizer
from tests.trainers import examples, triples

trl = pytest.importorskip("trl")

from hf_prefopt import trl as ours  # noqa: E402

# Metrics of TRL that need a pass over the vocabulary, or that count tokens; they are not computed here.
LEFT_OUT = {"entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"}


def dropin_step(method: str, folder, data: list[dict], ref_model=None, **settings):
    """Return the result of the drop-in trainer on prepared rows, with the `compute_loss` that `train()` calls."""
    config_class, trainer_class = getattr(ours, f"{method}Config"), getattr(ours, f"{method}Trainer")
    args = config_class(output_dir=str(folder), layout="padded", **{**QUIET, **settings})
    given = {"ref_model": ref_model} if ref_model is not None else {}
    trainer = trainer_class(
        policy(),
        args=args,
        train_dataset=examples(args.build_objective()),
        processing_class=tiny_tokenizer(),
        **given,
    )
    (batch,) = trainer.data_collator(data)["pieces"]
    trainer.model.train()
    step = step_of(trainer.compute_loss(trainer.model, batch), trainer.model, {})
    step.metrics = trainer.record.pop_means(trainer.accelerator)
    return step


def assert_same(mine, theirs, loss_rtol=1e-5, other=()):
    """Compare loss, gradients, and all metrics of TRL, except for those that are left out or given as `other`."""
    assert mine.loss == pytest.approx(theirs.loss, rel=loss_rtol)
    assert_same_gradients(mine.gradients, theirs.gradients, rtol=1e-4)
    for name in theirs.metrics.keys() - LEFT_OUT - set(other):
        assert mine.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-5, abs=1e-5), name


def test_the_policy_is_perturbed(tmp_path):
    """The log-ratios in these tests are about 1 nat, so that a wrong β or sign cannot stay undetected."""
    metrics = dpo_step(tmp_path, beta=1.0).metrics
    assert min(abs(metrics["rewards/chosen"]), abs(metrics["rewards/rejected"]), abs(metrics["rewards/margins"])) > 0.5


DPO = {
    **{
        name: {"loss_type": name}
        for name in (
            "sigmoid",
            "hinge",
            "ipo",
            "nca_pair",
            "robust",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sigmoid_norm",
        )
    },
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "robust, smoothed": {"loss_type": "robust", "label_smoothing": 0.2},
    "aot, smoothed": {"loss_type": "aot", "label_smoothing": 0.2},
    "aot_unpaired, smoothed": {"loss_type": "aot_unpaired", "label_smoothing": 0.2},
    "discopop, tau": {"loss_type": "discopop", "discopop_tau": 0.3, "beta": 0.3},
    "several": {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.7, 0.3], "beta": 0.2},
    "ld_alpha": {"loss_type": "sigmoid", "ld_alpha": 0.4, "beta": 0.3},
    "js": {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "js, exo": {"loss_type": "exo_pair", "f_divergence_type": "js_divergence", "label_smoothing": 0.1},
    "js, discopop": {"loss_type": "discopop", "f_divergence_type": "js_divergence"},
    "js, robust": {"loss_type": "robust", "f_divergence_type": "js_divergence", "label_smoothing": 0.1},
    "js, ipo": {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
    "js, sigmoid_norm": {"loss_type": "sigmoid_norm", "f_divergence_type": "js_divergence"},
    "js, hinge": {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
}


@pytest.mark.parametrize("settings", DPO.values(), ids=DPO)
def test_dpo_trainer(settings, tmp_path):
    """Every loss of DPOTrainer is tested, with its default β; `ld_alpha` also weights the logged log-probs."""
    theirs = dpo_step(tmp_path, **settings)
    other = ("logps/chosen", "logps/rejected") if "ld_alpha" in settings else ()
    assert_same(dropin_step("DPO", tmp_path, rows(), reference(), **settings), theirs, other=other)


@pytest.mark.parametrize(
    "settings", [{"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 0.25]}, {"loss_type": ["sft"]}]
)
def test_dpo_trainer_with_sft(settings, tmp_path):
    """There is one pair, for which TRL's mean over the tokens of a micro-batch equals the mean of the pair. `sft` alone
    has no rewards, and the reference is not run.
    """
    one, alone = rows(1), settings["loss_type"] == ["sft"]
    mine = dropin_step("DPO", tmp_path, one, None if alone else reference(), **settings)
    theirs = dpo_step(tmp_path, one, **settings)
    assert_same(mine, theirs, other=[name for name in theirs.metrics if alone and name.startswith("rewards/")])


CPO = {
    **{name: {"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "simpo", "alphapo")},
    "sigmoid, smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.3},
    "hinge, alpha": {"loss_type": "hinge", "cpo_alpha": 0.3, "beta": 0.01},
    "simpo, gamma": {"loss_type": "simpo", "simpo_gamma": 1.2, "beta": 2.0, "cpo_alpha": 0.5, "label_smoothing": 0.1},
    "simpo, no nll": {"loss_type": "simpo", "simpo_gamma": 1.2, "beta": 2.0, "cpo_alpha": 0.0},
    "alphapo, alpha": {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 0.1},
    "simpo, alpha": {"loss_type": "simpo", "alpha": -0.3, "beta": 2.5},
}


@pytest.mark.parametrize("settings", CPO.values(), ids=CPO)
def test_cpo_trainer(settings, tmp_path):
    """There is one pair, because the NLL is a mean over the tokens of a micro-batch.
    Without the NLL, TRL logs 0 for it.
    """
    one = rows(1)
    theirs = concatenated_step("cpo", tmp_path, one, **settings)
    other = ("nll_loss",) if settings.get("cpo_alpha") == 0.0 or settings["loss_type"] == "alphapo" else ()
    assert_same(dropin_step("CPO", tmp_path, one, **settings), theirs, other=other)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_orpo_trainer(beta, tmp_path):
    """TRL's NLL includes the prompt, and so does ours. There is one pair, because it
    is a mean over the tokens of a batch.
    """
    one = rows(1)
    theirs = concatenated_step("orpo", tmp_path, one, beta=beta)
    assert_same(dropin_step("ORPO", tmp_path, one, beta=beta), theirs)


TPO = {
    **{name: {"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "tpo-l")},
    "sigmoid, smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.2, "tpo_alpha": 0.3, "beta": 0.4},
    "hinge, alpha": {"loss_type": "hinge", "tpo_alpha": 0.3},
    "ipo, alpha": {"loss_type": "ipo", "tpo_alpha": 0.3, "beta": 0.4},
    "tpo-l, gamma": {"loss_type": "tpo-l", "tpo_l_gamma": 1.1, "beta": 2.0},
}


@pytest.mark.parametrize("settings", TPO.values(), ids=TPO)
def test_tpo_trainer(settings, tmp_path):
    """There is one triple, because the NLL is a mean over the tokens of a micro-batch."""
    one = [*triples(1, seed=5)]
    assert_same(dropin_step("TPO", tmp_path, one, **settings), tpo_step(tmp_path, one, **settings))


KTO = {
    "kto": {},
    "kto, weights": {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5},
}


@pytest.mark.parametrize("labels", [(True, False, True, False, False), (True, True)])
@pytest.mark.parametrize("settings", KTO.values(), ids=KTO)
def test_kto_trainer(settings, labels, tmp_path):
    """Both get the same rows with the same mismatched responses. If a loss has no kl, TRL logs 0."""
    unmatched = "loss_type" in settings
    data = labeled_rows(labels, mismatched=not unmatched)
    theirs = kto_step(tmp_path, data, **settings)
    mine = dropin_step("KTO", tmp_path, data, reference(), **settings)
    assert_same(mine, theirs, other=("kl",) if unmatched else ())


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_the_nll_of_a_prompt_is_the_models_own(layout, tmp_path):
    """ORPO's NLL on pairs of one and of two prompts is the mean of −log π(x₂…, y)/n,
    from plain logits of each sequence.
    """
    data = rows(3)
    data[1]["prompt_ids"] = data[0]["prompt_ids"]
    args = ours.ORPOConfig(output_dir=str(tmp_path), layout=layout, per_device_eval_batch_size=3, **QUIET)
    trainer = ours.ORPOTrainer(
        policy(), args, None, examples(args.build_objective()), processing_class=tiny_tokenizer()
    )
    logged = trainer.evaluate(Dataset.from_list(data))
    model, expected = policy(), []
    for row in data:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"][0]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        expected.append(-logps.gather(1, ids[0, 1:, None]).mean().item())
    # Sums of about 30 numbers of a few nats in fp32: relative 30 · 2⁻²⁴, rounded up.
    assert logged["eval_nll_loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
