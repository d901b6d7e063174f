"""The engines on the CPU: the settings of the trainer, and access to the full value of a sharded parameter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        settings: settings of `PreferenceConfig`.
        whole: returns the full value of a parameter, on every rank.
        is_sharded: whether a rank has only a part of a parameter.
        adapt: changes of a trainer in addition to its settings.
        bf16: the settings if the engine computes in bf16.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    whole: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach().clone()
    is_sharded: Callable[[nn.Parameter], bool] = lambda parameter: False
    adapt: Callable[[Trainer], None] = lambda trainer: None
    bf16: dict[str, Any] = field(default_factory=dict)

    @property
    def is_deepspeed(self) -> bool:
        """Whether it is DeepSpeed's."""
        return "deepspeed" in self.settings

    def in_precision(self, bf16: bool) -> dict[str, Any]:
        """Return the settings, in fp32 or in bf16."""
        return {**self.settings, "bf16": True, **self.bf16} if bf16 else self.settings


def compile_no_sums() -> None:
    """DeepSpeed would first compile its own sums over ranks, most of a minute, which only its inference uses."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def zero(stage: int, **optimization: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration of a ZeRO stage in fp32, without overlap, because a CPU has no streams."""
    return {
        # The default buckets take gigabytes.
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": 10**6,
            "allgather_bucket_size": 10**6,
            **optimization,
        },
        "zero_allow_untested_optimizer": True,
        # With parameters in CPU memory, DeepSpeed would otherwise require its own Adam.
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }


def _zero3(**more: Any) -> Engine:
    optimization = {"stage3_gather_16bit_weights_on_model_save": True, **more}
    bf16 = zero_in_bf16(3, **optimization)
    return Engine({"deepspeed": zero(3, **optimization)}, _gathered, _is_partitioned, bf16=bf16)


def zero_in_bf16(stage: int, **optimization: Any) -> dict[str, Any]:
    """Return the settings of a ZeRO stage with weights in bf16; the optimizer has fp32 copies of the weights."""
    return {"deepspeed": {**zero(stage, **optimization), "bf16": {"enabled": True}}}


def _gathered(parameter: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return parameter.numel() == 0 < parameter.ds_tensor.numel() < parameter.ds_numel


def _switch_fsdp_on(trainer: Trainer) -> None:
    """Do what accelerate does for GPU processes, but not for CPU processes."""
    for state in (PartialState(), trainer.accelerator.state):
        state.distributed_type = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if trainer.args.bf16:
        plugin.set_mixed_precision("bf16")
    trainer.accelerator.state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True


# FSDP wraps the layer classes that the model lists in `_no_split_modules`.
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
ENGINES = {
    "ddp": Engine(),
    "zero1": Engine({"deepspeed": zero(1)}),
    "zero2": Engine({"deepspeed": zero(2)}, bf16=zero_in_bf16(2)),
    # All parameters are sharded, even small ones; none is gathered in advance or kept for another use.
    "zero3": _zero3(stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=0),
    # With DeepSpeed's default threshold, so the parameters of a tiny model stay gathered between their uses.
    "zero3_offload": _zero3(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
    "fsdp2": Engine(
        FSDP2,
        whole=lambda parameter: parameter.detach().full_tensor().clone(),
        is_sharded=lambda parameter: isinstance(parameter, DTensor),
        adapt=_switch_fsdp_on,
    ),
}
