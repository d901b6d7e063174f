"""Choose which activations the forward pass stores for the backward pass, and where it stores them.

With activation checkpointing, a layer stores its input and recomputes the rest. With `keep_attention`, it also stores
the outputs of attention, which take as much memory per token as the input. Then the backward pass does not recompute
attention, whose cost grows with the square of the sequence length. `OffloadedActivations` moves the tensors that
autograd saves to CPU memory.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.scoring.attention import attention_implementations
from hf_prefopt.scoring.modes import ModuleTree

# Names under which PyTorch and flash-attn register the operators that compute attention.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
}
# Values of `attn_implementation` with which transformers calls one of these operators.
_KEPT = ("sdpa", "flash_attention_2")


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept = operator._schema.name in ATTENTION and not _drops(operator, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _drops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if this call of attention applies dropout. Its output must then be recomputed, not stored.

    If it were stored, the recomputation would not draw attention's random numbers, so later dropout would draw others
    than in the forward pass.
    """
    given = dict(zip([argument.name for argument in operator._schema.arguments], args, strict=False)) | kwargs
    return given.get("dropout_p", 0.0) > 0


def _check_kept_attention(model: nn.Module) -> None:
    others = sorted(set(attention_implementations(model)) - set(_KEPT))
    if others:
        raise ValueError(
            f"checkpointing_keeps='attention' needs attn_implementation={' or '.join(map(repr, _KEPT))}, but the model "
            f"has {', '.join(map(repr, others))}: load it with one of these, or leave checkpointing_keeps out"
        )


def keep_attention(model: nn.Module) -> int:
    """Make checkpointed layers store the outputs of attention. Call this function after checkpointing was enabled.

    Returns:
        The number of layers that are checkpointed.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    modules = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    for module in modules:
        function = vars(module)["_gradient_checkpointing_func"]
        module._gradient_checkpointing_func = partial(function, context_fn=contexts)  # type: ignore[assignment]
    return sum(bool(getattr(module, "gradient_checkpointing", False)) for module in modules)


class OffloadedActivations(saved_tensors_hooks):
    """Context for a forward and backward pass that keeps saved tensors in pinned CPU memory.

    Parameters, their views, and tensors of fewer than `least_bytes` bytes are not moved. Other tensors come back with
    the same strides, because compiled backward passes require them. The host does not wait for the copies. A copy to
    the CPU runs in the stream of the operator that saves the tensor, and the copy back in the stream of the operator
    that reads it.

    Args:
        parameters: Parameters of the model.
        device: Device of the model.
        least_bytes: Minimum size, in bytes, of a tensor that is moved to the CPU.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device, least_bytes: int = 2**20):
        is_pinned = device.type != "cpu"
        storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}

        def stays(tensor: Tensor) -> bool:
            is_small = tensor.numel() * tensor.element_size() < least_bytes
            # Only the device types are compared, because "cuda" and "cuda:0" are unequal.
            is_elsewhere = tensor.device.type != device.type
            return is_small or is_elsewhere or tensor.untyped_storage().data_ptr() in storages

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if stays(tensor):
                return tensor
            kept = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned)
            return tensor.device, kept.copy_(tensor, non_blocking=is_pinned)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=is_pinned)

        super().__init__(pack, unpack)


def check_activations(args: PreferenceConfig, model: nn.Module, accelerator: Accelerator) -> None:
    """Raise `ValueError` if the settings for activations are incompatible with the model, the device or the engine."""
    if args.checkpointing_keeps == "attention":
        _check_kept_attention(model)
    if args.activation_offloading:
        _check_offloading(accelerator)


def _check_offloading(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cpu":
        raise ValueError(
            "activation_offloading=True has no effect on a CPU, because the activations are in CPU memory: leave it out"
        )
    engine = accelerator.distributed_type
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if engine == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            "activation_offloading=True would also offload the weights that FSDP2 and ZeRO-3 gather for each layer: "
            "use gradient_checkpointing=True, with gradient_checkpointing_kwargs={'offload': True} to keep the inputs "
            "of layers in CPU memory"
        )


def offloaded(is_on: bool, tree: ModuleTree, device: torch.device) -> AbstractContextManager:
    """Return the context manager for the passes of a micro-batch.

    It is an `OffloadedActivations` if `is_on`, and does nothing otherwise.
    """
    if not is_on:
        return nullcontext()
    return OffloadedActivations((parameter for _, parameter in tree.named_parameters()), device)
