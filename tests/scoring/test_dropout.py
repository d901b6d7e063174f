"""Dropout is disabled where it should be, for every way in which models define a rate, and kept where it was chosen."""

import copy
import math
import pickle

import pytest
import torch
from peft import LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_prefopt.scoring.agreement import training_noise
from hf_prefopt.scoring.dropout import ConfigWithoutDropout, switch_off_dropout
from hf_prefopt.scoring.forward import install_scoring
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
# In modules (GPT-2, GPT-NeoX, Bloom), in functional calls (Llama, OPT, Seed-OSS), read from the config in each forward
# (Falcon, Persimmon), skipped layers (OPT, BioGPT), rates with other names (CTRL, CodeGen).
FAMILIES = {
    "llama": {"attention_dropout": 0.3},
    "seed_oss": {"attention_dropout": 0.3, "residual_dropout": 0.3},
    "gpt2": {**GPT2, "attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3},
    "gpt_neox": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "bloom": {"n_layer": 2, "n_head": 4, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
    "persimmon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "biogpt": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "layerdrop": 0.3},
    "ctrl": {"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
}
each_family = pytest.mark.parametrize("family", [*FAMILIES, "falcon"])


def noisy_model(family):
    """Return a model whose config sets all dropout rates of its architecture to 0.3."""
    if family == "falcon":  # the config computes head_dim
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
        config = AutoConfig.for_model("falcon", **sizes, attention_dropout=0.3, hidden_dropout=0.3)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return tiny_model(family, **FAMILIES[family])


def logits(model, training):
    torch.manual_seed(3)
    with torch.no_grad():
        return model.train(training)(input_ids=torch.arange(5, 45).view(2, 20)).logits


@each_family
def test_training_mode_is_evaluation_mode_without_dropout(family):
    """Without dropout, training and evaluation mode are equal, bit for bit; with the original rates, they differ."""
    model = noisy_model(family)
    evaluated = logits(model, training=False)
    assert not torch.equal(logits(model, training=True), evaluated)
    (said,) = switch_off_dropout(model, None)
    assert torch.equal(logits(model, training=True), evaluated)
    assert said.startswith("dropout off: ") and "0.3" in said


@each_family
def test_a_saved_model_keeps_its_rates(family, tmp_path):
    model = noisy_model(family)
    before = model.config.to_dict()
    switch_off_dropout(model, None)
    model.save_pretrained(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    rates = {name: rate for name, rate in before.items() if "drop" in name}
    assert 0.3 in rates.values()
    assert {name: after[name] for name in rates} == rates


@each_family
def test_the_first_loss_is_log_two_by_default(family, tmp_path):
    """The margins are zero up to 1e-5, the fp32 rounding of sums of about 100 nats;
    the loss then differs by 0.05 · 1e-5.
    """
    losses = {}
    for setting in (None, False):
        trainer = make_trainer(
            tmp_path / str(setting), noisy_model(family), disable_dropout=setting, train_dataset=pairs(2), max_steps=1
        )
        trainer.train()
        losses[setting] = logged(trainer, "loss")[0]
    assert losses[None] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[False] - math.log(2)) > 1e-3


ADAPTERS = {
    "LoRA": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.4, task_type="CAUSAL_LM"),
    "LoKr, rank": LoKrConfig(r=4, target_modules=["q_proj", "up_proj"], rank_dropout=0.4),
    "LoKr, module": LoKrConfig(r=4, target_modules=["q_proj", "up_proj"], module_dropout=0.4),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=0.4),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("setting", [None, True, False])
def test_an_adapters_dropout_stays_unless_all_is_switched_off(adapter, setting):
    torch.manual_seed(0)
    model = perturbed(get_peft_model(tiny_model(attention_dropout=0.3), ADAPTERS[adapter]), scale=0.3)
    with model.disable_adapter():
        base = logits(model, training=False)
    adapted = logits(model, training=False)
    said = switch_off_dropout(model, setting)
    with model.disable_adapter():
        assert torch.equal(logits(model, training=True), base) is (setting is not False)
    assert torch.equal(logits(model, training=True), adapted) is (setting is True)
    off, on = (next((s for s in said if s.startswith(f"dropout {word}")), "") for word in ("off", "on"))
    assert ("attention_dropout 0.3" in off) is (setting is not False)
    assert ("dropout 0.4" in on) is (setting is not True) and ("dropout 0.4" in off) is (setting is True)


def test_a_model_without_dropout_has_nothing_to_say():
    assert switch_off_dropout(with_lora(tiny_model()), None) == []


def test_both_are_said_once_when_training_begins(tmp_path, caplog):
    model = with_lora(tiny_model(attention_dropout=0.3), lora_dropout=0.05)
    make_trainer(tmp_path, model, max_steps=1, train_dataset=pairs(2)).train()
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count("model: dropout off: attention_dropout 0.3") == 1
    assert lines.count("model: dropout on: lora_dropout 0.05") == 1


def test_a_config_without_dropout_is_the_config_in_all_else():
    config = tiny_model(attention_dropout=0.3).config
    view = ConfigWithoutDropout(config)
    view.use_cache = False
    config._attn_implementation = "eager"
    assert isinstance(view, type(config)) and view.hidden_size == config.hidden_size
    assert config.use_cache is False and view._attn_implementation == "eager"
    assert type(pickle.loads(pickle.dumps(view))) is type(config)
    for each in (view, copy.copy(view), copy.deepcopy(view)):
        assert each.attention_dropout == 0.0 and each.get_text_config().vocab_size == config.vocab_size
    assert config.attention_dropout == 0.3


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_a_routers_jitter_is_noticed(jitter, tmp_path, caplog):
    """Mixtral multiplies the router's input by noise in training, without a dropout rate."""
    model = tiny_model("mixtral", num_local_experts=4, router_jitter_noise=jitter)
    install_scoring(model)
    state = torch.random.get_rng_state()
    noise = training_noise(model.train())
    assert torch.equal(state, torch.random.get_rng_state()) and model.training
    assert (noise > 1e-3) is (jitter > 0) and (noise == 0) is (jitter == 0)
    make_trainer(tmp_path, model, max_steps=1, train_dataset=pairs(2)).train()
    warned = [record for record in caplog.records if "gives different results in training mode" in record.getMessage()]
    assert len(warned) == (jitter > 0)
