"""KL(π_ref ‖ π) over the vocabulary at every scored token: value, gradient and memory, for every kind of reference.

All tests except those of the trainer are in float64, and compare with all logits at once and autograd.
"""

import copy

import pytest
import torch
from peft import PeftModel

from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.reference.choose import choose_reference
from hf_prefopt.scoring import forward
from hf_prefopt.scoring.attention import install_segment_attention
from hf_prefopt.scoring.forward import base_causal_lm, install_scoring, score
from hf_prefopt.scoring.head import module_head_logps, vocabulary_kl
from tests.scoring.plain import assert_same_gradients, gradients
from tests.scoring.test_head import TRANSFORMS, LargestTensor, direct_logps, head_inputs
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.trainers import first_batch, make_trainer


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("chunk_rows", [1, 2, 64])
def test_the_kl_and_its_gradient_are_those_of_the_formula(transform, chunk_rows):
    """Σ_v q (log q − log p) is computed directly; float64 gradcheck with respect to
    hidden, weight and bias of the policy.
    """
    hidden, weight, bias, targets = head_inputs()
    reference = direct_logps(hidden.flip(0), weight.roll(1, 0), bias, targets, transform)[1]

    def kl(hidden, weight, bias):
        return module_head_logps(
            lambda rows: rows @ weight.T + bias,
            hidden,
            targets,
            transform,
            (),
            chunk_rows,
            lambda rows: reference[rows],
        )[1]

    logps = direct_logps(hidden, weight, bias, targets, transform)[1]
    expected = sum(q.exp() * (q - p) for q, p in zip(reference.T, logps.T, strict=True))
    torch.testing.assert_close(kl(hidden, weight, bias), expected, rtol=1e-12, atol=1e-14)
    assert (expected > 0.01).all()
    assert torch.autograd.gradcheck(kl, [t.requires_grad_() for t in (hidden, weight, bias)])


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match="the sizes are 7 and 8"):
        vocabulary_kl(torch.zeros(2, 7), torch.zeros(2, 8))


def twin(model: PeftModel) -> PeftModel:
    """Return a model with a second adapter with other weights on the same layers; the first one is active."""
    model.add_adapter("before", model.peft_config["default"])
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".before." in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def lora(**settings):
    return lambda: with_lora(tiny_model(dtype=torch.float64), **settings)


def full(model_type="llama", **config):
    return lambda: tiny_model(model_type, dtype=torch.float64, **config)


# How the policy is created, and its reference: a setting, or a separate model.
PAIRS_OF_MODELS = {
    "copy": (full(), "copy"),
    "copy, tied": (full(tie_word_embeddings=True), "copy"),
    "copy, softcap": (full("gemma2", final_logit_softcapping=5.0, attn_implementation="eager"), "copy"),
    "another model": (full(), full(seed=3, hidden_size=24, tie_word_embeddings=True)),
    "adapter off": (lora(), "adapter_off"),
    "adapter off, adapted head": (lora(target_modules=["q_proj", "lm_head"]), "adapter_off"),
    "adapter off, trained head": (lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), "adapter_off"),
    "adapter, copy": (lora(target_modules=["q_proj", "lm_head"]), "copy"),
    "another adapter": (lambda: twin(lora(target_modules=["q_proj", "lm_head"])()), "adapter:before"),
}


