"""Compare the log-probs of a merged model, loaded from its files, with those of the base model with its adapter."""

from typing import NamedTuple

import torch

from hf_prefopt.serving.token_logps import TokenLogps


class Agreement(NamedTuple):
    """The differences in log-probs between the merged model and the trained model (base with adapter).

    Attributes:
        tokens: Number of compared tokens.
        difference: Median of |log p(merged) − log p(trained)| over the tokens, in nats.
        largest: Maximum of |log p(merged) − log p(trained)| over the tokens, in nats.
        bound: Largest value of `difference` that rounding can explain, in nats.
        effect: Median of |log p(trained) − log p(base)| over the tokens, in nats. This is the effect of the adapter.
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
    """Compare the log-probs of three models for the scored tokens of the same rows.

    The bound of the median of |log p(merged) − log p(trained)| over the tokens is 4u times the median of |z| + E|z|.
    Here, z is the logit of a token, E|z| the mean of |z| over the predicted distribution, and u the unit roundoff of
    the dtype. The reason is that rounding the weights changes the output of each block by a relative error of about u.
    Later blocks amplify this error by a factor of at most e = 2.718… in total, and the head adds another error of u.
    Together, this is (e + 1)u < 4u. The largest difference has no bound: in a mixture of experts, rounding can change
    the selected expert if two experts have almost equal scores.

    Args:
        merged, trained, untrained: Log-probs under the merged model, the base model with its adapter, and the base
            model without it.
        rounding: 4u. If summing in float32 in a different order causes a larger relative error, it is that error.
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
