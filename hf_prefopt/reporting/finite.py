"""A run whose loss or weights are no longer finite numbers stops, on every rank, and says where that began.

To read a number is to wait for the device. So what training sees stays there, and is read where the trainer waits
anyway: before a training log, an evaluation and a checkpoint.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_prefopt.losses.base import LossOutput
from hf_prefopt.objective.objective import Objective
from hf_prefopt.reference.shards import is_zero3_partitioned, local_shard

# Micro-batches that are kept before they are looked at, and rows that an error names.
_KEPT, _NAMED = 1000, 8


@dataclass(frozen=True)
class Seen:
    """What an objective was given and gave back for some examples.

    Attributes:
        rows: `[B]`, the examples' rows in their data set.
        inputs: what the losses were given, `[B]` or `[B, K]`; what they were given of tokens is left out.
        losses: `[B]` by the name of the loss, and under "" what the step takes the mean of.
    """

    rows: Tensor
    inputs: dict[str, Tensor]
    losses: dict[str, Tensor]

    @classmethod
    def of(cls, objective: Objective, rows: Tensor, inputs: Mapping[str, Tensor], output: LossOutput) -> "Seen":
        """Without gradients, and without looking at the numbers."""
        kept = {n: t.detach() for n, t in inputs.items() if t.is_floating_point() and "token" not in n}
        names = [term.spec.name for term in objective.terms]
        losses = {name: output.components.get(name, output.losses).detach() for name in names}
        return cls(rows, kept, losses | {"": output.losses.detach()})

    def finding(self) -> tuple[bool, str] | None:
        """Whether the losses alone are to blame, and what is to be said; `None` where their sum is finite."""
        ruined = _not_finite(self.losses[""])
        if not ruined.any():
            return None
        inputs = {name: _not_finite(values) & ruined for name, values in self.inputs.items()}
        suspects = torch.stack([*inputs.values(), torch.zeros_like(ruined)]).any(0)
        alone = not suspects.any()
        which = ruined if alone else suspects
        blamed = [name for name, bad in inputs.items() if bad.any()]
        losses = [name for name, values in self.losses.items() if name and _not_finite(values)[which].any()]
        value = self.losses[losses[0] if losses else ""][which][0].item()
        return alone, f"{_names(losses)} is {value} for {_listed(self.rows[which])}: {_cause(blamed)}"


def _not_finite(values: Tensor) -> Tensor:
    """`[B]` bool."""
    return ~values.isfinite().reshape(len(values), math.prod(values.shape[1:])).all(1)


def _names(losses: list[str]) -> str:
    return f"the loss {' + '.join(losses)}" if losses else "the weighted sum of the losses"


def _listed(rows: Tensor) -> str:
    numbers = sorted(set(rows.tolist()))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_NAMED]))}{more} of the data set"


def _cause(inputs: list[str]) -> str:
    if not inputs:
        return "what it was given there is finite, so its formula overflows, divides by 0 or takes the log of 0"
    of_models = [name for name in inputs if name.startswith(("policy_", "ref_"))]
    if not of_models:
        return f"it was given {', '.join(inputs)} there, which the data have wrong: correct these rows"
    return (
        f"it was given {', '.join(of_models)} there that are not finite, so the model's weights are ruined "
        "(by a high learning_rate, or by a gradient that was not finite: logging_steps=1 names its step) or its "
        "activations overflow (take bf16 in place of fp16): start from an earlier checkpoint"
    )


class FiniteRun:
    """What training has seen since it was last looked at."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self._seen: list[tuple[int, Seen]] = []
        self._is_finite: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is time to look, even if nothing is logged."""
        return len(self._seen) >= _KEPT

    def add(self, step: int, seen: Seen) -> None:
        """Keep a micro-batch; nothing waits for the device."""
        self._seen.append((step, seen))
        is_finite = seen.losses[""].isfinite().all()
        self._is_finite = is_finite if self._is_finite is None else self._is_finite & is_finite

    def check(self, accelerator: Accelerator, *others: str | None) -> None:
        """Look at what was kept, on all ranks together, and forget it.

        Args:
            others: what else this rank has found; `None` for nothing.

        Raises:
            FloatingPointError: on every rank, where any of them has found something; it tells of the earliest.
        """
        own = [] if self._is_finite is None or self._is_finite else self._findings()
        own += [(float("inf"), True, text) for text in others if text]
        self._forget()
        alone = accelerator.num_processes == 1
        if own if alone else accelerator.gather(torch.full((1,), bool(own), device=accelerator.device)).any():
            *_, text = min(gather_object(own))
            raise FloatingPointError(text)

    def _findings(self) -> list[tuple[float, bool, str]]:
        found = ((step, seen.finding()) for step, seen in self._seen)
        return [(step, finding[0], f"step {step}: {finding[1]}") for step, finding in found if finding]


def ruined_weights(model: nn.Module) -> str | None:
    """What is to be said of trained weights that are not finite, of those that this rank holds."""
    extremes = {name: torch.stack(torch.aminmax(values)) for name, values in _held_weights(model)}
    if not extremes or torch.stack([pair.float().isfinite().all() for pair in extremes.values()]).all():
        return None
    name = next(name for name, pair in extremes.items() if not pair.float().isfinite().all())
    return (
        f"the weights of {name} are not finite, though the losses are: a gradient was not, as where a square root or a "
        "norm of 0 is differentiated. Nothing is saved: correct the loss's formula, start from an earlier checkpoint"
    )


def ruined_gradient(norm: float | None) -> str | None:
    """What is to be said of the norm of a gradient that is not finite."""
    if norm is None or math.isfinite(norm):
        return None
    return (
        f"the gradient's norm is {norm}, though the losses are finite, as where a square root or a norm of 0 is "
        "differentiated: correct the loss's formula"
    )


def _held_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        is_away = is_zero3_partitioned(parameter) and parameter.ds_tensor.status.name != "AVAILABLE"
        if parameter.requires_grad and not is_away and local_shard(parameter).numel():
            yield name, local_shard(parameter).detach()
