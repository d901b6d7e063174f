"""What a rank holds of a parameter: all of it, or its shard under ZeRO-3 and FSDP2; and how other values replace it.

Only `gathered` communicates. Elsewhere a rank replaces its shard of the parameter by its shard of other values, and the
engine gathers those as it would have gathered the parameter's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hf_prefopt.scoring.modes import ModuleTree


def local_shard(parameter: nn.Parameter) -> Tensor:
    """The values that this rank holds of a parameter: `[shape]`, under ZeRO-3 `[shard]`, flat.

    Raises:
        ValueError: ZeRO-3 keeps them on an NVMe disk.
    """
    if isinstance(parameter, DTensor):
        return parameter.to_local().data
    if not is_zero3_partitioned(parameter):
        return parameter.data
    if parameter.ds_tensor.status.name != "AVAILABLE":
        raise ValueError(
            "a frozen copy of parameters that ZeRO-3 keeps on NVMe cannot be swapped in: offload_param to the CPU, or "
            "train an adapter with reference='adapter_off'"
        )
    return parameter.ds_tensor.data


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The whole parameter `[shape]`, inside the context only; enter it on every rank where the parameter is sharded."""
    if is_zero3_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    elif isinstance(parameter, DTensor):
        # Shards that wait in the CPU's memory are gathered by the device, as its process group does.
        yield parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
    else:
        yield parameter.data


def shard_of(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """This rank's shard of whole values `[shape]` for a parameter; a shard is returned as it is."""
    if values.shape == local_shard(parameter).shape:
        return values
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return values[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))].clone()
    size = local_shard(parameter).numel()
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    part = values.flatten()[start : start + size]
    return torch.cat([part, part.new_zeros(size - len(part))])


def swap_shard(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Replace this rank's shard of a parameter by its shard of other values, and return the old shard."""
    current = local_shard(parameter)
    values = shard_of(parameter, values).to(device=current.device, dtype=current.dtype)
    if isinstance(parameter, DTensor):
        # FSDP2 gathers from a buffer of its own, which the parameter is a view of.
        kept = current.clone()
        current.copy_(values)
        return kept
    if is_zero3_partitioned(parameter):
        parameter.ds_tensor.data = values
    else:
        parameter.data = values
    return current


def reshard(tree: ModuleTree) -> None:
    """Put FSDP2's shards back in place of the gathered parameters, other objects, that it keeps after a forward."""
    if torch.distributed.is_initialized() and any(issubclass(kind, FSDPModule) for kind in set(map(type, tree))):
        for module in tree:
            if isinstance(module, FSDPModule):
                module.reshard()


def release_gathered(tree: ModuleTree) -> None:
    """Free gathered parameters that an engine keeps between two forwards, so that the next forward gathers anew."""
    reshard(tree)
    for _, parameter in tree.named_parameters():
        if is_zero3_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this rank holds only a part of a parameter."""
    return isinstance(parameter, DTensor) or is_zero3_partitioned(parameter)


def is_zero3_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 shards a parameter, which then is empty between its uses."""
    return hasattr(parameter, "ds_tensor")
