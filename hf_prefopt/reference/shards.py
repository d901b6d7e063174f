"""What a rank holds of a parameter: all of it, or its shard under ZeRO-3 and FSDP2; and how values take its place.

Only `whole` communicates: elsewhere a rank puts its own shard of other values where its shard of the parameter was, and
the engine gathers those as it would have gathered the parameter's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_prefopt.scoring.modes import all_modules


def held(parameter: nn.Parameter) -> Tensor:
    """The values that this rank holds of a parameter: `[shape]`, under ZeRO-3 `[shard]`, flat.

    Raises:
        ValueError: ZeRO-3 keeps them on an NVMe disk.
    """
    if isinstance(parameter, DTensor):
        return parameter.to_local().data
    if not is_in_parts(parameter):
        return parameter.data
    if parameter.ds_tensor.status.name != "AVAILABLE":
        raise ValueError(
            "a frozen copy of parameters that ZeRO-3 keeps on NVMe cannot be swapped in: offload_param to the CPU, or "
            "train an adapter with reference='adapter_off'"
        )
    return parameter.ds_tensor.data


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """All of a parameter `[shape]`, inside the context only; where it is sharded, on every rank at the same time."""
    if is_in_parts(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    elif isinstance(parameter, DTensor):
        # Shards that wait in the CPU's memory are gathered by the device, as its process group does.
        yield parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
    else:
        yield parameter.data


def own_part(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """What this rank holds of whole values `[shape]` of a parameter; what is its part already stays as it is."""
    if values.shape == held(parameter).shape:
        return values
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return values[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))].clone()
    size = held(parameter).numel()
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    part = values.flatten()[start : start + size]
    return torch.cat([part, part.new_zeros(size - len(part))])


def exchange(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Put what this rank holds of other values in place of the parameter's, and return those."""
    current = held(parameter)
    values = own_part(parameter, values).to(device=current.device, dtype=current.dtype)
    if isinstance(parameter, DTensor):
        # FSDP2 gathers from a buffer of its own, which the parameter is a view of.
        kept = current.clone()
        current.copy_(values)
        return kept
    if is_in_parts(parameter):
        parameter.ds_tensor.data = values
    else:
        parameter.data = values
    return current


def reshard(model: nn.Module) -> None:
    """Put FSDP2's shards where the whole parameters are, other objects, that it keeps after a forward or a backward."""
    if torch.distributed.is_initialized():
        for module in all_modules(model):
            if isinstance(module, FSDPModule):
                module.reshard()


def release_gathered(model: nn.Module) -> None:
    """Let go of whole parameters that an engine keeps between two forwards, so that the next one gathers anew."""
    reshard(model)
    for parameter in model.parameters():
        if is_in_parts(parameter) and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this rank holds only a part of a parameter."""
    return isinstance(parameter, DTensor) or is_in_parts(parameter)


def is_in_parts(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has shared out a parameter, which then is empty between its uses."""
    return hasattr(parameter, "ds_tensor")
