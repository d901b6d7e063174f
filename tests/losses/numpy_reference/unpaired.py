"""Losses of single responses: policy s, reference rs, labels y; policy m and reference rm of mismatched responses."""

import numpy as np

from tests.losses.numpy_reference.basics import nll, sigmoid, two


def kto(s, rs, m, rm, y, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, log_form=False):
    """2402.01306: λ_y − v(x, y), v = λ_D σ(β(r − z)) or λ_U σ(β(z − r)), without constants, as in the authors' code."""
    r, z = s - rs, max(0.0, np.mean(m - rm))
    value = np.where(y, sigmoid(beta * (r - z)), sigmoid(beta * (z - r)))
    return np.where(y, desirable_weight, undesirable_weight) * (-np.log(value) if log_form else 1 - value), one(
        beta * r
    )


def apo_zero_unpaired(s, rs, y, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """2408.06266 eq. 7, its two terms separately."""
    r = beta * (s - rs)
    return np.where(y, desirable_weight * (1 - sigmoid(r)), undesirable_weight * sigmoid(r)), one(r)


def npo(s, rs, y, beta=0.1):
    """2404.05868: −(2/β) log σ(−β log(π/π_ref)) on the forget set."""
    return np.where(y, 0.0, 2 / beta * nll(-beta * (s - rs))), one(beta * (s - rs))


def qrpo(s, rs, n, q, beta=0.003, length_normalize=False):
    """2507.08068 eq. 11: Z, the mean of e^(Q/β) for a uniform Q, is the integral of it from 0 to 1."""
    b = np.broadcast_to(beta / n if length_normalize else beta, s.shape)
    # The integral, from the antiderivative βe^(Q/β), with the largest exponent factored out.
    log_z = 1 / b + np.log(b) + np.log1p(-np.exp(-1 / b))
    return (q - b * log_z - b * (s - rs)) ** 2, one(b * (s - rs))


def sft_unpaired(s, n, y):
    return np.where(y, -s / n, 0.0), None


def bco(s, rs, y, beta=0.01):
    """2404.04656: a logistic regression on the reward minus its mean, for one batch."""
    r = beta * (s - rs)
    return np.where(y, nll(r - r.mean()), nll(r.mean() - r)), one(r)


def bco_pair(w, l, rw, rl, beta=0.01):
    """2404.04656 on pairs: the sum of both terms of a pair."""
    chosen, rejected = beta * (w - rw), beta * (l - rl)
    delta = (chosen.mean() + rejected.mean()) / 2
    return nll(chosen - delta) + nll(delta - rejected), two(chosen, rejected)


def one(rewards):
    return rewards[:, None]
