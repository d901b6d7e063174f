"""Check that all ranks have the same trained weights.

The check is made at the start, after the first step, at checkpoints and at the end.
"""

from collections.abc import Iterator

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_prefopt.reference.shards import is_sharded
from hf_prefopt.scoring.forward import base_causal_lm

# Number of elements that are summed at a time. As int64, they take 128 MB.
_CHUNK = 2**24
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RanksAgree(TrainerCallback):
    """Callback that raises an error if the ranks have different weights.

    It compares the trained weights at the start, after the first step that changes them, and at the end. A step with a
    learning rate of 0 (warm-up), or one that fp16 loss scaling skips, does not change the weights, so the check is
    repeated after the next step. Sharded parameters are not compared.

    Raises:
        RuntimeError: the ranks have different weights. It is raised on every rank and names a parameter that differs.
    """

    def __init__(self):
        self._before: Tensor | None = None

    def on_train_begin(self, args, state, control, model=None, **_):
        """Compare the weights after the engine has wrapped the model."""
        self._before = _compared(model, args.device, "before the first step") if _is_compared(model) else None

    def on_step_end(self, args, state, control, model=None, **_):
        """Compare the weights after the optimizer step, until a step has changed them."""
        if self._before is None:
            return
        now = _compared(model, args.device, f"after step {state.global_step}")
        self._before = self._before if torch.equal(now, self._before) else None

    def on_train_end(self, args, state, control, model=None, **_):
        """Compare the weights at the end, after the best model has been loaded (if requested)."""
        refuse_drifted(model, args.device, f"at the end, after step {state.global_step}")


def refuse_drifted(model: nn.Module, device: torch.device, when: str) -> None:
    """Raise `RuntimeError` if the ranks have different trained weights. Call this function on every rank.

    Args:
        when: First words of the error message.
    """
    if _is_compared(model):
        _compared(model, device, when)


def _is_compared(model: nn.Module) -> bool:
    """Return True if there are several ranks that must have the same trained weights."""
    engine = AcceleratorState()
    # Between forward passes, FSDP2 may replace sharded parameters with unsharded ones.
    is_whole = engine.distributed_type != DistributedType.FSDP and any(True for _ in _replicated(model))
    return is_whole and engine.num_processes > 1


def _compared(model: nn.Module, device: torch.device, when: str) -> Tensor:
    """Return the checksums of the P trained parameters, `[P, 2]`.

    Raises:
        RuntimeError: The checksums differ between ranks.
    """
    names, parameters = zip(*_replicated(model), strict=True)
    own = torch.stack([checksum(parameter).to(device) for parameter in parameters])
    ranks = gather(own[None])
    differ = (ranks != ranks[0]).any(dim=(0, 2)).tolist()
    if any(differ):
        raise RuntimeError(
            f"{when}, {sum(differ)} of {len(names)} trained parameters are not the same on all {len(ranks)} ranks "
            f"(the first is {names[differ.index(True)]}): either gradients are not averaged, so that each rank trains "
            "a different model, or one rank has changed weights. Let the trainer prepare the model, and do not change "
            "weights on single ranks"
        )
    return ranks[0]


def _replicated(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters that must have the same values on every rank."""
    if getattr(base_causal_lm(model), "tp_size", None):
        return  # tensor parallelism shards some parameters, such as experts, as plain tensors
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad and not is_sharded(p))


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return a checksum, `[2]` int64, of the elements' bits, read as integers.

    The first number is the sum of these integers. In the second sum, each integer is multiplied by its position
    (1, 2, …). Integer sums wrap around, so the result does not depend on the order of the additions.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(bits.split(_CHUNK)):
        wide = part.to(torch.int64)
        places = torch.arange(1, len(part) + 1, device=tensor.device)
        total += torch.stack([wide.sum(), (wide * (places + number * _CHUNK)).sum()])
    return total
