"""Compute the metrics of training and evaluation for each example, and average them exactly over examples."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, join_examples
from hf_prefopt.kinds import Metric
from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.objective.objective import AUX_LOSS, Objective
from hf_prefopt.reporting.alarms import Alarms
from hf_prefopt.reporting.evaluated import Examples
from hf_prefopt.reporting.finite import FiniteRun, Seen, ruined_gradient
from hf_prefopt.reporting.observed import Responses, join, observed_in

logger = logging.getLogger(__name__)

# The metrics of a log use the responses of at most this many micro-batches since the last log.
_OBSERVED = 1000

NO_GRADIENT = (
    "the gradient of step %d is exactly 0, so the step does not change the model (this warning appears once). Possible "
    "causes: all responses tie, all weights are 0, all labels are one that the loss ignores, the adapter is not active "
    "for these rows, or the loss has reached its margin"
)


def example_metrics(objective: Objective, output: LossOutput, inputs: dict[str, Tensor]) -> dict[str, Metric]:
    """Compute the metrics of each example, with TRL's names.

    They are the components of the loss, and the metrics for the kind of examples.
    """
    components = {f"loss/{name}": Metric(values) for name, values in output.components.items()}
    aux_loss = {AUX_LOSS: Metric(inputs[AUX_LOSS].detach())} if AUX_LOSS in inputs else {}
    metrics = components | aux_loss | objective.kind.metrics(output.rewards, inputs)
    return objective.as_logged(metrics, inputs)


def metric_names(objective: Objective) -> list[str]:
    """Return the names of the metrics of an evaluation, without the prefix `eval_`.

    The names are found by evaluating synthetic examples. Without a reference, an evaluation has the metrics
    `log_ratios/chosen` and `log_ratios/rejected` only if there was an evaluation at step 0.
    """
    inputs = made_up_examples(dict.fromkeys((*objective.inputs, *objective.kind.metric_inputs)))
    output = objective(inputs, training=False)
    means = dict.fromkeys(example_metrics(objective, output, inputs), 0.0)
    preferred = objective.kind.predictions(output.rewards, inputs)["labels"].numpy()
    ones = np.ones(preferred.shape)
    observed = Responses(ones, ones, preferred, *([ones, ones] if objective.needs_reference_model else []))
    own = {**objective.kind.finish_metrics(means), **observed.metrics(objective.kind)}
    since_start = () if objective.needs_reference_model else ("log_ratios/chosen", "log_ratios/rejected")
    return ["loss", *own, *since_start, *([AUX_LOSS] if objective.aux_loss_coef else [])]


class RunningMeans:
    """Sums and counts of metrics over all examples since the last call of `pop`, on the device of the tensors.

    No method waits for the device.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, metrics: dict[str, Metric]) -> None:
        """Add the metrics of a batch."""
        for name, metric in metrics.items():
            self._sums[name] = self._sums[name] + metric.total if name in self._sums else metric.total
            self._counts[name] = self._counts.get(name, 0) + metric.count

    def pop(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the sum and the number of values of each metric on this rank, and reset both to 0."""
        sums, counts = self._sums, self._counts
        self._sums, self._counts = {}, {}
        # torch.full creates the value on the device. Copying a value from the host would block the host.
        numbers = {
            name: torch.full((), count, device=sums[name].device) if isinstance(count, int) else count
            for name, count in counts.items()
        }
        return sums, numbers


@dataclass(frozen=True)
class OfRank:
    """The values that one rank has recorded since the last log, on the CPU.

    Attributes:
        sums, counts: Sum and number of the values of each metric, keyed by the metric's name.
        observed: Measurements of the responses from `observe`.
        is_finite: True if all losses are finite.
        is_ruined: True if the rank found a loss, a gradient or a weight that is not finite.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    observed: dict[str, Tensor]
    is_finite: bool
    is_ruined: bool


def copied(*groups: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Copy all tensors to the CPU as float64, all in one copy, because the host waits for the device in each copy."""
    tensors = [tensor for group in groups for tensor in group.values()]
    if not tensors:
        return [{} for _ in groups]
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    values = iter(
        torch.cat([tensor.to(wide).flatten() for tensor in tensors]).cpu().split([t.numel() for t in tensors])
    )
    return [{name: next(values).view(tensor.shape) for name, tensor in group.items()} for group in groups]


def means(ranks: Sequence[OfRank]) -> dict[str, float]:
    """Return the mean of each metric over the examples of all ranks. Metrics without examples are omitted."""
    totals = {
        name: [
            sum(float(getattr(rank, part)[name]) for rank in ranks if name in rank.sums) for part in ("sums", "counts")
        ]
        for name in dict.fromkeys(name for rank in ranks for name in rank.sums)
    }
    return {name: total / count for name, (total, count) in totals.items() if count}


class TrainingRecord:
    """Training results since the last log.

    They are running means of the metrics, measurements of the responses in the last 1,000 micro-batches, and the
    losses, which are checked for finite values.

    Args:
        objective: Objective whose outputs are recorded.

    Attributes:
        alarms: Alarms to which the responses are added at every log.
    """

    def __init__(self, objective: Objective):
        self._objective, self._means, self._finite = objective, RunningMeans(), FiniteRun()
        self._observed: deque[dict[str, Tensor]] = deque(maxlen=_OBSERVED)
        self._step, self.alarms, self._has_warned = 0, Alarms(), False

    @property
    def is_full(self) -> bool:
        """True if `check` must be called now, even if nothing is logged."""
        return self._finite.is_full

    def add(self, step: int, rows: Tensor, inputs: dict[str, Tensor], output: LossOutput) -> None:
        """Record examples of a step, without waiting for the device.

        Args:
            rows: `[B]`. Row indices of the examples in their dataset.
            inputs: Inputs of the losses, keyed by name.
        """
        self._means.add(example_metrics(self._objective, output, inputs))
        self._finite.add(step, Seen.of(self._objective, rows, inputs, output))
        self._step = step
        if observed := observed_in(inputs):
            self._observed.append(observed)

    def pop_means(self, accelerator: Accelerator, norm: float | None = None) -> dict[str, float]:
        """Return the means of the metrics over the examples of all ranks since the last call.

        Losses and gradient are checked for finite values, and the responses are added to the alarms.

        The host waits for the device only once, and the ranks exchange values only once. The first time that the
        gradient is 0, a warning is logged.

        Args:
            norm: Norm of the gradient; `None` if it was not computed.

        Raises:
            FloatingPointError: A loss or the gradient is not finite. The error is raised on every rank.
        """
        if accelerator.mixed_precision == "fp16":
            norm = None  # loss scaling skips steps whose gradients overflow
        ruined = ruined_gradient(norm)
        own = self._pop_own(bool(ruined))
        ranks = [own] if accelerator.num_processes == 1 else gather_object([own])
        self._finite.settle(own.is_finite, any(rank.is_ruined for rank in ranks), ruined)
        if norm is not None and float(norm) == 0 and accelerator.is_main_process and not self._has_warned:
            self._has_warned = True
            logger.warning(NO_GRADIENT, self._step)
        found = self._objective.kind.finish_metrics(means(ranks))
        responses = Responses.of(join(rank.observed for rank in ranks if rank.observed))
        if responses is None:
            return found
        for text in self.alarms.look(self._step, responses):
            if accelerator.is_main_process:
                logger.warning(text)
        return found | responses.metrics(self._objective.kind)

    def _pop_own(self, has_other_problems: bool) -> OfRank:
        """Return the values that this rank has recorded since the last call."""
        is_finite = {} if self._finite.is_finite is None else {"": self._finite.is_finite}
        flag, sums, counts, observed = copied(is_finite, *self._means.pop(), join(self._observed))
        self._observed.clear()
        finite = bool(flag.get("", True))
        return OfRank(sums, counts, observed, finite, not finite or has_other_problems)

    def check(self, accelerator: Accelerator, *others: str | None) -> None:
        """Stop the run on all ranks if a value is not finite; see `FiniteRun.check`."""
        self._finite.check(accelerator, *others)


class Evaluation:
    """The loss inputs of all examples of an evaluation, from which metrics are computed.

    Therefore, the metrics do not depend on how the examples are divided into batches.

    Rows that the data loader repeats, to give all ranks the same number of batches, are ignored. A loss that compares
    examples with each other compares all examples of the evaluation.

    Args:
        objective: Objective of the evaluation.
        dataset: Evaluated dataset.
        steps_on_device: Number of batches after which the stored inputs are moved to the CPU. `None`: they stay on the
            device until the evaluation ends.

    Attributes:
        examples: All examples of all ranks. `metrics` sets them. `None` before that, and if the inputs have no entries
            that `observe` has added.
    """

    def __init__(self, objective: Objective, dataset: Any = None, steps_on_device: int | None = None):
        self.dataset = dataset
        self._objective, self._steps_on_device = objective, steps_on_device
        self._inputs: list[dict[str, Tensor]] = []
        self._means: list[Tensor] = []  # the mean loss of each piece of the current batch
        self._added: list[Tensor] = []  # sums over examples of what an overridden `compute_loss` has added
        self.examples: Examples | None = None

    def add(self, batch: PreferenceBatch, inputs: dict[str, Tensor]) -> LossOutput:
        """Store the loss inputs of a batch, without repeated rows.

        Returns:
            The objective's output for all examples of this batch.
        """
        kept = {name: tensor.detach() for name, tensor in {**inputs, "rows": batch["rows"]}.items()}
        if "counted" in batch:
            kept = {name: tensor[batch["counted"]] for name, tensor in kept.items()}
        self._inputs.append(kept)
        if self._steps_on_device and len(self._inputs) % self._steps_on_device == 0:
            self._inputs = [_on_cpu(part) for part in self._inputs]
        output = self._objective(inputs, training=False)
        self._means.append(output.loss)
        return output

    def returned(self, losses: Sequence[Tensor], pieces: Sequence[PreferenceBatch]) -> Tensor:
        """Store how much an overridden `compute_loss` has added to the mean losses of the pieces of a batch.

        Args:
            losses: The losses that `compute_loss` returned, in the order of the pieces.
            pieces: The pieces of the batch (see `LoaderBatch`).

        Returns:
            The mean of these losses.

        Raises:
            ValueError: The overridden method did not call the trainer's own `compute_loss`, so the examples are
                unknown.
        """
        means, self._means = self._means, []
        if len(means) != len(pieces):
            raise ValueError(
                "the overridden compute_loss does not call super().compute_loss(...), which collects the examples of "
                "an evaluation: call it, or override prediction_step and evaluation_loop, too"
            )
        for loss, mean, piece in zip(losses, means, pieces, strict=True):
            examples = piece["counted"].sum() if "counted" in piece else len(piece["rows"])
            self._added.append((loss.detach() - mean) * examples)
        return torch.stack(list(losses)).mean()

    def metrics(self, where: str = "evaluation") -> dict[str, float]:
        """Compute the loss and the metrics over all examples of all ranks, keyed by name.

        Args:
            where: Name of the evaluation in error messages.

        Raises:
            ValueError: If there is no example.
            FloatingPointError: If the loss of an example is not finite. The message names the row.
        """
        if not self._inputs:
            raise ValueError("the evaluation dataset is empty: pass a dataset with at least one row")
        parts = [_on_cpu(part) for part in self._inputs] if self._steps_on_device else self._inputs
        own = {name: join_examples([part[name] for part in parts]).cpu() for name in parts[0]}
        ranks = gather_object([own])
        inputs = {name: join_examples([part[name] for part in ranks]) for name in own}
        output = self._objective(inputs, training=False)
        if finding := Seen.of(self._objective, inputs["rows"], inputs, output).finding():
            raise FloatingPointError(f"{where}: {finding[1]}")
        found = {"loss": Metric(output.losses), **example_metrics(self._objective, output, inputs)}
        means = {name: (metric.total / metric.count).item() for name, metric in found.items() if metric.count}
        means["loss"] += sum(gather_object([sum(part.item() for part in self._added)])) / len(output.losses)
        self.examples = Examples.of(inputs, output.rewards)
        observed = self.examples.responses.metrics(self._objective.kind) if self.examples else {}
        return self._objective.kind.finish_metrics(means) | observed


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
