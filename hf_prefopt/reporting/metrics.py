"""What is measured beside the loss: per example, then averaged exactly, in training and in evaluation."""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_prefopt.data.batch import PreferenceBatch, join_examples
from hf_prefopt.examples import ExampleKind, Figure
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.objective import Objective


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

    Rows that a sampler repeats to even out the ranks are counted once; a loss that compares examples compares all of
    them.
    """

    def __init__(self):
        self._examples: list[Tensor] = []
        self._inputs: list[dict[str, Tensor]] = []

    def add(self, batch: PreferenceBatch, inputs: dict[str, Tensor]) -> None:
        """Keep a batch's examples and their loss inputs."""
        self._examples.append(torch.stack([batch["rows"], batch["pair_in_row"]], dim=-1))
        self._inputs.append({name: tensor.detach() for name, tensor in inputs.items()})

    def metrics(self, objective: Objective) -> dict[str, float]:
        """The loss and the metrics over all examples of all ranks, by name."""
        examples = torch.cat(self._examples).cpu()
        inputs = {name: join_examples([part[name] for part in self._inputs]).cpu() for name in self._inputs[0]}
        ranks = gather_object([(examples, inputs)])
        if len(ranks) > 1:
            examples = torch.cat([part for part, _ in ranks])
            first = torch.from_numpy(np.unique(examples.numpy(), axis=0, return_index=True)[1])
            inputs = {name: join_examples([part[name] for _, part in ranks])[first] for name in inputs}
        output = objective(inputs)
        figures = {"loss": Figure(output.losses), **example_metrics(objective.kind, output, inputs)}
        means = {name: (figure.total / figure.count).item() for name, figure in figures.items() if figure.count}
        return objective.kind.conclude(means)
