"""Find layers on which an adapter would not work, and the reason.

PEFT selects layers by name. On some layers, an adapter has no effect, because text never passes through the layer, or
because the model reads the layer's weight without calling the layer. For other layers, PEFT saves an adapter that it
cannot load again. PEFT raises no error in any of these cases.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prefopt.reference.choose import adapter_parameters

ALL_LINEAR = "all-linear"
UNREACHED = "text does not reach them"
LOST = "PEFT saves adapters there but does not load them again"
# Attributes of a weight that do not depend on its values.
_ABOUT_WEIGHTS = {"data", "device", "dtype", "ndim", "requires_grad", "shape"}


def left_out(model: PreTrainedModel, peft_config: PeftConfig) -> dict[str, list[str]]:
    """Return the names of the layers that `target_modules` selects but that must get no adapter, keyed by the reason.

    A layer must get no adapter if

    - it belongs to an image or audio tower, which text never passes through;
    - it is a subclass of `nn.Linear` with another output than `nn.Linear`, such as a router that returns several
      tensors;
    - the model reads its weight without calling the layer (for example in a fused kernel), which bypasses the adapter;
    - PEFT does not support it under "all-linear".
    """
    text, head, everywhere = text_parts(model), model.get_output_embeddings(), is_all_linear(peft_config)
    named: dict[str, Any] = dict(model.named_modules())
    reasons: dict[str, list[str]] = {}
    for name in _chosen(model, peft_config):
        module, (parent, _, child) = named[name], name.rpartition(".")
        reason = None
        if module is head:
            pass
        elif text and not _is_in(name, text):
            reason = UNREACHED
        elif isinstance(module, nn.Linear) and _has_other_output(module):
            reason = f"{type(module).__name__} has a different output than a linear layer"
        elif everywhere and _is_refused(child, model, peft_config):
            reason = "Mamba's fused kernel bypasses adapters"
        elif child in weights_read_past(type(named[parent])):  # type: ignore[arg-type]  # classes are hashable
            reason = f"{type(named[parent]).__name__} reads their weights directly, bypassing an adapter"
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    return reasons


def is_all_linear(peft_config: PeftConfig) -> bool:
    """Return True if the configuration targets every linear layer."""
    target = getattr(peft_config, "target_modules", None)
    return isinstance(target, str) and target.lower() == ALL_LINEAR


def unreached_adapters(model: PeftModel) -> list[str]:
    """Return the names of layers that have an adapter but that text never passes through."""
    base = model.get_base_model()
    text = text_parts(base) if isinstance(base, PreTrainedModel) else []
    adapted = (name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    output = cast(PreTrainedModel, base).get_output_embeddings()
    head = next((name for name, module in base.named_modules() if module is output), "")
    return [name for name in adapted if text and not _is_in(name, [*text, head])]


def lost_adapters(model: PeftModel) -> list[str]:
    """Return the names of layers whose adapters PEFT would not load again.

    The function tests this on the model itself. It loads changed values for all adapter tensors, checks whether the
    model has these values, and restores the tensors. When PEFT loads an adapter, it applies transformers' renaming
    rules for checkpoint tensors. If a rule also matches a name that must stay unchanged, the tensor is loaded under a
    name that does not exist.
    """
    lost, own = [], adapter_parameters(model)
    for name in model.active_adapters:
        saved = get_peft_model_state_dict(model, own, name, save_embedding_layers=False)
        before = {key: tensor.detach().clone() for key, tensor in saved.items()}
        changed = {key: tensor + 1 for key, tensor in before.items()}
        set_peft_model_state_dict(model, dict(changed), adapter_name=name)
        found = get_peft_model_state_dict(model, own, name, save_embedding_layers=False)
        lost += [key for key, tensor in changed.items() if not torch.equal(found[key].detach(), tensor)]
        set_peft_model_state_dict(model, before, adapter_name=name)
    return list(dict.fromkeys(key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in lost))


def text_parts(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules that text passes through in a multimodal model; [] for a text-only model."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    decoder = model.get_decoder()
    parts = [name for name, module in model.named_modules() if module is decoder and name]
    return parts if decoder is not model else []


@cache
def weights_read_past(module_type: type) -> frozenset[str]:
    """Return the names of child modules whose weights a class reads directly, as in `F.linear(x, self.child.weight)`.

    Reading an attribute of a weight, such as its dtype, does not count. Reading a slice does not count either: old
    models use slices only to simulate tensor parallelism, which is off by default.
    """
    if module_type.__module__.partition(".")[0] in ("builtins", "torch"):
        return frozenset()
    inherited = frozenset().union(*map(weights_read_past, module_type.__bases__))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(module_type)))
    except (OSError, TypeError, SyntaxError):
        return inherited
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    return inherited | frozenset(
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
        and not _is_about_weights(parents[node])
    )


def _is_about_weights(parent: ast.AST) -> bool:
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in ("getattr", "hasattr", "isinstance")
    return isinstance(parent, ast.Subscript) or (isinstance(parent, ast.Attribute) and parent.attr in _ABOUT_WEIGHTS)


def _chosen(model: PreTrainedModel, peft_config: PeftConfig) -> Iterator[str]:
    """Yield the names of the modules that `target_modules` selects."""
    resolved = _with_defaults(model, peft_config)
    if not getattr(resolved, "target_modules", None) or not hasattr(resolved, "exclude_modules"):
        return
    everywhere = is_all_linear(resolved)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) if everywhere else check_target_module_exists(resolved, name):
            yield name


def _with_defaults(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """Return the configuration, with PEFT's default target modules for the model type if it has no target modules."""
    if getattr(peft_config, "target_modules", None) or getattr(peft_config, "target_parameters", None):
        return peft_config
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(cast(PeftType, peft_config.peft_type))
    known = getattr(tuner, "target_module_mapping", {}).get(model.config.model_type)
    if known is None or not hasattr(peft_config, "target_modules"):
        return peft_config
    return type(peft_config)(**{**peft_config.to_dict(), "target_modules": known})


def _is_in(name: str, parts: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _has_other_output(linear: nn.Linear) -> bool:
    """Return True for a transformers subclass of `nn.Linear` that does not map a tensor `[2, in]` to one `[2, out]`."""
    own = type(linear).__module__.startswith("transformers.models.") and type(linear).forward is not nn.Linear.forward
    if not own:
        return False
    inputs = linear.weight.new_zeros(2, linear.in_features)
    try:
        with torch.no_grad():
            outputs = linear(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return True
    return not isinstance(outputs, torch.Tensor) or outputs.shape != (2, linear.out_features)


def _is_refused(child: str, model: PreTrainedModel, peft_config: PeftConfig) -> bool:
    try:
        _check_lora_target_modules_mamba(peft_config, model, child)
    except ValueError:
        return True
    return False
