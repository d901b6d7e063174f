"""What is measured beside the loss: per example, then averaged exactly, in training and in evaluation."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, join_examples
from hf_prefopt.kinds import ExampleKind, Figure
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.objective.objective import Objective
from hf_prefopt.reporting.finite import Seen


def example_metrics(kind: ExampleKind, output: LossOutput, inputs: dict[str, Tensor]) -> dict[str, Figure]:
    """The metrics of each example: the loss's components, and those of its kind, under TRL's names."""
    components = {f"loss/{name}": Figure(values) for name, values in output.components.items()}
    return components | kind.figures(output.rewards, inputs)


class RunningMeans:
    """Means over the examples seen since the last time they were asked for, summed where the tensors are.

    Adding never waits for the device; asking gathers once over all ranks.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, metrics: dict[str, Figure]) -> None:
        """Count the examples of a batch."""
        for name, figure in metrics.items():
            self._sums[name] = self._sums[name] + figure.total if name in self._sums else figure.total
            self._counts[name] = self._counts.get(name, 0) + figure.count

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over the examples of all ranks; counting starts again. What no example has is left out."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        counts = torch.stack([torch.as_tensor(count, device=sums.device) for count in self._counts.values()])
        totals = accelerator.reduce(torch.stack([sums, counts.to(sums.dtype)]), reduction="sum").T.tolist()
        names = list(self._sums)
        self.__init__()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}


class EvaluationRecord:
    """The loss inputs of every example of an evaluation, so that its figures are of the rows and not of the batches.

    Examples that do not count, because their rows come a second time to even out the ranks, are left out; a loss that
    compares examples compares all of the others.
    """

    def __init__(self):
        self._inputs: list[dict[str, Tensor]] = []

    def add(self, batch: PreferenceBatch, inputs: dict[str, Tensor]) -> None:
        """Keep the loss inputs of a batch's examples; where the batch has `counted` `[B]`, of those."""
        counted = batch.get("counted", slice(None))
        kept = {**inputs, "rows": batch["rows"]}
        self._inputs.append({name: tensor.detach()[counted] for name, tensor in kept.items()})

    def metrics(self, objective: Objective, where: str = "evaluation") -> dict[str, float]:
        """The loss and the metrics over all examples of all ranks, by name.

        Args:
            where: for the error, which evaluation it is.

        Raises:
            ValueError: there is no example.
            FloatingPointError: the loss of an example is not finite; names its row.
        """
        if not self._inputs:
            raise ValueError("the data set that was to be evaluated gave no rows: nothing to take a mean of")
        own = {name: join_examples([part[name] for part in self._inputs]).cpu() for name in self._inputs[0]}
        ranks = gather_object([own])
        inputs = {name: join_examples([part[name] for part in ranks]) for name in own}
        output = objective(inputs, training=False)
        if finding := Seen.of(objective, inputs["rows"], inputs, output).finding():
            raise FloatingPointError(f"{where}: {finding[1]}")
        figures = {"loss": Figure(output.losses), **example_metrics(objective.kind, output, inputs)}
        means = {name: (figure.total / figure.count).item() for name, figure in figures.items() if figure.count}
        return objective.kind.conclude(means)
