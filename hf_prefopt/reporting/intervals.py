"""Compute confidence intervals of accuracies. Examples that share a prompt are not treated as independent."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

# 95 % of a normal distribution lie within this many standard deviations of its mean.
Z_95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """The share of correct examples, with a 95 % confidence interval.

    Attributes:
        value: Share of correct examples. A tie counts half.
        low, high: Bounds of the interval. Different prompts are treated as independent, but not the examples of the
            same prompt.
        examples: Number of examples.
        prompts: Number of different prompts.
    """

    value: float
    low: float
    high: float
    examples: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict, for the record of the run."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def accuracy_of(correct: np.ndarray, prompts: Sequence[Hashable] | np.ndarray) -> Accuracy | None:
    """Compute the accuracy of B examples. Return `None` if all examples are excluded.

    Args:
        correct: `[B]`. 1 if an example is right, 0 if it is wrong, ½ for a tie; NaN excludes an example.
        prompts: `[B]`. An identifier of each example's prompt.
    """
    counted = ~np.isnan(correct)
    if not counted.any():
        return None
    values, clusters = correct[counted], np.unique(np.asarray(prompts)[counted], return_inverse=True)[1]
    low, high = wilson_interval(float(values.mean()), effective_size(values, clusters))
    return Accuracy(float(values.mean()), low, high, len(values), int(clusters.max()) + 1)


def effective_size(values: np.ndarray, clusters: np.ndarray) -> float:
    """Compute Kish's effective sample size: the number of independent examples whose mean has the same variance.

    There are n values x_i with mean x̄, in G clusters g. The result is n divided by the design effect. The design
    effect is the ratio of two estimates of the variance of the mean. One is the cluster-robust variance,
    G/(G−1) Σ_g (Σ_{i∈g} (x_i − x̄))² / n². The other is the variance for n independent examples,
    n/(n−1) Σ_i (x_i − x̄)² / n². The result is clipped to [1, n]. If all values are equal, their dependence cannot be
    estimated, and the result is G.

    Args:
        values: `[n]`. The values, such as 1 for a correct example.
        clusters: `[n]` int. Cluster index of each value, from 0 to G − 1.
    """
    n, groups = len(values), int(clusters.max()) + 1
    residuals = values - values.mean()
    independent = (residuals**2).sum()
    if groups < 2 or independent == 0:
        return float(groups)
    sums = np.bincount(clusters, weights=residuals)
    effect = (sums**2).sum() * groups / (groups - 1) / (independent * n / (n - 1))
    return float(np.clip(n / effect if effect > 0 else n, 1.0, n))


def wilson_interval(share: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Compute the Wilson score interval for a share p of n independent trials (E. B. Wilson 1927).

    The bounds are (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). The default of z gives a 95 % interval. If ties
    count half in p, the variance of p is below p(1−p)/n, so the interval is too wide rather than too narrow.

    Raises:
        ValueError: If the share is outside [0, 1] or n is below 1.
    """
    if not 0.0 <= share <= 1.0 or n < 1:
        raise ValueError(f"a share of n trials needs 0 <= share <= 1 and n >= 1, got share={share!r}, n={n!r}")
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half_width = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
