"""A reference model of its own under an engine that shards: its weights are shared out as the policy's are.

Each rank keeps a part of every parameter, and a layer is whole while it runs. Nothing of it trains, so there is no
optimizer, and no gradient is ever reduced.
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
        What must be kept for as long as the model is used; `None` where the policy is whole on every rank, and then
        nothing was done.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        return _under_zero3(model, settings, accelerator) if settings["stage"] == 3 else None
    return None


def _under_zero3(model: nn.Module, settings: dict[str, Any], accelerator: Accelerator) -> Any:
    """An engine of the model's own, with the policy's settings of where parameters are and when they are gathered."""
    import deepspeed

    # What is still "auto" is DeepSpeed's default; what an optimizer would do is nobody's.
    kept = {name: value for name, value in settings.items() if value != "auto" and name != "offload_optimizer"}
    config = {"zero_optimization": kept, "train_micro_batch_size_per_gpu": 1}
    if accelerator.mixed_precision in ("bf16", "fp16"):
        config[accelerator.mixed_precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def any_rank(accelerator: Accelerator, here: bool) -> bool:
    """Whether something holds here or, as ranks of a sharded model call its layers together, on any other rank."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return here
    return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).any())
