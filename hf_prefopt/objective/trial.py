"""Try a loss on synthetic examples when a configuration is made: mistakes raise an error before anything is loaded."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.objective.term import Inputs, Term

# fp32 losses of an example alone and in a batch may be summed in another order: some roundings of 6e-8.
_ROUNDING = 1e-4


@torch.inference_mode(False)
@torch.enable_grad()
def try_loss(term: Term, evaluate: Callable[[Inputs], LossOutput], names: Iterable[str]) -> None:
    """Evaluate a loss on two synthetic examples.

    Args:
        term: The loss.
        evaluate: Function that evaluates it on inputs.
        names: The names of the inputs.

    Raises:
        ValueError: The loss rejects its hyperparameters or is not finite with them; it changes its inputs in place; it
            has trained parameters of its own; or the loss of one example depends on the other, although the loss is
            not registered with `needs_global_batch=True`.
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
    """Whether the first example has another loss alone; False for a loss that is random."""
    alone = evaluate({name: tensor[:1] for name, tensor in inputs.items()}).losses
    is_same = torch.allclose(alone, losses[:1], rtol=_ROUNDING, atol=_ROUNDING)
    return not is_same and torch.equal(evaluate(inputs).losses, losses)
