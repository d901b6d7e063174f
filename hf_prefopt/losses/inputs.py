"""From the scores of a batch's responses to the named tensors that a loss's signature asks for."""

from collections.abc import Iterable

from torch import Tensor

from hf_prefopt.data.batch import PreferenceBatch, ResponseScores
from hf_prefopt.examples import KINDS


class _Once:
    """Scores whose statistics, which are sums over tokens, are each computed once."""

    def __init__(self, scores: ResponseScores | None):
        self._scores = scores

    def __getattr__(self, statistic: str) -> Tensor:
        value = getattr(self._scores, statistic)
        setattr(self, statistic, value)
        return value


def loss_inputs(
    names: Iterable[str], batch: PreferenceBatch, policy: ResponseScores, reference: ResponseScores | None
) -> dict[str, Tensor]:
    """The inputs of the examples of a batch, by the names that losses use for them (see `losses.registry`).

    Returns:
        Tensors `[B]`, or `[B, K]` of lists, by name; gradients flow to the policy's scores.
    """
    scores = {"policy": _Once(policy), "ref": _Once(reference)}
    kind_of = {name: next(kind for kind in KINDS if kind.takes(name)) for name in names}
    return {name: kind.find(name, batch, scores) for name, kind in kind_of.items()}
