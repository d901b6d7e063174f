"""Losses whose examples depend on each other."""

import numpy as np

from tests.losses.numpy_reference.basics import nll, sigmoid, two
from tests.losses.numpy_reference.dpo import dpo


def kto_pair(w, l, rw, rl, beta=0.1, **_):
    chosen, rejected = w - rw, l - rl
    z_w, z_l = max(0.0, chosen.mean()), max(0.0, rejected.mean())
    losses = 0.5 * ((1 - sigmoid(beta * (chosen - z_l))) + (1 - sigmoid(beta * (z_w - rejected))))
    return losses, two(beta * chosen, beta * rejected)


def _sorted_against(own, other, beta, label_smoothing):
    """The loss of each sorted difference, given back to the example whose `own` value stood there."""
    order = np.argsort(own)
    z = beta * (np.sort(own) - np.sort(other))
    losses = np.empty_like(own)
    losses[order] = (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z)
    return losses


def aot(w, l, rw, rl, beta=0.01, label_smoothing=0.0, **_):
    """2406.05882, paired."""
    return _sorted_against(w - l, rw - rl, beta, label_smoothing), two(beta * (w - rw), beta * (l - rl))


def aot_unpaired(w, l, rw, rl, beta=0.01, label_smoothing=0.0, **_):
    """2406.05882, unpaired."""
    return _sorted_against(w - rw, l - rl, beta, label_smoothing), two(beta * (w - rw), beta * (l - rl))


def dr_dpo(w, l, rw, rl, beta=0.1, beta_prime=1.0, **_):
    """2407.07880: −β′ log E exp(−ℓ/β′) = −β′ log E exp(log σ(βh)/β′), for every pair."""
    losses, rewards = dpo(w, l, rw, rl, beta)
    value = -beta_prime * np.log(np.mean(np.exp(-losses / beta_prime)))
    return np.full_like(losses, value), rewards
