"""Ranks that train one model together hold the same weights: checked when training begins, after its first step, at
checkpoints and at the end."""

from collections.abc import Iterator

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_prefopt.reference.shards import is_sharded
from hf_prefopt.scoring.forward import base_causal_lm

# Elements of a tensor that are summed at a time: 128 MB as int64.
_CHUNK = 2**24
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RanksAgree(TrainerCallback):
    """Stops a training run whose ranks do not hold the same weights, when it begins, after its first real step or when
    it ends.

    A step at learning rate 0 (warm-up) and a step that fp16's loss scaling skips change nothing, so the next step is
    checked, too. Sharded parameters are not compared.

    Raises:
        RuntimeError: on every rank, with the name of a parameter that differs.
    """

    def __init__(self):
        self._before: Tensor | None = None

    def on_train_begin(self, args, state, control, model=None, **_):
        """The engine has wrapped the model."""
        self._before = _compared(model, args.device, "before the first step") if _is_compared(model) else None

    def on_step_end(self, args, state, control, model=None, **_):
        """The optimizer has made its step."""
        if self._before is None:
            return
        now = _compared(model, args.device, f"after step {state.global_step}")
        self._before = self._before if torch.equal(now, self._before) else None

    def on_train_end(self, args, state, control, model=None, **_):
        """The best model has been loaded, where that is asked for."""
        refuse_drifted(model, args.device, f"at the end, after step {state.global_step}")


def refuse_drifted(model: nn.Module, device: torch.device, when: str) -> None:
    """Raise `RuntimeError` on every rank if they do not hold the same trained weights; call it on every rank.

    Args:
        when: what the error begins with.
    """
    if _is_compared(model):
        _compared(model, device, when)


def _is_compared(model: nn.Module) -> bool:
    """Whether there are other ranks that hold the same weights."""
    engine = AcceleratorState()
    # FSDP2 has parameters of its own in place of its shards, from a forward to the next.
    is_whole = engine.distributed_type != DistributedType.FSDP and any(True for _ in _replicated(model))
    return is_whole and engine.num_processes > 1


def _compared(model: nn.Module, device: torch.device, when: str) -> Tensor:
    """The checksums `[P, 2]` that all ranks agree on."""
    names, parameters = zip(*_replicated(model), strict=True)
    own = torch.stack([checksum(parameter).to(device) for parameter in parameters])
    ranks = gather(own[None])
    differ = (ranks != ranks[0]).any(dim=(0, 2)).tolist()
    if any(differ):
        raise RuntimeError(
            f"{when}, {sum(differ)} of {len(names)} trained parameters are not the same on all {len(ranks)} ranks "
            f"(the first is {names[differ.index(True)]}): their gradients are not averaged, so each rank trains a "
            "model of its own, or one rank has changed weights. Let the trainer prepare the model, and change no "
            "weights on single ranks"
        )
    return ranks[0]


def _replicated(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters of which each rank is to hold the same values."""
    if getattr(base_causal_lm(model), "tp_size", None):
        return  # experts, for one, are shared out as plain tensors
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad and not is_sharded(p))


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """`[2]` int64: the sum of a tensor's bits, and their sum weighted by place.

    Integers wrap around, so the result does not depend on the order in which a device adds.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(bits.split(_CHUNK)):
        wide = part.to(torch.int64)
        places = torch.arange(1, len(part) + 1, device=tensor.device)
        total += torch.stack([wide.sum(), (wide * (places + number * _CHUNK)).sum()])
    return total
