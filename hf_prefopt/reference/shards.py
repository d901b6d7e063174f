"""Access to the part of a parameter that a rank holds: the whole parameter, or its shard under ZeRO-3 and FSDP2.

Only `gathered` communicates. The other functions read a rank's shard of a parameter or replace it by a shard of other
values. The engine then gathers the other values as it would have gathered the parameter's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_prefopt.scoring.modes import ModuleTree


def local_shard(parameter: nn.Parameter) -> Tensor:
    """Return the part of a parameter that this rank holds: its shard, or the whole parameter if it is not sharded.

    Under ZeRO-3, a shard is flat.

    Raises:
        ValueError: ZeRO-3 keeps the parameter on an NVMe disk.
    """
    if isinstance(parameter, DTensor):
        return parameter.to_local().data
    if not is_zero3_partitioned(parameter):
        return parameter.data
    if parameter.ds_tensor.status.name != "AVAILABLE":
        raise ValueError(
            "a frozen copy of parameters that ZeRO-3 keeps on NVMe cannot be swapped in: set offload_param to the CPU, "
            "or train an adapter with reference='adapter_off'"
        )
    return parameter.ds_tensor.data


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Yield the full parameter `[shape]`; if the parameter is sharded, enter this context on every rank."""
    if is_zero3_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    elif isinstance(parameter, DTensor):
        # Shards in CPU memory are gathered on the device, because the process group is the device's.
        yield cast(DTensor, parameter.detach().to(parameter.device_mesh.device_type)).full_tensor()
    else:
        yield parameter.data


def shard_of(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Return this rank's shard of a parameter's full values. If `values` is already a shard, return it unchanged."""
    if values.shape == local_shard(parameter).shape:
        return values
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return values[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))].clone()
    size = local_shard(parameter).numel()
    start = torch.distributed.get_rank(cast(Zero3Parameter, parameter).ds_process_group) * size
    part = values.flatten()[start : start + size]
    return torch.cat([part, part.new_zeros(size - len(part))])


def swap_shard(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Write this rank's shard of `values` into this rank's shard of a parameter, and return the old shard."""
    current = local_shard(parameter)
    values = shard_of(parameter, values).to(device=current.device, dtype=current.dtype)
    if isinstance(parameter, DTensor):
        # FSDP2 gathers from its own buffer, and the parameter is a view of this buffer.
        kept = current.clone()
        current.copy_(values)
        return kept
    if is_zero3_partitioned(parameter):
        parameter.ds_tensor.data = values
    else:
        parameter.data = values
    return current


def reshard(tree: ModuleTree) -> None:
    """Replace the gathered parameters that FSDP2 keeps after a forward by the original, sharded parameter objects."""
    if torch.distributed.is_initialized() and any(issubclass(kind, FSDPModule) for kind in set(map(type, tree))):
        for module in tree:
            if isinstance(module, FSDPModule):
                module.reshard()


def release_gathered(tree: ModuleTree) -> None:
    """Free the gathered parameters that an engine keeps after a forward, so that the next forward gathers again."""
    reshard(tree)
    for _, parameter in tree.named_parameters():
        if is_zero3_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether this rank holds only a part of a parameter."""
    return isinstance(parameter, DTensor) or is_zero3_partitioned(parameter)


class Zero3Parameter(nn.Parameter):
    """The type of a parameter with the attributes that ZeRO-3 adds, used only by type checkers."""

    ds_tensor: Any
    ds_status: Any
    ds_process_group: Any
    partition: Callable[[], None]


def is_zero3_partitioned(parameter: nn.Parameter) -> TypeGuard[Zero3Parameter]:
    """Return whether ZeRO-3 shards a parameter; a sharded parameter is empty while it is not in use."""
    return hasattr(parameter, "ds_tensor")
