"""Functions that the equations share."""

import numpy as np


def nll(z):
    """ℓ(z) = −log σ(z), stable in float64."""
    return np.logaddexp(0.0, -z)


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def two(chosen, rejected):
    return np.stack([chosen, rejected], axis=-1)
