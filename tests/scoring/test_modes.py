"""A model in evaluation mode, and a model without its adapters, inside a context."""

import inspect
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

from hf_prefopt.scoring.modes import (
    _MODELESS,
    ModuleTree,
    adapter_casts_off,
    adapters_off,
    evaluation_mode,
    light_train,
)
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
    """`adapters_off` gives the results of PEFT's `disable_adapter`, bit for bit, and
    restores the state, even after an error.
    """
    model = adapted(name)
    with torch.no_grad():
        before = model(IDS).logits
        with model.disable_adapter():
            expected = model(IDS).logits
        untouched = state(model)
        with adapters_off(ModuleTree(model)):
            assert torch.equal(model(IDS).logits, expected)
        assert not torch.equal(before, expected)
        assert state(model) == untouched and torch.equal(model(IDS).logits, before)
        with pytest.raises(KeyError), adapters_off(ModuleTree(model)):
            raise KeyError
        assert state(model) == untouched and torch.equal(model(IDS).logits, before)


def test_adapters_that_are_off_stay_off():
    model = adapted("LoRA")
    model.base_model.disable_adapter_layers()
    untouched = state(model)
    with adapters_off(ModuleTree(model)):
        pass
    assert state(model) == untouched


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "modules_to_save", "LoHa"])
def test_the_common_methods_are_switched_without_pefts_walks(monkeypatch, name):
    """`disable_adapter` reads the state of every layer, which takes longer than launching a forward."""
    model = adapted(name)
    monkeypatch.setattr(type(model), "get_model_status", lambda self: pytest.fail("walked"))
    with adapters_off(ModuleTree(model)), torch.no_grad():
        model(IDS)


def test_every_module_has_its_own_mode_again():
    model = adapted("LoRA").train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).eval()
    modes = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules() if type(module) not in _MODELESS)
    assert [module.training for module in model.modules()] == modes and not frozen.training


def test_modules_that_are_passed_over_do_not_look_at_their_mode():
    """Modules that are skipped do not read their mode. Dropout and modules with a replaced forward are switched."""
    layer = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(layer, torch.nn.Dropout(0.5)).train()
    layer.forward = lambda values: values + layer.training
    with evaluation_mode(model):
        assert torch.equal(model(torch.ones(4)), torch.ones(4))
    assert model[0].training and model[1].training
    for kind in _MODELESS:
        assert "training" not in inspect.getsource(kind)


CHANGES = {
    "nothing": lambda model: None,
    "an adapter more": lambda model: model.add_adapter("second", model.peft_config["default"]),
    "an adapter less": lambda model: model.delete_adapter("default"),
    "a layer replaced": lambda model: setattr(layers(model)[0], "mlp", torch.nn.Identity()),
    "past any hook": lambda model: layers(model)[0]._modules.update(mlp=torch.nn.Identity()),
    "a layer less": lambda model: layers(model).__delitem__(0),
    "a layer gets a place more": lambda model: layers(model).append(layers(model)[0]),
    "in a leaf": lambda model: setattr(model.get_input_embeddings(), "inside", torch.nn.Dropout()),
    "an empty place": lambda model: model.register_module("nothing", None),
}


def layers(model) -> torch.nn.ModuleList:
    return model.get_base_model().model.layers


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tree_is_of_the_model_as_it_is_now(change):
    model = adapted("modules_to_save")
    model.again = model.get_input_embeddings()  # shared
    tree = ModuleTree(model)
    assert tree.derived(len) == len(list(model.modules()))
    change(model)
    assert tree.modules() == list(model.modules()) and tree.derived(len) == len(tree.modules())
    assert [name for name, _ in tree.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(a is b for (_, a), b in zip(tree.named_parameters(), model.parameters(), strict=True))


def test_parameters_are_those_that_modules_hold_now():
    model = tiny_model(tie_word_embeddings=True)
    tree = ModuleTree(model)
    before = dict(tree.named_parameters())
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    found = dict(tree.named_parameters())
    assert found.keys() - before.keys() == {"lm_head.weight"} and found["lm_head.weight"] is head.weight


def test_a_tree_does_not_walk_again(monkeypatch):
    model = adapted("LoRA")
    tree = ModuleTree(model)
    tree.modules()
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda *_: pytest.fail("walked"))
    with tree.held(), evaluation_mode(tree), adapters_off(tree):
        assert len(list(tree.named_parameters())) > 10


def test_an_adapter_that_came_later_is_switched_off():
    model = adapted("LoRA")
    tree = ModuleTree(model)
    with adapters_off(tree), torch.no_grad():
        expected = model(IDS).logits
    model.add_adapter("second", LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False))
    model.set_adapter("second")
    with adapters_off(tree), torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


class OfItsOwn(torch.nn.Module):
    """A module whose `train()` keeps it in evaluation mode."""

    calls = 0

    def train(self, mode: bool = True):
        self.calls += 1
        return super().train(False)


def test_light_train_is_train():
    """A submodule in evaluation mode is in training mode again; `eval` and other
    modes are unchanged; no attribute stays.
    """
    model = adapted("LoRA").eval()
    tree = ModuleTree(model)
    with light_train(tree):
        assert model.train() is model and all(module.training for module in model.modules())
        layers(model)[0].eval()
        model.train()
        assert all(module.training for module in model.modules())
        model.get_input_embeddings().inside = torch.nn.Dropout().eval()
        assert model.train().get_input_embeddings().inside.training
        assert not model.eval().training and not any(module.training for module in model.modules())
        with pytest.raises(ValueError):
            model.train(1)
    assert "train" not in vars(model)


def test_a_train_of_a_modules_own_is_called():
    model = adapted("LoRA").train()
    model.own = OfItsOwn()
    with light_train(ModuleTree(model)):
        model.train().train()
    assert model.own.calls == 2 and not model.own.training
    model.train = lambda mode=True: "replaced"
    with light_train(ModuleTree(model)):
        assert model.train() == "replaced"
    assert model.train() == "replaced"


class Copies(TorchDispatchMode):
    """A mode that counts casts from one dtype to another."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def step_under_autocast(model, context):
    """The loss and all gradients in bf16 autocast, and the number of casts."""
    with context, Copies() as copies:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.detach(), gradients, copies.count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3", "LoHa", "OFT", "VeRA"])
def test_adapter_casts_off_changes_no_bit(name, base, checkpointing):
    """Loss and all gradients of an fp32 adapter under bf16 autocast are the same, with fewer casts for LoRA."""
    torch.manual_seed(0)
    model = perturbed(get_peft_model(tiny_model(dtype=base).train(), ADAPTERS[name]), scale=0.3)
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    off = adapter_casts_off(ModuleTree(model), autocast=True)
    loss, gradients, copies = step_under_autocast(model, nullcontext())
    found_loss, found_gradients, found_copies = step_under_autocast(model, off)
    assert torch.equal(loss, found_loss) and len(gradients) == len(found_gradients) > 1
    assert all(map(torch.equal, gradients, found_gradients))
    assert (found_copies < copies) == (name == "LoRA")
    assert all(m.cast_input_dtype_enabled for m in model.modules() if hasattr(m, "cast_input_dtype_enabled"))


def test_without_autocast_adapters_go_on_casting():
    model = adapted("LoRA")
    with adapter_casts_off(ModuleTree(model), autocast=False):
        assert all(m.cast_input_dtype_enabled for m in model.modules() if hasattr(m, "cast_input_dtype_enabled"))
