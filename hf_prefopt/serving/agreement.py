"""How the log-probs of a merged and reloaded model compare with those of the adapter on its base."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_prefopt.serving.token_logps import TokenLogps


class Agreement(NamedTuple):
    """How a merged and reloaded model compares with the trained one, over the scored tokens of some rows.

    Attributes:
        tokens: how many were compared.
        difference: the root mean square of log p(merged) − log p(trained), in nats per token.
        bound: what rounding may make of it.
        effect: the same of log p(trained) − log p(base): what the adapter does.
        dtype: the merged model's.
    """

    tokens: int
    difference: float
    bound: float
    effect: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"log-probs of the merged and the trained model differ by {self.difference:.2g} nats per token; "
            f"rounding to {str(self.dtype).removeprefix('torch.')} explains {self.bound:.2g}. The adapter changes them "
            f"by {self.effect:.2g} ({self.tokens:,} tokens, root mean squares)."
        )


def compare(
    merged: TokenLogps, trained: TokenLogps, untrained: TokenLogps, rounding: float, dtype: torch.dtype
) -> Agreement:
    """Compare the scored tokens of the same rows.

    Bounded is the root mean square over tokens, by 4u · (|z| + E|z|), for logits z and unit roundoff u of the dtype:
    rounding the weights changes what a block adds to the residual stream by about u of its size; later blocks pass this
    on, at most e times in all; the head adds u. e + 1 < 4.

    Args:
        rounding: 4u, or what sums in float32 in another order make of it, whichever is larger.
        dtype: the merged model's.
    """
    return Agreement(
        tokens=len(trained.logps),
        difference=_root_mean_square(merged.logps - trained.logps),
        bound=rounding * _root_mean_square(trained.sizes),
        effect=_root_mean_square(trained.logps - untrained.logps),
        dtype=dtype,
    )


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
