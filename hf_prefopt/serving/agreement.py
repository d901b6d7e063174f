"""Comparison of log-probs: the merged and reloaded model against the base model with its adapter."""

from typing import NamedTuple

import torch

from hf_prefopt.serving.token_logps import TokenLogps


class Agreement(NamedTuple):
    """The differences in log-probs between the merged model and the trained model (base with adapter).

    Attributes:
        tokens: Number of compared tokens, which are the scored tokens of some rows.
        difference: Median of |log p(merged) − log p(trained)|, in nats. largest: Maximum, in nats.
        bound: Largest median that rounding explains, in nats.
        effect: Median of |log p(trained) − log p(base)|, the effect of the adapter, in nats.
        dtype: Dtype of the merged model.
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
            f"{str(self.dtype).removeprefix('torch.')} explains a median of {self.bound:.2g}. The adapter changes "
            f"the log-probs by {self.effect:.2g} in the median."
        )


def compare(
    merged: TokenLogps, trained: TokenLogps, untrained: TokenLogps, rounding: float, dtype: torch.dtype
) -> Agreement:
    """Compare the scored tokens of the same rows.

    The median of |log p(merged) − log p(trained)| over the tokens is bounded by 4u times the median of |z| + E|z|.
    Here, z is the logit of a token, E|z| the mean of |z| over the predicted distribution, and u the unit roundoff of
    the dtype. The reason is that rounding the weights changes the output of each block by a relative error of about u.
    Later blocks amplify this error by at most e in total, and the head adds an error of u; e + 1 < 4. The largest
    difference is not bounded, because rounding can change the selected expert in a mixture of experts if two experts
    have almost equal scores.

    Args:
        rounding: 4u, or the relative error of float32 sums in a different order if that is larger.
        dtype: Dtype of the merged model.
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
