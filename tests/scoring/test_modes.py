"""A model in evaluation mode, and a model without its adapters, for the time of a context."""

from contextlib import nullcontext

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hf_prefopt.scoring.modes import adapter_casts_off, adapters_off, all_modules, evaluation_mode
from tests.tiny_models import perturbed, tiny_model

TARGETS = ["q_proj", "v_proj"]
ADAPTERS = {
    "LoRA": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "DoRA": LoraConfig(target_modules=TARGETS, use_dora=True),
    "modules_to_save": LoraConfig(target_modules=TARGETS, modules_to_save=["lm_head"]),
    "trainable tokens": LoraConfig(target_modules=TARGETS, trainable_token_indices=[3, 4]),
    "IA3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "LoHa": LoHaConfig(target_modules=TARGETS),
    "OFT": OFTConfig(target_modules=TARGETS, oft_block_size=8, r=0),
    "VeRA": VeraConfig(target_modules=TARGETS),
    "layer norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "soft prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "adaption prompts": AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
}
IDS = torch.arange(5, 17)[None]


def adapted(name: str) -> PeftModel:
    torch.manual_seed(0)
    return perturbed(get_peft_model(tiny_model(), ADAPTERS[name]), scale=0.3).eval()


def state(model) -> list:
    flags = [(m.training, getattr(m, "_disable_adapters", None)) for m in model.modules()]
    return [flags, {name: p.requires_grad for name, p in model.named_parameters()}]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_off_is_pefts_own_switch(name):
    """Bit for bit, away from the adapted model; and everything is as it was behind it, also after an error."""
    model = adapted(name)
    with torch.no_grad():
        before = model(IDS).logits
        with model.disable_adapter():
            expected = model(IDS).logits
        untouched = state(model)
        with adapters_off(model):
            assert torch.equal(model(IDS).logits, expected)
        assert not torch.equal(before, expected)
        assert state(model) == untouched and torch.equal(model(IDS).logits, before)
        with pytest.raises(KeyError), adapters_off(model):
            raise KeyError
        assert state(model) == untouched and torch.equal(model(IDS).logits, before)


def test_adapters_that_are_off_stay_off():
    model = adapted("LoRA")
    model.base_model.disable_adapter_layers()
    untouched = state(model)
    with adapters_off(model):
        pass
    assert state(model) == untouched


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "modules_to_save", "LoHa"])
def test_the_common_methods_are_switched_without_pefts_walks(monkeypatch, name):
    """`disable_adapter` asks for the state of every layer, which takes longer than launching a forward."""
    model = adapted(name)
    monkeypatch.setattr(type(model), "get_model_status", lambda self: pytest.fail("walked"))
    with adapters_off(model), torch.no_grad():
        model(IDS)


def test_every_module_has_its_own_mode_again():
    model = adapted("LoRA").train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).eval()
    modes = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes and not frozen.training


def test_all_modules_are_all_modules():
    """A shared module comes for each of its places, a place that is empty does not."""
    model = adapted("modules_to_save")
    model.empty, model.again = None, model.get_input_embeddings()
    model.register_module("nothing", None)
    assert set(all_modules(model)) == set(model.modules())
    assert len(all_modules(model)) == len(set(all_modules(model))) + 1


class Copies(TorchDispatchMode):
    """Counts casts from one dtype to another."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_adapter_casts_off_changes_no_bit(base, checkpointing):
    """Loss and all gradients of an fp32 adapter under bf16 autocast are the same, with fewer casts."""
    model = get_peft_model(tiny_model(dtype=base).train(), ADAPTERS["LoRA"])
    perturbed(model, scale=0.3)
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    results = []
    for context in (nullcontext(), adapter_casts_off(model, autocast=True)):
        with context, Copies() as copies:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(IDS, labels=IDS).loss
            loss.backward()
        results.append(
            (loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], copies.count)
        )
        model.zero_grad()
    (loss, gradients, copies), (found_loss, found_gradients, found_copies) = results
    assert torch.equal(loss, found_loss) and len(gradients) == len(found_gradients) > 10
    assert all(map(torch.equal, gradients, found_gradients))
    assert found_copies < copies
    assert all(m.cast_input_dtype_enabled for m in model.modules() if hasattr(m, "cast_input_dtype_enabled"))


def test_without_autocast_adapters_go_on_casting():
    model = adapted("LoRA")
    with adapter_casts_off(model, autocast=False):
        assert all(m.cast_input_dtype_enabled for m in model.modules() if hasattr(m, "cast_input_dtype_enabled"))
