"""How sure an accuracy is, where several examples share a prompt and so are not independent of each other."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

# The two-sided 95 % point of the normal distribution.
Z_95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """A share of examples with its 95 % interval.

    Attributes:
        value: the share; a tie counts half.
        low, high: the interval, in which prompts count as independent, and not examples.
        examples, prompts: their numbers.
    """

    value: float
    low: float
    high: float
    examples: int
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        """For a record of the run."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def accuracy_of(correct: np.ndarray, prompts: Sequence[Hashable] | np.ndarray) -> Accuracy | None:
    """The accuracy of examples, `[B]` each; `None` if there are none.

    Args:
        correct: 1, ½ or 0 for each example; NaN for one that does not count.
        prompts: what tells the example's prompt from others.
    """
    counted = ~np.isnan(correct)
    if not counted.any():
        return None
    values, clusters = correct[counted], np.unique(np.asarray(prompts)[counted], return_inverse=True)[1]
    low, high = wilson_interval(float(values.mean()), effective_size(values, clusters))
    return Accuracy(float(values.mean()), low, high, len(values), int(clusters.max()) + 1)


def effective_size(values: np.ndarray, clusters: np.ndarray) -> float:
    """How many independent examples would give a mean of the same variance (Kish's effective sample size).

    n divided by the design effect: the cluster-robust variance of the mean, G/(G−1) Σ_g (Σ_{i∈g} (x_i − x̄))² / n²,
    over that of n independent examples, n/(n−1) Σ_i (x_i − x̄)² / n². It is at most n, and at least 1; the number of
    clusters where all values are equal, which tell nothing of their dependence.

    Args:
        values: `[n]`. clusters: `[n]` int, the cluster of each, numbered from 0.
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
    """The Wilson score interval of a share of n independent trials (E. B. Wilson 1927), 95 % by default.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). A share in which ties count half may be given: its variance is
    below p(1−p)/n, so the interval errs on the wide side.

    Raises:
        ValueError: the share is outside [0, 1] or n is below 1.
    """
    if not 0.0 <= share <= 1.0 or n < 1:
        raise ValueError(f"a share of n trials needs 0 <= share <= 1 and n >= 1, got share={share!r}, n={n!r}")
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half_width = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
