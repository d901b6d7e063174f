"""What a run optimises, in a line for each loss: at its start, where a wrong β is still cheap."""

import logging
from collections.abc import Callable, Iterator

from transformers import TrainerCallback

from hf_prefopt.objective.objective import Objective

logger = logging.getLogger(__name__)


def loss_lines(objective: Objective) -> Iterator[str]:
    """Name, weight, every hyperparameter and modifier: `loss: 0.5 × simpo, beta=2.0, gamma=None`."""
    for term in objective.terms:
        settings = [f"{name}={value!r}" for name, value in term.hyperparameters.items()]
        settings += ["reference_free=True"] * term.reference_free
        settings += [modifier.setting for modifier in term.modifiers]
        yield ", ".join([f"loss: {term.weight:g} × {term.spec.name}", *settings])


class SayLosses(TrainerCallback):
    """Logs the losses of an objective, once for all ranks, whenever training begins.

    Args:
        objective: gives the objective of the run, which each trial of a search has anew.
    """

    def __init__(self, objective: Callable[[], Objective]):
        self._objective = objective

    def on_train_begin(self, args, state, control, **_):
        """With the hyperparameters of this run, or of this trial of a search."""
        if state.is_world_process_zero:
            for line in loss_lines(self._objective()):
                logger.warning(line)
