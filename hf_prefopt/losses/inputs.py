"""From the scores of a batch's responses to the named tensors that a loss's signature asks for."""

from collections.abc import Iterable

from torch import Tensor

from hf_prefopt.data.batch import PreferenceBatch, ResponseScores


def loss_inputs(
    names: Iterable[str], batch: PreferenceBatch, policy: ResponseScores, reference: ResponseScores | None
) -> dict[str, Tensor]:
    """The inputs of the examples of a batch, by the names that losses use for them (see `losses.registry`).

    `{policy | ref}_{chosen | rejected}_{statistic}` is that statistic of that model (an attribute of
    `ResponseScores`, `[R]`), at each example's chosen or rejected response; `{side}_lengths` counts scored tokens.

    Returns:
        Tensors `[B]` by name; gradients flow to the policy's scores.
    """
    sources = {"policy": policy, "ref": reference}
    indices = {side: batch[side] for side in ("chosen", "rejected")}
    statistics: dict[tuple[str, str], Tensor] = {}

    def lookup(name: str) -> Tensor:
        first, _, rest = name.partition("_")
        if first in indices:
            return policy.lengths[indices[first]]
        side, _, statistic = rest.partition("_")
        if (first, statistic) not in statistics:
            statistics[first, statistic] = getattr(sources[first], statistic)
        return statistics[first, statistic][indices[side]]

    return {name: lookup(name) for name in names}
