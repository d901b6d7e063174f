"""BCO's underlying distribution matching: weights for the undesirable rows, computed once, before training.

If thumbs down come from other prompts than thumbs up, a classifier can tell them apart by the prompt alone. The weight
p/(1 − p) of an undesirable example corrects this; p is the probability that its prompt is that of a desirable example.

    rows = rows.add_column("weight", distribution_matching_weights(embed(rows["prompt"]), rows["label"]))

Embed prompts as you like, with a sentence encoder or by the mean of a model's last hidden states. The trainer reads the
column like any other `weight`. Only this file needs scikit-learn: `pip install "hf_prefopt[bco]"`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def distribution_matching_weights(
    embeddings: ArrayLike,
    labels: Sequence[bool],
    *,
    low: float = 0.5,
    high: float = 10.0,
    prompts_per_class: int = 1024,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The weights of unpaired examples: 1 if desirable, clamp(p/(1 − p), low, high) if not.

    p = P(desirable | embedding) comes from scikit-learn's logistic regression with its default L2 penalty (C = 1).
    Both classes have equal weight (`class_weight="balanced"`), so that p/(1 − p) is a ratio of densities whatever the
    counts. It is fitted to at most `prompts_per_class` prompts of each class, drawn without replacement. The default
    bounds and number of prompts are those of TRL's last BCO trainer, which draws from both classes together.

    Args:
        embeddings: `[N, D]`, finite: one of each example's prompt.
        labels: `[N]`, whether each example is desirable.
        low, high: 0 ≤ low ≤ high, the bounds of a weight.
        prompts_per_class: ≥ 1.
        seed: for drawing the prompts.

    Returns:
        `[N]` float64, in the order of the examples.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes differ, an embedding is not finite, there is only one class, or a value is out of range.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError('distribution_matching_weights needs scikit-learn: pip install "hf_prefopt[bco]"') from None
    prompts, desirable = _checked(np.asarray(embeddings, dtype=np.float64), np.asarray(labels))
    if not 0 <= low <= high:
        raise ValueError(f"low={low}, high={high}: bounds of a weight are 0 or more, the lower one first")
    if prompts_per_class < 1:
        raise ValueError(f"prompts_per_class={prompts_per_class}: give at least 1")
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(desirable == which))[:prompts_per_class] for which in (False, True)]
    fitted_to = np.concatenate(drawn)
    regression = LogisticRegression(class_weight="balanced", max_iter=1000)
    regression.fit(prompts[fitted_to], desirable[fitted_to])
    # The regression's log-odds are log(p/(1 − p)); they may overflow beyond the bounds.
    with np.errstate(over="ignore"):
        odds = np.exp(regression.decision_function(prompts))
    return np.where(desirable, 1.0, odds.clip(low, high))


def _checked(embeddings: NDArray[np.float64], labels: NDArray) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The embeddings `[N, D]` and whether each example is desirable."""
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings {embeddings.shape} and labels {labels.shape}: give a matrix [N, D] and a label for each row"
        )
    wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(wrong):
        raise ValueError(f"row {wrong[0]:,} (and {len(wrong) - 1:,} more): its embedding is not finite; leave it out")
    odd = next((row for row, label in enumerate(labels.tolist()) if label not in (True, False)), None)
    if odd is not None:
        raise ValueError(f"row {odd:,}: its label is {labels[odd]!r}; make it true (desirable) or false")
    desirable = labels.astype(bool)
    if desirable.all() or not desirable.any():
        raise ValueError(
            f"all {len(labels):,} examples are {'' if desirable.any() else 'un'}desirable: there is no other class to "
            "compare their prompts with"
        )
    return embeddings, desirable
