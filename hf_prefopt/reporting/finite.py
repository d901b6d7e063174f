"""Stop a run on every rank if a loss or a weight is not finite. The error names the first step with such a loss.

The host must wait for the device to read a value from it. Losses and inputs therefore stay on the device. They are read
only when the trainer waits for the device anyway: before a training log, an evaluation, or a checkpoint.
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

# Maximum number of micro-batches that are stored between two checks, and of rows that an error names.
_KEPT, _NAMED = 1000, 8


@dataclass(frozen=True)
class Seen:
    """The inputs and losses of some examples.

    Attributes:
        rows: `[B]`. Row indices of the examples in their dataset.
        inputs: Inputs of the losses, keyed by name, `[B]` or `[B, K]` each. Inputs per token are left out.
        losses: Losses of the examples, `[B]` each, keyed by the name of the loss. The key "" has the weighted sum of
            the losses.
    """

    rows: Tensor
    inputs: dict[str, Tensor]
    losses: dict[str, Tensor]

    @classmethod
    def of(cls, objective: Objective, rows: Tensor, inputs: Mapping[str, Tensor], output: LossOutput) -> "Seen":
        """Build from the detached inputs and losses. No value is read from the device."""
        kept = {n: t.detach() for n, t in inputs.items() if t.is_floating_point() and "token" not in n}
        names = [term.spec.name for term in objective.terms]
        losses = {name: output.components.get(name, output.losses).detach() for name in names}
        return cls(rows, kept, losses | {"": output.losses.detach()})

    def finding(self) -> tuple[bool, str] | None:
        """Describe losses that are not finite.

        Returns:
            A pair of a bool and the text of the error. The bool is True if all inputs of the affected examples are
            finite. `None` if the weighted sums of the losses of all examples are finite.
        """
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
    """Return a `[B]` bool mask: True for an example if any of its values is not finite."""
    return ~values.isfinite().reshape(len(values), math.prod(values.shape[1:])).all(1)


def _names(losses: list[str]) -> str:
    return f"the loss {' + '.join(losses)}" if losses else "the weighted sum of the losses"


def _listed(rows: Tensor) -> str:
    numbers = sorted(set(rows.tolist()))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_NAMED]))}{more} of the dataset"


def _cause(inputs: list[str]) -> str:
    if not inputs:
        return "all inputs of the loss are finite there, so its formula overflows, divides by 0 or takes the log of 0"
    of_models = [name for name in inputs if name.startswith(("policy_", "ref_"))]
    if not of_models:
        return f"the data have values that are not finite ({', '.join(inputs)}): correct these rows"
    return (
        f"the inputs {', '.join(of_models)} are not finite there. Either the model's weights are not finite "
        "(because of a high learning_rate or a gradient that was not finite: logging_steps=1 names its step), or its "
        "activations overflow (use bf16 instead of fp16). Start from an earlier checkpoint"
    )


class FiniteRun:
    """An object that stores the micro-batches of training since the last check, and checks their losses."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self._seen: list[tuple[int, Seen]] = []
        self._is_finite: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """True if the maximum number of micro-batches is stored. They must be checked before more are added."""
        return len(self._seen) >= _KEPT

    @property
    def is_finite(self) -> Tensor | None:
        """`[]` bool, on the device of the losses. True if all stored losses are finite. `None` if none is stored."""
        return self._is_finite

    def add(self, step: int, seen: Seen) -> None:
        """Store a micro-batch, without waiting for the device."""
        self._seen.append((step, seen))
        is_finite = seen.losses[""].isfinite().all()
        self._is_finite = is_finite if self._is_finite is None else self._is_finite & is_finite

    def check(self, accelerator: Accelerator, *others: str | None) -> None:
        """Check the stored micro-batches on all ranks together, and remove them.

        Args:
            others: Texts that describe other problems found on this rank; `None` for no problem.

        Raises:
            FloatingPointError: Any rank found a problem. The error is raised on every rank, and describes the problem
                at the earliest step.
        """
        is_finite = self._is_finite is None or bool(self._is_finite)
        is_ruined = not is_finite or any(others)
        if accelerator.num_processes > 1:
            is_ruined = bool(accelerator.gather(torch.full((1,), is_ruined, device=accelerator.device)).any())
        self.settle(is_finite, is_ruined, *others)

    def settle(self, is_finite: bool, any_is_ruined: bool, *others: str | None) -> None:
        """Remove the stored micro-batches, and raise an error if any rank found a problem.

        The ranks must have exchanged before whether they found a problem.

        Args:
            is_finite: The property `is_finite` of this rank, as a Python bool; True if it is `None`.
            any_is_ruined: True if any rank found a problem.
            others: Texts that describe other problems found on this rank; `None` for no problem.

        Raises:
            FloatingPointError: See `check`.
        """
        own = [] if is_finite else self._findings()
        own += [(float("inf"), True, text) for text in others if text]
        self._forget()
        if any_is_ruined:
            *_, text = min(gather_object(own))
            raise FloatingPointError(text)

    def _findings(self) -> list[tuple[float, bool, str]]:
        found = ((step, seen.finding()) for step, seen in self._seen)
        return [(step, finding[0], f"step {step}: {finding[1]}") for step, finding in found if finding]


def ruined_weights(model: nn.Module) -> str | None:
    """Return an error text if any trainable weight that is stored on this rank is not finite, otherwise None."""
    extremes = {name: torch.stack(torch.aminmax(values)) for name, values in _held_weights(model)}
    if not extremes or torch.stack([pair.float().isfinite().all() for pair in extremes.values()]).all():
        return None
    name = next(name for name, pair in extremes.items() if not pair.float().isfinite().all())
    return (
        f"the weights of {name} are not finite, but all losses are finite: a gradient was not finite, for example the "
        "derivative of a square root or a norm at 0. Nothing is saved: correct the loss's formula, and start from an "
        "earlier checkpoint"
    )


def ruined_gradient(norm: float | None) -> str | None:
    """Return an error text if the norm of the gradient is not finite, otherwise None."""
    if norm is None or math.isfinite(norm):
        return None
    return (
        f"the gradient's norm is {norm}, but all losses are finite: the loss may contain the derivative of a square "
        "root or a norm at 0. Correct the loss's formula"
    )


def _held_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        is_away = is_zero3_partitioned(parameter) and parameter.ds_tensor.status.name != "AVAILABLE"
        if parameter.requires_grad and not is_away and local_shard(parameter).numel():
            yield name, local_shard(parameter).detach()
