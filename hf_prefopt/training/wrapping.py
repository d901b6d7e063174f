"""Settings of DDP and `torch.compile` that depend on the policy's forward pass."""

import random
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.other import compile_regions
from torch import nn
from torch._dynamo import OptimizedModule

from hf_prefopt.scoring.agreement import device_of, made_up_tokens
from hf_prefopt.scoring.forward import base_causal_lm


def is_sharded(accelerator: Accelerator) -> bool:
    """Return True under FSDP and DeepSpeed, which may shard the model's weights."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_compiled(accelerator: Accelerator) -> bool:
    """Return True if accelerate compiles the model or its layers."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def copies_when_compiled(accelerator: Accelerator) -> bool:
    """Return True if accelerate compiles each layer separately. It then copies the modules that contain the layers."""
    is_regional = is_compiled(accelerator) and accelerator.state.dynamo_plugin.use_regional_compilation
    return is_regional and not is_sharded(accelerator)


def compiled_for_scoring(accelerator: Accelerator, model: nn.Module) -> nn.Module | None:
    """Return the model compiled with accelerate's options, without a DDP wrapper.

    The compiled graphs of the policy are reused. The result is `None` if the policy is not compiled, or if it is
    sharded.
    """
    plugin = accelerator.state.dynamo_plugin
    if not is_compiled(accelerator) or is_sharded(accelerator):
        return None
    if not plugin.use_regional_compilation:
        return cast(nn.Module, torch.compile(model, **plugin.to_kwargs()))
    compiled, originals = compile_regions(model, **plugin.to_kwargs()), set(map(id, model.modules()))
    # `evaluation_mode` does not switch the mode of these copies of the outer modules, so it is set here.
    for copy in compiled.modules():
        if id(copy) not in originals and not isinstance(copy, OptimizedModule):
            vars(copy)["training"] = False
    return compiled


def settle_before_wrapping(scorer: Any, setting: bool | None) -> None:
    """Set DDP's `find_unused_parameters` and, if compilation copies modules, choose the batch layout.

    Call this function before accelerate wraps or copies the policy. A layout changes the classes of modules, so it must
    be chosen before they are copied.

    Args:
        scorer: The trainer's `Scorer`.
        setting: Value of `ddp_find_unused_parameters`.
    """
    settle_unused_parameters(scorer.accelerator, setting, scorer.model)
    if copies_when_compiled(scorer.accelerator):
        scorer.settle()


def settle_unused_parameters(accelerator: Accelerator, setting: bool | None, model: nn.Module) -> None:
    """Set DDP's `find_unused_parameters`: True if the model may have unused parameters, False otherwise.

    Args:
        setting: Value of `ddp_find_unused_parameters`. If it is not `None`, nothing is changed.
        model: The model that DDP will wrap, on its device.
    """
    without_ddp = (DistributedType.NO, DistributedType.FSDP, DistributedType.DEEPSPEED)
    if setting is None and accelerator.distributed_type not in without_ddp:
        with accelerator.autocast():
            accelerator.ddp_handler.find_unused_parameters = not uses_every_parameter(model)


def uses_every_parameter(model: nn.Module) -> bool:
    """Return True if every trained parameter gets a gradient (possibly zero) for any input.

    The test runs the model on one token. A router sends this token to only a few experts. The other experts count as
    unused, unless one parameter tensor holds the weights of all experts, as in transformers' own models.
    """
    config = base_causal_lm(model).config
    if getattr(config, "layerdrop", 0):
        return False
    ids = torch.tensor([made_up_tokens(config, 1, random.Random(0))], device=device_of(model))
    with torch.enable_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True).logits
    nodes, used = {logits.grad_fn} - {None}, set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        used.add(id(getattr(node, "variable", None)))
        new = {following for following, _ in node.next_functions if following is not None} - nodes
        nodes |= new
        waiting += new
    return all(id(parameter) in used for parameter in model.parameters() if parameter.requires_grad)