def all_predictions(model, rows):
    """Return the log-probs of every token at the scored positions, `[N, V]`, from the model's logits."""
    batch = PaddedCollator(0)(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (logits.flatten(0, 1)[batch["scored_rows"]] / 0.7).log_softmax(-1)


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize(("make", "setting"), PAIRS_OF_MODELS.values(), ids=PAIRS_OF_MODELS)
def test_every_reference_gives_its_kl(make, setting, layout, monkeypatch):
    """The policy has moved away from the reference; both have temperature 0.7. D_t and the gradient of every trained
    parameter equal those of all logits at once. "padded" agrees to float64 rounding; the other layout adds attention in
    another order, which the fp32 norms of the models round to about 1e-6.
    """
    monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", 7)
    model, ref_model = make(), None if isinstance(setting, str) else setting()
    setting = setting if isinstance(setting, str) else "model"
    reference = choose_reference(setting, model, ref_model, needed=True)
    rows = random_rows(2)
    with torch.no_grad(), reference.switch():
        expected_reference = all_predictions(reference.model, rows)
    perturbed(model, scale=0.05)
    logps = all_predictions(model, rows)
    expected = (expected_reference.exp() * (expected_reference - logps)).sum(-1)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    expected_gradients = gradients((expected * weights).sum(), model)

    for module in {model, reference.model}:
        install_scoring(module, temperature=0.7)
        install_segment_attention(base_causal_lm(module))
    batch = {"padded": PaddedCollator(0), "shared": SharedCollator()}[layout](rows)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    scores = reference.score(batch, ("hidden",))
    policy = score(model, batch, ("vocabulary_kl",), reference.predictions(scores))
    divergence = policy.token_stats["vocabulary_kl"]
    tolerance = {"padded": 1e-11, "shared": 1e-5}[layout]
    torch.testing.assert_close(divergence, expected, rtol=tolerance, atol=tolerance * 1e-2)
    assert divergence.max() > 0.01
    assert_same_gradients(gradients((divergence * weights).sum(), model), expected_gradients, rtol=tolerance * 10)
    assert trains == [name for name, p in model.named_parameters() if p.requires_grad]


def test_the_log_probs_beside_it_are_the_same():
    """Computing the KL and other statistics does not change log-probs and their gradients."""
    model = tiny_model(dtype=torch.float64)
    reference = choose_reference("copy", model, None, needed=True)
    install_scoring(perturbed(model))
    batch = PaddedCollator(0)(random_rows(2))
    scores = reference.score(batch, ("hidden", "entropy"))
    plain = score(model, batch, ("entropy",))
    with_kl = score(model, batch, ("entropy", "vocabulary_kl"), reference.predictions(scores))
    torch.testing.assert_close(with_kl.token_logps, plain.token_logps, rtol=1e-13, atol=0)
    torch.testing.assert_close(with_kl.entropy, plain.entropy, rtol=1e-13, atol=0)
    one, other = (gradients(found.logps.sum(), model) for found in (with_kl, plain))
    assert_same_gradients(one, other, rtol=1e-12)


def test_dropout_of_the_policy_is_not_the_references():
    """The policy is in training mode with dropout on an adapted head. Its reference,
    another adapter, predicts the same twice, and is in training mode afterwards.
    """
    model = twin(lora(target_modules=["q_proj", "lm_head"], lora_dropout=0.5)())
    reference = choose_reference("adapter:before", model, None, needed=True)
    install_scoring(model)
    batch = PaddedCollator(0)(random_rows(2))
    model.train()
    predict = reference.predictions(reference.score(batch, ("hidden",)))
    assert torch.equal(predict(slice(0, 5)), predict(slice(0, 5)))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("adapted", [False, True])
def test_no_full_logits_are_held(adapted, monkeypatch):
    """V = 4096, H = 32, chunks of 4, over 60 scored tokens: neither model creates a tensor with more than V·H = 131,072
    elements in forward or backward; N·V is over 245,000.
    """
    monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", 4)
    model = tiny_model(vocab_size=4096)
    model = with_lora(model) if adapted else model
    reference = choose_reference("adapter_off" if adapted else "copy", model, None, needed=True)
    install_scoring(perturbed(model))
    batch = PaddedCollator(0)(random_rows(3))
    with LargestTensor() as largest:
        scores = reference.score(batch, ("hidden",))
        policy = score(model, batch, ("vocabulary_kl",), reference.predictions(scores))
        (policy.logps.sum() + policy.kl.sum()).backward()
    assert len(batch["targets"]) >= 60
    assert largest.elements <= 4096 * 32


def test_the_reference_is_untouched_by_a_step(tmp_path):
    """The frozen copy is swapped in for every chunk, also in the backward pass, under bf16 autocast with its cache of
    casts. Three steps of TDPO do not change the reference's predictions, but the policy's.
    """
    trainer = make_trainer(tmp_path, loss_type="tdpo2", max_steps=3, learning_rate=1e-2, bf16=True)
    batch = first_batch(trainer)

    def scored():
        with torch.autocast("cpu", torch.bfloat16):
            reference = trainer.reference.score(batch, ("hidden",))
            predictions = trainer.reference.predictions(reference)
            return predictions(slice(0, 4)), score(trainer.model, batch, ("vocabulary_kl",), predictions).kl

    before, _ = scored()
    trainer.train()
    after, kl = scored()
    assert torch.equal(after, before)
    assert kl.mean() > 0.01


def test_kl_of_the_untrained_policy_is_zero():
    """For a copy of the policy as reference, the KL is 0 up to rounding, without a gradient, because it is minimal."""
    model = tiny_model(dtype=torch.float64)
    reference = choose_reference("model", model, copy.deepcopy(model), needed=True)
    for module in (model, reference.model):
        install_scoring(module)
    batch = PaddedCollator(0)(random_rows(2))
    policy = score(model, batch, ("vocabulary_kl",), reference.predictions(reference.score(batch, ("hidden",))))
    assert policy.kl.abs().max() < 1e-12
    assert all(g.abs().max() < 1e-10 for g in gradients(policy.kl.sum(), model).values())
