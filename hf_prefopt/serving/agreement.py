"""How the log-probs of a merged and reloaded model compare with those of the adapter on its base."""

from typing import NamedTuple

import torch

from hf_prefopt.serving.token_logps import TokenLogps


class Agreement(NamedTuple):
    """How a merged and reloaded model compares with the trained one, over the scored tokens of some rows.

    Attributes:
        tokens: how many were compared.
        difference: the median of |log p(merged) − log p(trained)|, in nats. largest: the largest one.
        bound: what rounding may make of the median.
        effect: the median of |log p(trained) − log p(base)|: what the adapter does.
        dtype: the merged model's.
    """

    tokens: int
    difference: float
    largest: float
    bound: float
    effect: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"log-probs of {self.tokens:,} tokens differ between the merged and the trained model by "
            f"{self.difference:.2g} nats in the median, {self.largest:.2g} at most; rounding to "
            f"{str(self.dtype).removeprefix('torch.')} explains a median of {self.bound:.2g}. The adapter "
            f"changes them by {self.effect:.2g}."
        )


def compare(
    merged: TokenLogps, trained: TokenLogps, untrained: TokenLogps, rounding: float, dtype: torch.dtype
) -> Agreement:
    """Compare the scored tokens of the same rows.

    Bounded is the median over tokens, by 4u · (|z| + E|z|), for logits z and unit roundoff u of the dtype:
    rounding the weights changes what a block adds to the residual stream by about u of its size; later blocks pass this
    on, at most e times in all; the head adds u. e + 1 < 4. The largest difference is not bounded: where a mixture
    of experts has two that score nearly alike, rounding decides which one is taken.

    Args:
        rounding: 4u, or what sums in float32 in another order make of it, whichever is larger.
        dtype: the merged model's.
    """
    off = (merged.logps - trained.logps).abs()
    return Agreement(
        tokens=len(trained.logps),
        difference=float(off.median()),
        largest=float(off.max()),
        bound=rounding * float(trained.sizes.median()),
        effect=float((trained.logps - untrained.logps).abs().median()),
        dtype=dtype,
    )
