"""Shard a separate reference model across ranks, like the policy.

Each rank keeps a shard of every parameter, and gathers a layer only while the layer runs. Nothing in the model is
trained, so there is no optimizer and no reduction of gradients.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn


def shard_like_the_policy(model: nn.Module, accelerator: Accelerator) -> Any:
    """Shard a frozen model in place, if the policy is sharded.

    Returns:
        An object that must be kept as long as the model is used; `None` if the policy is not sharded.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        return _under_zero3(model, settings, accelerator) if settings["stage"] == 3 else None
    return None


def _under_zero3(model: nn.Module, settings: dict[str, Any], accelerator: Accelerator) -> Any:
    """Return a separate DeepSpeed engine for the model. It places and gathers parameters by the policy's settings."""
    import deepspeed

    # Without the "auto" values, DeepSpeed uses its defaults. The setting for the optimizer does not apply.
    kept = {name: value for name, value in settings.items() if value != "auto" and name != "offload_optimizer"}
    config = {"zero_optimization": kept, "train_micro_batch_size_per_gpu": 1}
    if accelerator.mixed_precision in ("bf16", "fp16"):
        config[accelerator.mixed_precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def any_rank(accelerator: Accelerator, here: bool) -> bool:
    """Return `here`. If all ranks must call a sharded model together, return whether `here` is True on any rank."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return here
    return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).any())
