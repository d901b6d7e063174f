"""Metrics in training and evaluation, measured per example and averaged exactly over examples."""

import logging
from collections import deque
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
from hf_prefopt.reporting.finite import FiniteRun, Seen
from hf_prefopt.reporting.observed import Responses, join, observed_in

logger = logging.getLogger(__name__)

# Maximum number of micro-batches since the last log whose responses are measured.
_OBSERVED = 1000

NO_GRADIENT = (
    "the gradient of step %d is exactly 0, so the step does not change the model (this warning appears once). Possible "
    "causes: all responses tie, all weights are 0, the adapter is not active for these rows, or the loss has reached "
    "its margin"
)


def example_metrics(objective: Objective, output: LossOutput, inputs: dict[str, Tensor]) -> dict[str, Metric]:
    """Compute the metrics of each example: the components of the loss and the metrics of the kind, with TRL's names."""
    components = {f"loss/{name}": Metric(values) for name, values in output.components.items()}
    aux_loss = {AUX_LOSS: Metric(inputs[AUX_LOSS].detach())} if AUX_LOSS in inputs else {}
    metrics = components | aux_loss | objective.kind.metrics(output.rewards, inputs)
    return objective.as_logged(metrics, inputs)


def metric_names(objective: Objective) -> list[str]:
    """Return the names of the metrics of an evaluation, without the prefix `eval_`, from made-up examples.

    Without a reference, `log_ratios/chosen` and `log_ratios/rejected` need an evaluation at step 0.
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
    """Means over all examples since the last call of `pop`, accumulated on the device of the tensors.

    `add` never waits for the device. `pop` gathers once over all ranks.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, metrics: dict[str, Metric]) -> None:
        """Add the metrics of a batch."""
        for name, metric in metrics.items():
            self._sums[name] = self._sums[name] + metric.total if name in self._sums else metric.total
            self._counts[name] = self._counts.get(name, 0) + metric.count

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over the examples of all ranks, and reset. Metrics without examples are omitted."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        # torch.full creates the value on the device; copying a host value would block the host.
        numbers = [torch.full((), n, device=sums.device) if isinstance(n, int) else n for n in self._counts.values()]
        counts = torch.stack(numbers)
        totals = accelerator.reduce(torch.stack([sums, counts.to(sums.dtype)]), reduction="sum").T.tolist()
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}


class TrainingRecord:
    """Training results since the last log: running means of the metrics, the responses of the last 1,000 micro-batches,
    and the losses that are checked for finite values.

    Args:
        objective: Objective whose outputs are recorded.

    Attributes:
        alarms: Alarms that check the responses at every log.
    """

    def __init__(self, objective: Objective):
        self._objective, self._means, self._finite = objective, RunningMeans(), FiniteRun()
        self._observed: deque[dict[str, Tensor]] = deque(maxlen=_OBSERVED)
        self._step, self.alarms, self._has_warned = 0, Alarms(), False

    @property
    def is_full(self) -> bool:
        """True if a call of `check` is due even if nothing is logged."""
        return self._finite.is_full

    def add(self, step: int, rows: Tensor, inputs: dict[str, Tensor], output: LossOutput) -> None:
        """Record examples of a step, without waiting for the device.

        Args:
            rows: `[B]`, row indices of the examples in their data set. inputs: Inputs of the losses, keyed by name.
        """
        self._means.add(example_metrics(self._objective, output, inputs))
        self._finite.add(step, Seen.of(self._objective, rows, inputs, output))
        self._step = step
        if observed := observed_in(inputs):
            self._observed.append(observed)

    def pop_means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over the examples of all ranks since the last call, and check the alarms."""
        means = self._objective.kind.finish_metrics(self._means.pop(accelerator))
        responses = self._pop_responses(accelerator)
        if responses is None:
            return means
        for text in self.alarms.look(self._step, responses):
            if accelerator.is_main_process:
                logger.warning(text)
        return means | responses.metrics(self._objective.kind)

    def _pop_responses(self, accelerator: Accelerator) -> Responses | None:
        """Return the responses of all ranks since the last call."""
        joined = join(self._observed)
        self._observed.clear()
        own: dict[str, Tensor] = {}
        if joined:  # one copy from the device for all of them
            wide = torch.float32 if joined[next(iter(joined))].device.type == "mps" else torch.float64
            packed = torch.stack([values.to(wide) for values in joined.values()]).cpu()
            own = dict(zip(joined, packed, strict=True))
        ranks = [own] if accelerator.num_processes == 1 else gather_object([own])
        return Responses.of(join(rank for rank in ranks if rank))

    def notice_gradient(self, norm: float | None, step: int) -> None:
        """Warn once per run if the gradient of a step is exactly 0."""
        if norm is not None and float(norm) == 0 and not self._has_warned:
            self._has_warned = True
            logger.warning(NO_GRADIENT, step)

    def check(self, accelerator: Accelerator, *others: str | None) -> None:
        """Stop the run on all ranks if a value is not finite; see `FiniteRun.check`."""
        self._finite.check(accelerator, *others)


class Evaluation:
    """The loss inputs of all examples of an evaluation. The metrics computed from them do not depend on the batches.

    Rows that the data loader repeats, to give all ranks the same number of batches, are ignored. A loss that compares
    examples with each other compares all examples of the evaluation.

    Args:
        objective: Objective of the evaluation.
        dataset: Evaluated data set.
        steps_on_device: Number of batches after which stored inputs move to the CPU. `None`: they stay on the device.

    Attributes:
        examples: All examples of all ranks, set by `metrics`. `None` if the inputs have no entries of `observe`.
    """

    def __init__(self, objective: Objective, dataset: Any = None, steps_on_device: int | None = None):
        self.dataset = dataset
        self._objective, self._steps_on_device = objective, steps_on_device
        self._inputs: list[dict[str, Tensor]] = []
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
        return self._objective(inputs, training=False)

    def metrics(self, where: str = "evaluation") -> dict[str, float]:
        """Compute the loss and the metrics over all examples of all ranks, keyed by name.

        Args:
            where: Name of the evaluation in error messages.

        Raises:
            ValueError: If there is no example.
            FloatingPointError: If the loss of an example is not finite. The message names the row.
        """
        if not self._inputs:
            raise ValueError("the evaluation data set is empty: pass a data set with at least one row")
        parts = [_on_cpu(part) for part in self._inputs] if self._steps_on_device else self._inputs
        own = {name: join_examples([part[name] for part in parts]).cpu() for name in parts[0]}
        ranks = gather_object([own])
        inputs = {name: join_examples([part[name] for part in ranks]) for name in own}
        output = self._objective(inputs, training=False)
        if finding := Seen.of(self._objective, inputs["rows"], inputs, output).finding():
            raise FloatingPointError(f"{where}: {finding[1]}")
        found = {"loss": Metric(output.losses), **example_metrics(self._objective, output, inputs)}
        means = {name: (metric.total / metric.count).item() for name, metric in found.items() if metric.count}
        self.examples = Examples.of(inputs, output.rewards)
        observed = self.examples.responses.metrics(self._objective.kind) if self.examples else {}
        return self._objective.kind.finish_metrics(means) | observed


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
