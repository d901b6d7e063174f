"""What is measured beside the loss: per example, then averaged exactly, in training and in evaluation."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_prefopt.data.batch import PreferenceBatch
from hf_prefopt.losses.base import LossOutput

# Inputs that the metrics read, whatever the loss does.
METRIC_INPUTS = ("policy_chosen_logps", "policy_rejected_logps")


def example_metrics(output: LossOutput, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of each example `[B]`, under TRL's names; a tie of rewards counts as half an accurate one."""
    metrics = {f"loss/{name}": values for name, values in output.components.items()}
    if output.rewards is not None:
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        metrics |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": ((chosen > rejected).float() + (chosen >= rejected).float()) / 2,
            "rewards/margins": chosen - rejected,
        }
    metrics |= {f"logps/{side}": inputs[f"policy_{side}_logps"] for side in ("chosen", "rejected")}
    return {name: values.detach() for name, values in metrics.items()}


class RunningMeans:
    """Means over the examples seen since the last time they were asked for, summed where the tensors are.

    Adding never waits for the device; asking gathers once over all ranks.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count the examples of a batch, each metric `[B]`."""
        for name, values in metrics.items():
            total = values.double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._count += len(next(iter(metrics.values())))

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over the examples of all ranks; counting starts again. Empty if nothing was added."""
        if not self._sums:
            return {}
        names = list(self._sums)
        count = torch.tensor(self._count, dtype=torch.float64, device=self._sums[names[0]].device)
        totals = accelerator.reduce(torch.stack([*self._sums.values(), count]), reduction="sum").tolist()
        self.__init__()
        return {name: total / totals[-1] for name, total in zip(names, totals, strict=False)}


class EvaluationRecord:
    """The loss inputs of every example of an evaluation, so that its figures are of the rows and not of the batches.

    Rows that a sampler repeats to even out the ranks are counted once; a loss that compares examples compares all of
    them.
    """

    def __init__(self):
        self._examples: list[Tensor] = []
        self._inputs: list[dict[str, Tensor]] = []

    def add(self, batch: PreferenceBatch, inputs: dict[str, Tensor]) -> None:
        """Keep a batch's examples and their loss inputs, each `[B]`."""
        self._examples.append(torch.stack([batch["rows"], batch["pair_in_row"]], dim=-1))
        self._inputs.append({name: tensor.detach() for name, tensor in inputs.items()})

    def metrics(self, objective: Callable[[dict[str, Tensor]], LossOutput]) -> dict[str, float]:
        """The loss and the metrics over all examples of all ranks, by name."""
        examples = torch.cat(self._examples).cpu()
        inputs = {name: torch.cat([part[name] for part in self._inputs]).cpu() for name in self._inputs[0]}
        ranks = gather_object([(examples, inputs)])
        if len(ranks) > 1:
            examples = torch.cat([part for part, _ in ranks])
            first = torch.from_numpy(np.unique(examples.numpy(), axis=0, return_index=True)[1])
            inputs = {name: torch.cat([part[name] for _, part in ranks])[first] for name in inputs}
        output = objective(inputs)
        values = {"loss": output.losses, **example_metrics(output, inputs)}
        return {name: tensor.double().mean().item() for name, tensor in values.items()}
