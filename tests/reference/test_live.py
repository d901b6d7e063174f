"""In every mode, the reference is the policy at step 0. It does not change, and checkpoints do not contain it."""

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_prefopt.scoring.forward import score
from tests.tiny_models import QUANTIZABLE, perturbed, tiny_model, with_lora
from tests.trainers import first_batch, logged, make_trainer, pairs, weights


def trained_adapter(**settings) -> PeftModel:
    return perturbed(with_lora(tiny_model(), **settings), scale=0.1)


def with_frozen_twin() -> PeftModel:
    """Return a model with a trained adapter, and a second adapter with the same weights."""
    model = trained_adapter()
    model.add_adapter("before", model.peft_config["default"])
    state = {name: value for name, value in model.state_dict().items() if ".default." in name}
    model.load_state_dict({name.replace(".default.", ".before."): v for name, v in state.items()}, strict=False)
    return model


# How each policy is created, and the settings with which the reference is the policy as passed.
STARTS = {
    "full": (tiny_model, {}),
    "full, modified in memory": (lambda: perturbed(tiny_model(), scale=0.1), {}),
    "full, tied": (lambda: tiny_model(tie_word_embeddings=True), {}),
    "full, partly frozen": (lambda: frozen_embeddings(tiny_model()), {}),
    "full, copy": (tiny_model, {"reference": "copy"}),
    "full, another model": (tiny_model, {"reference": "model", "ref_model": tiny_model}),
    "full, ref_model by itself": (tiny_model, {"ref_model": tiny_model}),
    "fresh adapter": (lambda: with_lora(tiny_model()), {}),
    "fresh adapter, switched off": (lambda: with_lora(tiny_model()), {"reference": "adapter_off"}),
    "fresh adapter, copy": (lambda: with_lora(tiny_model()), {"reference": "copy"}),
    "trained adapter": (trained_adapter, {}),
    "trained adapter, its twin": (with_frozen_twin, {"reference": "adapter:before"}),
    "DoRA": (lambda: with_lora(tiny_model(), use_dora=True), {}),
    "DoRA, trained": (lambda: trained_adapter(use_dora=True), {}),
    "rsLoRA": (lambda: with_lora(tiny_model(), use_rslora=True), {}),
    "PiSSA": (lambda: with_lora(tiny_model(), init_lora_weights="pissa"), {}),
    "random LoRA": (lambda: with_lora(tiny_model(), init_lora_weights=False), {}),
    "trained biases": (lambda: with_lora(tiny_model("qwen2"), bias="lora_only"), {}),
    "LoRA on lm_head": (lambda: with_lora(tiny_model(), target_modules=["q_proj", "lm_head"]), {}),
    "modules_to_save": (lambda: with_lora(tiny_model(), modules_to_save=["lm_head"]), {}),
    "modules_to_save, trained": (lambda: trained_adapter(modules_to_save=["lm_head"]), {}),
    "LoRA dropout": (lambda: with_lora(tiny_model(), lora_dropout=0.3), {"disable_dropout": True}),
    "attention dropout": (lambda: tiny_model(attention_dropout=0.3), {}),
    "adapter over attention dropout": (lambda: with_lora(tiny_model(attention_dropout=0.3)), {}),
    "fresh adapter with dropout": (lambda: with_lora(tiny_model(), lora_dropout=0.3), {}),
}
each_start = pytest.mark.parametrize(("make", "settings"), STARTS.values(), ids=STARTS)


def frozen_embeddings(model):
    model.get_input_embeddings().requires_grad_(False)
    return model


def build(folder, make, settings, **more):
    given = {name: value() if callable(value) else value for name, value in settings.items()}
    return make_trainer(folder, make(), **given, **more)


