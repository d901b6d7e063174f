"""Layers below all trainable weights run once for policy and reference; no bit of a log-prob or a gradient changes."""

import copy
import io
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from hf_prefopt.scoring.forward import base_causal_lm
from hf_prefopt.scoring.switched import Switched, decoder_layers, mixers_of
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import first_batch, logged, make_trainer, pairs, weights

DEPTH = {"num_hidden_layers": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_inner": 64, "n_positions": 256}
QWEN35 = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "mistral": {"sliding_window": 8},
    "phi3": {"pad_token_id": 0},
    "gpt2": GPT2,
    "olmo2": {},
    "bloom": {"n_layer": 4, "n_head": 4},
    "qwen3_5_text": QWEN35,
}


def family(name, **settings):
    return tiny_model(name, **{**DEPTH, **FAMILIES[name], **settings})


def upper_lora(model, layers=(2, 3), **settings):
    """Add trained adapters on some layers."""
    return perturbed(with_lora(model, **{**linear_of(model), "layers_to_transform": list(layers), **settings}), 0.05)


def linear_of(model):
    """Return the modules of PEFT's "all-linear", which PEFT does not accept together with `layers_to_transform`."""
    inside = [
        name.rsplit(".", 1)[-1]
        for layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    return {"target_modules": sorted(set(inside))}


def calls_by_layer(*models):
    """Count how often the mixer of each layer runs in any of the models."""
    counter = Counter()
    for model in set(models):
        for index, layer in enumerate(decoder_layers(base_causal_lm(model))):
            mixers_of(layer)[0].register_forward_hook(lambda *_, index=index: counter.update([index]))
    return counter


def step(trainer, batch):
    """Return the loss and the gradient of each trained parameter for one micro-batch."""
    model = trainer.model.train()
    model.zero_grad()
    torch.manual_seed(0)
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(2))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(trainer, count):
    """Check that a step with shared layers equals the step without, bit for bit, and runs each lower layer once."""
    trainer.scorer.settle()
    assert trainer.reference.lower is not None and trainer.reference.lower.count == count
    batch = first_batch(trainer)
    counter = calls_by_layer(trainer.model, trainer.reference.model)
    loss, gradients = step(trainer, batch)
    depth, once = max(counter) + 1, dict(counter)
    trainer.reference.lower = None
    counter.clear()
    whole_loss, whole_gradients = step(trainer, batch)
    assert gradients and gradients.keys() == whole_gradients.keys()
    assert torch.equal(loss, whole_loss) and loss.item() != pytest.approx(0.6931472, abs=1e-6)
    assert all(torch.equal(gradient, whole_gradients[name]) for name, gradient in gradients.items())
    assert set(counter.values()) == {2}
    assert once == {layer: 1 if layer < count else 2 for layer in range(depth)}


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_bit_changes(name, layout, tmp_path):
    """Losses and gradients in float32 of eleven families, in the layout that each uses, and padded."""
    trainer = make_trainer(tmp_path, upper_lora(family(name)), reference="adapter_off", layout=layout)
    assert_same_bits(trainer, count=2)


def upper_half_trains(model):
    """Train the upper layers, the norm above them, and the head."""
    model.requires_grad_(False)
    for module in (*decoder_layers(model)[2:], model.model.norm, model.lm_head):
        module.requires_grad_(True)
    return model


def with_second_adapter(name, active, **settings):
    """Return a model with a trained adapter on the upper layers, and another trained adapter."""
    model = upper_lora(tiny_model(**DEPTH))
    targets = {"target_modules": ["q_proj", "up_proj"], **settings}
    torch.manual_seed(1)
    model.add_adapter(name, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **targets))
    if active:
        model.base_model.set_adapter(["default", name])
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(".default" in parameter_name)
    return model


def moved_copy(trainer):
    """Change the frozen copy, so that it differs from the policy."""
    perturbed(trainer.model, 0.05, seed=2)
    return trainer


