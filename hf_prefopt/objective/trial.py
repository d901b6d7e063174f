"""Try a loss on synthetic examples when the objective is built, so that mistakes raise an error early."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.objective.term import Inputs, Term

# Tolerance for comparing the fp32 loss of an example alone and in a batch. The order of summation may differ, which
# causes errors of some units of 6e-8.
_ROUNDING = 1e-4


@torch.inference_mode(False)
@torch.enable_grad()
def try_loss(term: Term, evaluate: Callable[[Inputs], LossOutput], names: Iterable[str]) -> None:
    """Evaluate a loss on two synthetic examples.

    Args:
        term: The loss.
        evaluate: A function that takes the inputs and returns the output of the loss.
        names: The names of the inputs.

    Raises:
        ValueError: The loss rejects its hyperparameters, or is not finite with them; it changes its inputs in place; it
            depends on a tensor of its own that requires a gradient; or the loss of one example depends on the other
            example, although the loss is not registered with `needs_global_batch=True`.
    """
    inputs, name = made_up_examples(names), term.spec.name
    given = ", ".join(f"{key}={value!r}" for key, value in term.hyperparameters.items()) or "none"
    try:
        losses = evaluate(inputs).losses
    except TypeError as error:
        raise ValueError(f"loss {name!r}: {error}; check its formula and its hyperparameters ({given})") from error
    changed = [given for given, tensor in inputs.items() if tensor._version]
    if changed:
        raise ValueError(
            f"loss {name!r} changes its input {changed[0]} in place, but other losses, metrics and caches read it, "
            "too: compute a new tensor (x = x - 1 instead of x -= 1)"
        )
    if losses.requires_grad:
        raise ValueError(
            f"loss {name!r} depends on a parameter of its own that requires a gradient, which no optimizer trains: "
            "make it a hyperparameter, or call requires_grad_(False) on it"
        )
    if not losses.isfinite().all():
        raise ValueError(
            f"loss {name!r} is {losses.tolist()} for two synthetic examples: check its formula and its hyperparameters "
            f"({given})"
        )
    if not term.spec.needs_global_batch and _depends_on_others(losses, inputs, evaluate):
        raise ValueError(
            f"the loss {name!r} of an example depends on the other examples of the batch, so it would depend on how a "
            "step is split: register it with needs_global_batch=True"
        )


def _depends_on_others(losses: Tensor, inputs: Inputs, evaluate: Callable[[Inputs], LossOutput]) -> bool:
    """Return whether the first example alone has another loss than in the batch.

    Return False for a random loss, which also differs between two evaluations of the batch.
    """
    alone = evaluate({name: tensor[:1] for name, tensor in inputs.items()}).losses
    is_same = torch.allclose(alone, losses[:1], rtol=_ROUNDING, atol=_ROUNDING)
    return not is_same and torch.equal(evaluate(inputs).losses, losses)
