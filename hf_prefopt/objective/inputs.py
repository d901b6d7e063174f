"""From the scores of a batch's responses to the named tensors that a loss's signature asks for."""

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.kinds import KINDS


class ResponseStatistics:
    """What losses may ask of the responses of a batch under one model, each computed once and when it is asked for.

    Attributes:
        logps, alignment, entropy, normalized_entropy, kl, lengths: `[R]`, as `ResponseScores` has them.
        token_logps: `[R, T]`, log-prob (nats) of each response's scored tokens in their order, 0 behind its end; T is
            the longest response of the batch, the same for all its tensors.
        token_mask: `[R, T]` bool, False behind the end.
    """

    def __init__(self, scores: ResponseScores, longest: int):
        self._scores, self._longest = scores, longest

    @cached_property
    def token_logps(self) -> Tensor:
        return self._scores.by_response(self._scores.token_logps, self._longest)

    @cached_property
    def token_mask(self) -> Tensor:
        lengths = self._scores.lengths
        return torch.arange(self._longest, device=lengths.device) < lengths[:, None]

    def __getattr__(self, statistic: str) -> Tensor:
        value = getattr(self._scores, statistic)
        setattr(self, statistic, value)
        return value


def loss_inputs(
    names: Iterable[str], batch: PreferenceBatch, policy: ResponseScores, reference: ResponseScores | None
) -> dict[str, Tensor]:
    """The inputs of the examples of a batch, by the names that losses use for them (see `losses.registry`).

    Returns:
        Tensors `[B]`, `[B, T]` of tokens or `[B, K]` of lists, by name; gradients flow to the policy's scores.
    """
    given = {"policy": policy, "ref": reference}
    scores = {model: ResponseStatistics(scores, batch["longest_response"]) for model, scores in given.items() if scores}
    kind_of = {name: next(kind for kind in KINDS if kind.has_input(name)) for name in names}
    return {name: kind.input_of(name, batch, scores) for name, kind in kind_of.items()}