@each_start
def test_the_first_loss_is_log_two(make, settings, tmp_path):
    """At step 0, π = π_ref, so every margin is 0, and −log σ(0) = log 2 = 0.6931472.

    Both forwards run the same operations, so the margins are zero up to fp32 rounding of sums of about 100 nats: 1e-5,
    which changes the loss by at most β/2 = 0.05 of it.
    """
    trainer = build(tmp_path, make, settings, train_dataset=pairs(2), max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


@each_start
def test_the_reference_stays_what_it_was(make, settings, tmp_path):
    """After three steps at a high learning rate, the policy has changed by nats, and the reference by no bit."""
    trainer = build(tmp_path, make, settings, max_steps=3, learning_rate=1e-2)
    batch = first_batch(trainer)
    before = trainer.reference.score(batch).token_logps
    trainer.train()
    with torch.no_grad():
        moved = (score(trainer.model, batch).token_logps - before).abs().max()
    assert torch.equal(trainer.reference.score(batch).token_logps, before)
    assert moved > 0.1


@pytest.mark.parametrize("name", ["full", "trained adapter", "trained adapter, its twin", "fresh adapter"])
def test_bf16_autocast_does_not_mix_the_two_up(name, tmp_path):
    """Autocast caches the low-precision casts of weights, keyed by parameter object. If the cache survived the swap of
    tensors, one model would use the other's weights. Steps under autocast do not change the reference's log-probs, bit
    for bit. A policy that is scored after the reference, in one context, has its own log-probs.
    """
    trainer = build(tmp_path, *STARTS[name], max_steps=3, learning_rate=1e-2, bf16=True)
    batch = first_batch(trainer)
    with torch.autocast("cpu", torch.bfloat16):
        before = trainer.reference.score(batch).token_logps
    trainer.train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = score(trainer.model, batch).token_logps
    with torch.autocast("cpu", torch.bfloat16):
        policy = score(trainer.model, batch).token_logps
        reference = trainer.reference.score(batch).token_logps
        again = score(trainer.model, batch).token_logps
    assert torch.equal(reference, before)
    assert torch.equal(policy, again)
    assert (policy - reference).abs().max() > 0.1 and torch.allclose(policy, alone)


@pytest.mark.parametrize("name", ["full", "fresh adapter", "trained adapter", "trained adapter, its twin"])
def test_the_reference_has_no_dropout_while_the_policy_has(name, tmp_path):
    """With LoRA and functional attention dropout of 0.3 in training mode, the reference's log-probs are reproducible
    bit for bit, and the policy's are not. Afterwards, every module is in training mode as before.
    """
    make = {
        "full": lambda: tiny_model(attention_dropout=0.3),
        "fresh adapter": lambda: with_lora(tiny_model(attention_dropout=0.3), lora_dropout=0.3),
        "trained adapter": lambda: perturbed(with_lora(tiny_model(attention_dropout=0.3), lora_dropout=0.3)),
        "trained adapter, its twin": with_frozen_twin,
    }[name]
    trainer = make_trainer(tmp_path, make(), disable_dropout=False, **STARTS[name][1])
    if name == "trained adapter, its twin":
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
    batch = first_batch(trainer)
    trainer.model.train()
    frozen = trainer.model.get_submodule(
        next(name for name, _ in trainer.model.named_modules() if name.endswith("mlp"))
    )
    frozen.eval()
    first, second = (trainer.reference.score(batch).token_logps for _ in range(2))
    assert torch.equal(first, second)
    assert trainer.model.training and not frozen.training
    assert not torch.equal(score(trainer.model, batch).token_logps, score(trainer.model, batch).token_logps)


@pytest.mark.parametrize("name", ["full", "trained adapter", "modules_to_save, trained", "full, ref_model by itself"])
def test_nothing_of_the_reference_is_saved(name, tmp_path):
    """Checkpoints and save_model contain exactly the tensors of a model that is saved without a trainer."""
    make, settings = STARTS[name]
    plain = make()
    plain.save_pretrained(tmp_path / "plain")
    trainer = build(tmp_path / "run", make, settings, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = saved_names(tmp_path / "plain")
    assert expected
    assert saved_names(tmp_path / "saved") == expected
    assert saved_names(tmp_path / "run" / "checkpoint-1") == expected


def test_products_of_8_bit_weights_are_one_kernels(tmp_path):
    """bitsandbytes has two kernels on CPUs, one for each mode of a layer: with
    different kernels, the first loss was 0.70.
    """
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    tiny_model(**QUANTIZABLE).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path / "run", model, peft_config=adapter, train_dataset=pairs(4), max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer, "rewards/chosen")[0] == 0.0


def saved_names(folder: Path) -> dict[str, list[str]]:
    """Return the tensors in each safetensors file of a folder and its subfolders."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): sorted(load_file(file)) for file in files}


def test_a_named_adapter_leaves_the_model_as_it_was(tmp_path):
    """After the reference has run, even with an error, the active adapter and the
    trainable parameters are as before.
    """
    trainer = build(tmp_path, *STARTS["trained adapter, its twin"])
    trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.reference.score(first_batch(trainer))
    with pytest.raises(KeyError):
        trainer.reference.score({})
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trains
    assert all(".default." in name for name in trains)
    assert trainer.model.active_adapter == "default"


def with_other_modules() -> PeftModel:
    """Return a model with a trained adapter that has its own head, and an adapter on other modules without a head."""
    model = trained_adapter(modules_to_save=["lm_head"], target_modules=["q_proj", "up_proj"])
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["up_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("before", config)
    return model


@pytest.mark.parametrize("make", [with_frozen_twin, with_other_modules])
def test_a_named_adapter_is_what_peft_makes_of_it(make, tmp_path):
    """The log-probs equal those after `model.set_adapter(name)`, bit for bit, and no `requires_grad` is changed."""
    model = make()
    trainer = make_trainer(tmp_path, model, reference="adapter:before")
    batch = first_batch(trainer)
    with patch.object(nn.Parameter, "requires_grad_", side_effect=AssertionError), torch.no_grad():
        policy = score(model, batch).token_logps
        found = trainer.reference.score(batch).token_logps
        again = score(model, batch).token_logps
    model.set_adapter("before")
    with torch.no_grad():
        assert torch.equal(found, score(model.eval(), batch).token_logps)
    assert torch.equal(policy, again) and torch.equal(policy, found) == (make is with_frozen_twin)


def test_an_explicit_reference_is_that_one(tmp_path):
    """Disabling a trained adapter does not give the policy as passed: the first loss is −log σ(β·margin) of the two
    models, far from log 2, and the reference's log-probs are those of the base model alone.
    """
    trainer = make_trainer(tmp_path, trained_adapter(), reference="adapter_off")
    batch = first_batch(trainer)
    base = make_trainer(tmp_path, tiny_model(), loss_type="sft")
    with torch.no_grad():
        expected = score(base.model, batch).token_logps
    torch.testing.assert_close(trainer.reference.score(batch).token_logps, expected, rtol=1e-6, atol=1e-6)
    trainer.train()
    assert abs(logged(trainer, "loss")[0] - math.log(2)) > 0.01


def test_a_copy_exchanges_tensors_and_no_objects(tmp_path):
    """After the reference has run, the parameters are the same objects with the same storage, which optimizers need."""
    trainer = build(tmp_path, *STARTS["full, tied"])
    before = {name: (id(p), p.data_ptr()) for name, p in trainer.model.named_parameters()}
    values = weights(trainer.model)
    trainer.reference.score(first_batch(trainer))
    assert {name: (id(p), p.data_ptr()) for name, p in trainer.model.named_parameters()} == before
    assert all(torch.equal(p, values[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("evaluates_first", [False, True])
def test_noise_on_embeddings_reaches_the_policy_alone(evaluates_first, tmp_path):
    """The reference gets none. Layers below the adapter run twice, because the policy's get noise, even if the
    evaluation before training, where there is no noise, has found them equal.
    """
    model = with_lora(tiny_model(num_hidden_layers=2), layers_to_transform=[1], target_modules=["q_proj"])
    settings = {"neftune_noise_alpha": 5.0, "reference": "adapter_off", "max_steps": 1, "eval_dataset": pairs(2)}
    trainer, seen = make_trainer(tmp_path, model, **settings), []
    if evaluates_first:
        trainer.evaluate()
    policy_scores = trainer.scorer.policy_scores

    def watched(model, batch, reference):
        policy = policy_scores(model, batch, reference)
        seen.append((batch, policy.token_logps.detach(), reference.token_logps))
        return policy

    trainer.scorer.policy_scores = watched
    trainer.train()
    ((batch, policy, reference),) = seen
    assert torch.equal(reference, trainer.reference.score(batch).token_logps)
    assert (policy - reference).abs().max() > 0.01
    assert "NEFTune adds noise" in trainer.summary.as_dict()["reference"]