SHARED = {
    "an adapter on the head alone": (
        lambda: perturbed(with_lora(tiny_model(**DEPTH), target_modules=["lm_head"]), 0.05),
        {"reference": "adapter_off"},
        4,
    ),
    "the norm above all layers": (
        lambda: perturbed(
            with_lora(tiny_model(**DEPTH), target_modules=["lm_head"], modules_to_save=["model.norm"]), 0.05
        ),
        {"reference": "adapter_off"},
        4,
    ),
    "the head of an adapter": (
        lambda: upper_lora(tiny_model(**DEPTH), modules_to_save=["lm_head"]),
        {"reference": "adapter_off"},
        2,
    ),
    "names of one layer": (
        lambda: perturbed(with_lora(tiny_model(**DEPTH), target_modules=r".*layers\.3\.mlp\.up_proj"), 0.05),
        {"reference": "adapter_off"},
        3,
    ),
    "dropout of the adapter": (
        lambda: upper_lora(tiny_model(**DEPTH), lora_dropout=0.3),
        {"reference": "adapter_off"},
        2,
    ),
    "checkpoints": (
        lambda: upper_lora(tiny_model(**DEPTH)),
        {"reference": "adapter_off", "gradient_checkpointing": True},
        2,
    ),
    "reentrant checkpoints": (
        lambda: upper_lora(tiny_model(**DEPTH)),
        {
            "reference": "adapter_off",
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        2,
    ),
    "bf16 autocast": (lambda: upper_lora(tiny_model(**DEPTH)), {"reference": "adapter_off", "bf16": True}, 2),
    "experts": (
        lambda: upper_lora(tiny_model("qwen3_moe", **EXPERTS, **DEPTH)),
        {"reference": "adapter_off", "router_aux_loss_coef": 0.0},
        2,
    ),
    "whole predictions": (
        lambda: upper_lora(tiny_model(**DEPTH)),
        {"reference": "adapter_off", "loss_type": "tdpo2"},
        2,
    ),
    "another adapter as reference": (
        lambda: with_second_adapter("reference", False, layers_to_transform=[1, 2, 3]),
        {"reference": "adapter:reference"},
        1,
    ),
    "an adapter that rests below": (lambda: with_second_adapter("rests", False), {"reference": "adapter_off"}, 2),
    "an adapter that acts in both": (lambda: with_second_adapter("acts", True), {"reference": "copy"}, 2),
    "full fine-tuning": (lambda: upper_half_trains(tiny_model(**DEPTH)), {"reference": "copy"}, 2),
    "a copy that follows": (
        lambda: upper_half_trains(tiny_model(**DEPTH)),
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        2,
    ),
    "an equal model of its own": (
        lambda: perturbed(upper_half_trains(tiny_model(**DEPTH)), 0.05),
        {"ref_model": lambda: tiny_model(**DEPTH)},
        2,
    ),
    "a model of its own, equal in one layer": (
        lambda: perturbed(upper_half_trains(tiny_model(**DEPTH)), 0.05),
        {"ref_model": lambda: changed_in_layer_1()},
        1,
    ),
    "a model of its own below an adapter": (
        lambda: upper_lora(tiny_model(**DEPTH)),
        {"ref_model": lambda: tiny_model(**DEPTH)},
        2,
    ),
}


def changed_in_layer_1():
    model = tiny_model(**DEPTH)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.1
    return model


def build(folder, make, settings):
    return make_trainer(folder, make(), **{name: v() if callable(v) else v for name, v in settings.items()})


@pytest.mark.parametrize(("make", "settings", "count"), SHARED.values(), ids=SHARED)
def test_what_is_shared(make, settings, count, tmp_path):
    """The step is bit-equal. Copies of the policy are changed first, so that they differ from it."""
    trainer = build(tmp_path, make, settings)
    is_copy = settings["reference"] == "copy" if "reference" in settings else "sync_ref_model" in settings
    assert_same_bits(moved_copy(trainer) if is_copy else trainer, count)


class InPlaceLayer(LlamaDecoderLayer):
    """A layer that modifies the hidden states that it gets in place."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.add_(super().forward(hidden_states, **kwargs))


class BodyThatLooksBack(LlamaModel):
    """A body that adds the first layer's output, which it has stored, to the last layer's output."""

    def __init__(self, config):
        super().__init__(config)
        self.layers[0].register_forward_hook(lambda module, args, output: vars(self).update(kept=output))
        self.layers[-1].register_forward_hook(lambda module, args, output: output + vars(self).pop("kept"))


def odd_llama(layer=None, body=None):
    """Return a Llama with another class for its layers or its body."""
    model = tiny_model(**DEPTH)
    if layer is not None:
        model.model.layers[2].__class__ = layer
    if body is not None:
        odd = body(model.config).eval()
        odd.load_state_dict(model.model.state_dict())
        model.model = odd
    return model


UNSHARED = {
    "dropout below": (
        lambda: upper_lora(tiny_model(attention_dropout=0.3, **DEPTH)),
        {"reference": "adapter_off", "disable_dropout": False},
        "log-probs would change",
    ),
    "auxiliary loss": (
        lambda: upper_lora(tiny_model("qwen3_moe", **EXPERTS, output_router_logits=True, **DEPTH)),
        {"reference": "adapter_off"},
        "auxiliary loss",
    ),
    "a body that looks back": (
        lambda: upper_lora(odd_llama(body=BodyThatLooksBack)),
        {"reference": "adapter_off"},
        "kept",
    ),
    "a layer that changes what it gets": (
        lambda: upper_lora(odd_llama(layer=InPlaceLayer), layers=(2,)),
        {"reference": "adapter_off", "layout": "padded"},
        "changes its input in place",
    ),
    "adapters on the embeddings": (
        lambda: with_lora(tiny_model(num_hidden_layers=4), target_modules=["embed_tokens", "lm_head"]),
        {},
        "(Embedding)",
    ),
    "a head that is the embeddings": (
        lambda: frozen_but(tiny_model(tie_word_embeddings=True, **DEPTH), "lm_head"),
        {"reference": "copy"},
        "(Embedding)",
    ),
}


def frozen_but(model, name):
    model.requires_grad_(False).get_submodule(name).requires_grad_(True)
    return model


@pytest.mark.parametrize(("make", "settings", "reason"), UNSHARED.values(), ids=UNSHARED)
def test_what_cannot_be_shared_is_said(make, settings, reason, tmp_path):
    """The start summary has the reason, and the run equals one without sharing."""
    trainer = build(tmp_path, make, settings)
    trainer.scorer.settle()
    assert trainer.reference.lower is None
    assert " of 4 run twice" in trainer.summary.as_dict()["reference"]
    assert reason in trainer.summary.as_dict()["reference"]
    assert not any(isinstance(layer, Switched) for layer in decoder_layers(base_causal_lm(trainer.model)))
    trainer.train()


NOTHING = {
    "adapters on every layer": (lambda: with_lora(tiny_model(**DEPTH)), {}),
    "a layer below": (lambda: frozen_but(tiny_model(**DEPTH), "model.layers.0.mlp"), {"reference": "copy"}),
    "cached": (lambda: upper_lora(tiny_model(**DEPTH)), {"reference": "adapter_off", "precompute_ref_log_probs": True}),
    "no reference": (lambda: upper_lora(tiny_model(**DEPTH)), {"loss_type": "simpo"}),
    "another model": (
        lambda: upper_lora(tiny_model(**DEPTH)),
        {"ref_model": lambda: tiny_model(seed=1, **DEPTH)},
    ),
    "another configuration": (
        lambda: upper_lora(tiny_model(**DEPTH)),
        {"ref_model": lambda: tiny_model(rms_norm_eps=1e-3, **DEPTH)},
    ),
}


@pytest.mark.parametrize(("make", "settings"), NOTHING.values(), ids=NOTHING)
def test_where_there_is_nothing_to_share_nothing_is_said(make, settings, tmp_path):
    """No layer is switched, and the start summary does not mention lower layers."""
    if "precompute_ref_log_probs" in settings:
        settings = {**settings, "reference_cache_dir": str(tmp_path / "cache")}
    trainer = build(tmp_path, make, settings)
    trainer.scorer.settle()
    assert getattr(trainer.reference, "lower", None) is None
    assert "layer" not in trainer.summary.as_dict()["reference"]


def test_an_adapter_merged_below_is_no_reference_layer(tmp_path):
    """Disabling an adapter also removes merged weights, so a layer with a merged
    adapter differs from the reference's.
    """
    model = with_second_adapter("merged", True)
    model.base_model.merge_adapter(["merged"])
    trainer = make_trainer(tmp_path, model, reference="adapter_off")
    trainer.scorer.settle()
    assert trainer.reference.lower is None


def runs(folder, **settings):
    """Return logs and weights of two runs of one model: with shared lower layers, and without."""
    for name in ("shared", "whole"):
        trainer = make_trainer(folder / name, upper_lora(tiny_model(**DEPTH)), reference="adapter_off", **settings)
        trainer.scorer.settle()
        assert trainer.reference.lower is not None
        if name == "whole":
            trainer.reference.lower = None
        trainer.train()
        yield trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": lambda: pairs(5, seed=3)},
        {"loss_type": "kto", "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 60, "per_device_train_batch_size": 4},
        {"loss_type": "aot"},
    ],
    ids=["evaluations", "statistics of the step", "pieces", "sorted batch"],
)
def test_whole_runs_are_equal(settings, tmp_path):
    """Every logged loss and evaluation, and all final weights, are equal, bit for bit."""
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    shared, whole = runs(tmp_path, **settings)
    assert logged(shared, "loss") == logged(whole, "loss") and logged(shared, "eval_loss") == logged(whole, "eval_loss")
    expected = weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(shared.model).items())


def test_what_begins_to_train_below_is_run(tmp_path):
    """If a callback unfreezes a layer in the middle of a run, the layer gets its gradient."""
    trainer = make_trainer(tmp_path, upper_half_trains(tiny_model(**DEPTH)), reference="copy")
    trainer.scorer.settle()
    batch = first_batch(trainer)
    assert trainer.reference.score(batch).lower_states is not None
    trainer.model.model.layers[1].requires_grad_(True)
    assert trainer.reference.score(batch).lower_states is None
    _, gradients = step(trainer, batch)
    assert gradients["model.layers.1.mlp.up_proj.weight"].abs().max() > 0


def test_the_model_is_its_own_again(tmp_path):
    """A copy and a pickled model have the plain classes; another trainer finds its own layers."""
    model = upper_lora(tiny_model("qwen3_5_text", **DEPTH, **QWEN35))
    trainer = make_trainer(tmp_path / "first", model, reference="adapter_off")
    trainer.scorer.settle()
    assert trainer.layout == "around" and isinstance(decoder_layers(base_causal_lm(model))[0], Switched)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not any(isinstance(module, Switched) for module in other.modules())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and ".layers.3." in name)
    second = make_trainer(tmp_path / "second", model, reference="copy", layout="padded")
    moved_copy(second)
    assert_same_bits(second, count=3)


@pytest.mark.parametrize("other", [{"loss_type": "simpo"}, {"reference": "copy"}], ids=["no reference", "other layers"])
def test_another_trainer_of_the_same_model_changes_nothing(other, tmp_path):
    """The other trainer prepares the model for itself. The steps of the first one
    then run all layers, or its shared ones.
    """
    model = upper_lora(tiny_model(**DEPTH))
    trainer = make_trainer(tmp_path / "first", model, reference="adapter_off")
    trainer.scorer.settle()
    batch = first_batch(trainer)
    loss, gradients = step(trainer, batch)
    of_layer_2 = [p for name, p in model.named_parameters() if "lora" in name and ".layers.2." in name]
    for parameter in of_layer_2:
        parameter.requires_grad_(False)
    second = make_trainer(tmp_path / "second", model, **other)
    second.scorer.settle()
    assert other != {"reference": "copy"} or second.reference.lower.count == 3
    for parameter in of_layer_2:
        parameter.requires_grad_(True)
    again, others = step(trainer, batch)
    assert torch.equal(loss, again) and all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_reference_scores_that_are_kept_keep_no_hidden_states(tmp_path):
    """No hidden states are stored with the log-probs of a step that are collected
    first, or with those of evaluation rows.
    """
    trainer = make_trainer(tmp_path, upper_lora(tiny_model(**DEPTH)), reference="adapter_off", loss_type="kto")
    trainer.scorer.settle()
    batch = first_batch(trainer)
    trainer.scorer.collect(batch)
    assert batch["reference_scores"].lower_states is None
