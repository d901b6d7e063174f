"""Layers that an adapter cannot go on, or would have no effect on, and why.

PEFT puts adapters on layers by their names. Some of the layers are never reached, some are read in another way than by
a call, and the adapters of some are lost when they are loaded again. None of this is an error anywhere.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prefopt.reference.choose import adapter_parameters

ALL_LINEAR = "all-linear"
UNREACHED = "text does not reach them"
LOST = "PEFT saves adapters there and does not load them"
# What is read of a weight that is not computed with.
_ABOUT_WEIGHTS = {"data", "device", "dtype", "ndim", "requires_grad", "shape"}


def left_out(model: PreTrainedModel, peft_config: PeftConfig) -> dict[str, list[str]]:
    """The layers that an adapter is left off, of those that its `target_modules` choose, by the reason.

    Those are towers for images and sound, which text never reaches; subclasses of linear layers with other outputs,
    such as routers that return several tensors, around which PEFT's adapters do not fit; those whose weights the model
    reads past an adapter, at least in training or in a kernel; and what PEFT refuses of "all-linear".
    """
    text, head, everywhere = text_parts(model), model.get_output_embeddings(), is_all_linear(peft_config)
    named, reasons = dict(model.named_modules()), {}
    for name in _chosen(model, peft_config):
        module, (parent, _, child) = named[name], name.rpartition(".")
        reason = None
        if module is head:
            pass
        elif text and not _is_in(name, text):
            reason = UNREACHED
        elif isinstance(module, nn.Linear) and _has_other_output(module):
            reason = f"{type(module).__name__} has outputs of its own"
        elif everywhere and _is_refused(child, model, peft_config):
            reason = "Mamba's fused kernel passes them by"
        elif child in weights_read_past(type(named[parent])):
            reason = f"{type(named[parent]).__name__} computes with their weights past an adapter"
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    return reasons


def is_all_linear(peft_config: PeftConfig) -> bool:
    """Whether an adapter goes on every linear layer."""
    target = getattr(peft_config, "target_modules", None)
    return isinstance(target, str) and target.lower() == ALL_LINEAR


def unreached_adapters(model: PeftModel) -> list[str]:
    """The names of the layers with an adapter that text never reaches."""
    base = model.get_base_model()
    text = text_parts(base) if isinstance(base, PreTrainedModel) else []
    adapted = (name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    head = next((name for name, module in base.named_modules() if module is base.get_output_embeddings()), "")
    return [name for name in adapted if text and not _is_in(name, [*text, head])]


def lost_adapters(model: PeftModel) -> list[str]:
    """The names of the layers whose adapters PEFT would not load again; tried on the model itself.

    PEFT gives tensors the names that they have after transformers' conversion of checkpoints. A renaming that also
    fits a name that needs none sends a tensor nowhere.
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
    """The names of the modules that text goes through in a model of several kinds of inputs; none for one of text."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    decoder = model.get_decoder()
    parts = [name for name, module in model.named_modules() if module is decoder and name]
    return parts if decoder is not model else []


@cache
def weights_read_past(module_type: type) -> frozenset[str]:
    """The children of a module whose weights its methods compute with, as in `F.linear(x, self.child.weight)`.

    Reading a property of a weight, or a slice of it (the imitation of tensor parallelism in old models, which is off by
    default), does not count.
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
    """The names of the modules that `target_modules` choose."""
    resolved = _with_defaults(model, peft_config)
    if not getattr(resolved, "target_modules", None) or not hasattr(resolved, "exclude_modules"):
        return
    everywhere = is_all_linear(resolved)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) if everywhere else check_target_module_exists(resolved, name):
            yield name


def _with_defaults(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """The configuration with the modules that PEFT chooses for a family where it names none."""
    if getattr(peft_config, "target_modules", None) or getattr(peft_config, "target_parameters", None):
        return peft_config
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type)
    known = getattr(tuner, "target_module_mapping", {}).get(model.config.model_type)
    if known is None or not hasattr(peft_config, "target_modules"):
        return peft_config
    return type(peft_config)(**{**peft_config.to_dict(), "target_modules": known})


def _is_in(name: str, parts: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _has_other_output(linear: nn.Linear) -> bool:
    """Whether a family's own subclass of a linear layer gives something else than a row of outputs for each input."""
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
