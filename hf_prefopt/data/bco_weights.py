"""Underlying distribution matching (UDM) for BCO: compute weights for the undesirable rows once, before training.

If undesirable (thumbs-down) examples have different prompts than desirable (thumbs-up) examples, a classifier can
separate the two classes by the prompt alone. Let p be the probability that an example is desirable, given its prompt.
The weight p/(1 − p) of an undesirable example corrects this shift.

    rows = rows.add_column("weight", distribution_matching_weights(embed(rows["prompt"]), rows["label"]))

In this example, `embed` stands for any method that embeds prompts, such as a sentence encoder or the mean of a model's
last hidden states. The trainer reads the new column like any other column `weight`. Only this file needs scikit-learn:
`pip install "hf_prefopt[bco]"`.
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
    """Compute the weights of unpaired examples: 1 if desirable, otherwise clamp(p/(1 − p), low, high).

    p = P(desirable | embedding) is the output of scikit-learn's logistic regression with its default L2 penalty
    (C = 1). In the fit, both classes have equal total weight (`class_weight="balanced"`). Therefore, p/(1 − p)
    estimates the ratio of the two classes' prompt densities, whatever the class sizes. The regression is fitted to at
    most `prompts_per_class` prompts of each class, drawn without replacement. The default bounds and the default number
    of prompts are those of TRL's last BCO trainer. That trainer draws its prompts from both classes together.

    Args:
        embeddings: `[N, D]`. The embedding of each example's prompt. All values must be finite.
        labels: `[N]`. True if the example is desirable, False if it is undesirable.
        low, high: Bounds of the weight of an undesirable example, with 0 ≤ low ≤ high.
        prompts_per_class: Maximum number of prompts per class to which the regression is fitted, ≥ 1.
        seed: Seed for drawing these prompts.

    Returns:
        `[N]` float64. The weight of each example.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If `embeddings` and `labels` do not have matching shapes, an embedding is not finite, a label is
            neither true nor false, there is only one class, or another argument is out of range.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError('distribution_matching_weights needs scikit-learn: pip install "hf_prefopt[bco]"') from None
    prompts, desirable = _checked(np.asarray(embeddings, dtype=np.float64), np.asarray(labels))
    if not 0 <= low <= high:
        raise ValueError(f"low={low}, high={high}: the bounds of a weight must satisfy 0 <= low <= high")
    if prompts_per_class < 1:
        raise ValueError(f"prompts_per_class={prompts_per_class} must be at least 1")
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(desirable == which))[:prompts_per_class] for which in (False, True)]
    fitted_to = np.concatenate(drawn)
    regression = LogisticRegression(class_weight="balanced", max_iter=1000)
    regression.fit(prompts[fitted_to], desirable[fitted_to])
    # The decision function is log(p/(1 − p)). Its exponential may overflow to inf, which is then clipped to `high`.
    with np.errstate(over="ignore"):
        odds = np.exp(regression.decision_function(prompts))
    return np.where(desirable, 1.0, odds.clip(low, high))


def _checked(embeddings: NDArray[np.float64], labels: NDArray) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Check the arguments. Return the embeddings, `[N, D]`, and the labels as booleans, `[N]` (True if desirable)."""
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings {embeddings.shape} and labels {labels.shape}: pass a matrix [N, D] and one label per row"
        )
    wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(wrong):
        raise ValueError(f"row {wrong[0]:,} (and {len(wrong) - 1:,} more): the embedding is not finite; remove the row")
    odd = next((row for row, label in enumerate(labels.tolist()) if label not in (True, False)), None)
    if odd is not None:
        raise ValueError(f"row {odd:,}: the label is {labels[odd]!r}; make it true (desirable) or false")
    desirable = labels.astype(bool)
    if desirable.all() or not desirable.any():
        raise ValueError(
            f"all {len(labels):,} examples are {'' if desirable.any() else 'un'}desirable: the classifier needs "
            "examples of both classes"
        )
    return embeddings, desirable
