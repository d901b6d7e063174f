"""Settings of DDP and `torch.compile` that depend on the policy's forward pass."""

import random
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from hf_prefopt.scoring.agreement import device_of, made_up_tokens
from hf_prefopt.scoring.forward import base_causal_lm


def compiled_for_scoring(accelerator: Accelerator, model: nn.Module) -> nn.Module | None:
    """Return the model compiled with accelerate's options, without DDP; `None` if the policy is not compiled.

    The compiled graphs of the policy are reused. For sharded models and for regional compilation, the result is also
    `None`.
    """
    plugin = accelerator.state.dynamo_plugin
    is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if plugin.backend == DynamoBackend.NO or plugin.use_regional_compilation or is_sharded:
        return None
    return cast(nn.Module, torch.compile(model, **plugin.to_kwargs()))


def settle_unused_parameters(accelerator: Accelerator, setting: bool | None, model: nn.Module) -> None:
    """Set DDP's `find_unused_parameters` to True only if the model may have unused parameters.

    Args:
        setting: Value of `ddp_find_unused_parameters`; unless it is `None`, nothing is changed.
        model: The model that DDP will wrap, on its device.
    """
    without_ddp = (DistributedType.NO, DistributedType.FSDP, DistributedType.DEEPSPEED)
    if setting is None and accelerator.distributed_type not in without_ddp:
        with accelerator.autocast():
            accelerator.ddp_handler.find_unused_parameters = not uses_every_parameter(model)


def uses_every_parameter(model: nn.Module) -> bool:
    """Return True if every trained parameter gets a gradient (possibly zero) for any input.

    The test runs one token, which a router sends to only a few experts. The other experts count as unused, unless all
    experts share one parameter tensor, as in transformers' own models.
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
