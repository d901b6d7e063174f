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
    """Return the loss of each sorted difference, at the place of the example that
    has the corresponding value in `own`.
    """
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


def _spread(gap):
    return np.std(gap, ddof=1) if len(gap) > 1 else 0.0


def _splitmix(*keys):
    """A number in (0, 1) from integers: SplitMix64's step and mixing for each, in unsigned arithmetic."""
    mixed, mask = 0, (1 << 64) - 1
    for key in keys:
        mixed = (mixed + int(key) + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
    return ((mixed >> 41) + 0.5) / 2**23


def beta_dpo(w, l, rw, rl, row, place, beta=0.1, a=0.6, rho=0.2, state=None):
    """2407.08639, for one batch with or without a state (mean, std, batches): the batch-level β, and the filter."""
    gap = (w - rw) - (l - rl)
    mean, std, batches = (gap.mean(), _spread(gap), 0) if state is None else state
    weights = np.exp(-0.5 * ((gap - mean) / max(std, 1e-8)) ** 2)
    # Successive draws with these weights are the earliest exponential arrivals with these rates.
    arrivals = [-np.log(_splitmix(batches, r, p)) / rate for r, p, rate in zip(row, place, weights, strict=True)]
    kept = np.argsort(arrivals)[: max(1, int(len(gap) * (1 - rho)))]
    used = max(1e-3, beta * (1 + a * (gap[kept].mean() - mean)))
    losses = np.zeros_like(gap)
    losses[kept] = nll(used * gap[kept]) * len(gap) / len(kept)
    return losses, two(beta * (w - rw), beta * (l - rl))


def alpha_dpo(w, l, rw, rl, nw, nl, beta=10.0, gamma=None, gamma_beta_ratio=None, alpha=0.2, state=None):
    """2410.10148, for one batch with or without a state (mean, std): σ(u(x, y_w, y_l)) with the target γ + αM*."""
    ratio = gamma / beta if gamma is not None else (0.4 if gamma_beta_ratio is None else gamma_beta_ratio)
    gap = (w - rw) / nw - (l - rl) / nl
    mean, std = (gap.mean(), _spread(gap)) if state is None else state
    u = w / nw - l / nl - (ratio + alpha * (gap - mean) / max(std, 1e-8))
    return nll(beta * u), two(beta * w / nw, beta * l / nl)
