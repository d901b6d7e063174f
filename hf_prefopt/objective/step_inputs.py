"""Losses whose examples depend on each other, over the global batch: all micro-batches of a step, on all ranks.

The inputs of the whole step are collected first, without gradients. Each micro-batch then computes the loss of the
global batch with its own entries live, so that the gradients of the micro-batches add up to the exact one.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_prefopt.batch import join_examples

Inputs = dict[str, Tensor]


def gather_inputs(accelerator: Accelerator, inputs: Inputs) -> tuple[Inputs, int]:
    """The inputs `[B_r]`, `[B_r, K_r]` or `[B_r, T_r]` of all ranks in one, detached, and where this rank's begin."""
    detached = {name: tensor.detach() for name, tensor in inputs.items()}
    if accelerator.num_processes == 1:
        return detached, 0
    count = len(next(iter(detached.values())))
    widest = max((tensor.shape[1] for tensor in detached.values() if tensor.dim() == 2), default=0)
    shapes = accelerator.gather(torch.tensor([[count, widest]], device=accelerator.device))
    sizes, widths = shapes.T.tolist()

    def gathered(tensor: Tensor) -> Tensor:
        room = (0, max(widths) - tensor.shape[1]) if tensor.dim() == 2 else ()
        padded = torch.nn.functional.pad(tensor, (*room, 0, max(sizes) - len(tensor)))
        parts = accelerator.gather(padded).view(len(sizes), *padded.shape)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    everything = {name: gathered(tensor.contiguous()) for name, tensor in detached.items()}
    return everything, sum(sizes[: accelerator.process_index])


class StepInputs:
    """The loss inputs of one optimisation step, collected micro-batch by micro-batch."""

    def __init__(self, accelerator: Accelerator, collect: Callable[[], list[Inputs]]):
        """`collect` computes the local micro-batches' inputs without gradients, when they are first needed."""
        self._accelerator, self._collect = accelerator, collect
        self._everything: Inputs = {}
        self._starts: list[int] = []

    @property
    def everything(self) -> Inputs:
        """The inputs of the global batch, the same on every rank and without gradients."""
        if not self._everything:
            self._gather()
        return self._everything

    def splice(self, index: int, own: Inputs) -> tuple[Inputs, slice]:
        """The global inputs with micro-batch `index`'s entries replaced by its live ones, and where those stand."""
        everything_else = self.everything
        start = self._starts[index]
        where = slice(start, start + len(next(iter(own.values()))))
        spliced = {
            name: join_examples([everything[: where.start], own[name], everything[where.stop :]])
            for name, everything in everything_else.items()
        }
        return spliced, where

    def _gather(self) -> None:
        parts = self._collect()
        local = {name: join_examples([part[name] for part in parts]) for name in parts[0]}
        self._everything, start = gather_inputs(self._accelerator, local)
        for part in parts:
            self._starts.append(start)
            start += len(next(iter(part.values())))
