"""Losses of both log-ratios, r_w and r_l."""

import numpy as np

from tests.losses.numpy_reference.basics import nll, sigmoid, two


def nca_pair(w, l, rw, rl, beta=0.01, **_):
    """2402.05369: −log σ(r_w) − ½ Σ_{w, l} log σ(−r)."""
    chosen, rejected = beta * (w - rw), beta * (l - rl)
    return -np.log(sigmoid(chosen)) - (np.log(sigmoid(-chosen)) + np.log(sigmoid(-rejected))) / 2, two(chosen, rejected)


def sppo_hard(w, l, rw, rl, beta=0.001, **_):
    """2405.00675 eq. 4.7: (log π/π_ref − η(P − ½))² of both responses, η = 1/β, P = 1 and 0."""
    eta = 1 / beta
    losses = (w - rw - eta * (1 - 0.5)) ** 2 + (l - rl - eta * (0 - 0.5)) ** 2
    return losses, two(beta * (w - rw), beta * (l - rl))


def cal_dpo(w, l, rw, rl, beta=1e-3, calibration_weight=0.5, **_):
    """2412.14516: the contrast of unscaled log-ratios, and their squared distance from r*/β, r* = ±½."""
    chosen, rejected = w - rw, l - rl
    calibration = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return nll(chosen - rejected) + calibration_weight * calibration, two(beta * chosen, beta * rejected)


def apo_zero(w, l, rw, rl, beta=0.1, **_):
    """2408.06266 eq. 7, negated and shifted: (1 − σ(r_w)) + σ(r_l)."""
    chosen, rejected = beta * (w - rw), beta * (l - rl)
    return 1 - sigmoid(chosen) + sigmoid(rejected), two(chosen, rejected)


def apo_down(w, l, rw, rl, beta=0.1, **_):
    """2408.06266 eq. 8: σ(r_w) + (1 − σ(r_w − r_l))."""
    chosen, rejected = beta * (w - rw), beta * (l - rl)
    return sigmoid(chosen) + 1 - sigmoid(chosen - rejected), two(chosen, rejected)


def dpop(w, l, rw, rl, beta=0.3, lambda_coef=50.0, **_):
    """2402.13228 eq. 3: the penalty is max(0, log π_ref(y_w)/π(y_w))."""
    z = beta * ((w - rw) - (l - rl) - lambda_coef * np.maximum(0, rw - w))
    return nll(z), two(beta * (w - rw), beta * (l - rl))


def r_dpo(w, l, rw, rl, nw, nl, beta=0.1, alpha=0.05, **_):
    """2403.19159: the DPO margin + (α|y_w| − α|y_l|)."""
    z = beta * ((w - rw) - (l - rl)) + (alpha * nw - alpha * nl)
    return nll(z), two(beta * (w - rw) + alpha * nw, beta * (l - rl) + alpha * nl)


def dpo_shift(w, l, rw, rl, beta=0.1, lambda_coef=0.7, lambda_end=None, progress=1.0, **_):
    """2502.07599: β log-ratio of the chosen minus f(λ) = λ times that of the rejected, with λ linear in the steps."""
    if lambda_end is not None:
        lambda_coef = (1 - progress) * lambda_coef + progress * lambda_end
    return nll(beta * (w - rw) - lambda_coef * beta * (l - rl)), two(beta * (w - rw), beta * (l - rl))


def chi_po(w, l, rw, rl, beta=0.1, reward_bound=None, **_):
    """2407.13399 algorithm 1: φ(z) = z + log z of the density ratios, the difference clipped at ±2R."""
    chosen, rejected = (beta * (z + np.log(z)) for z in (np.exp(w - rw), np.exp(l - rl)))
    bound = np.inf if reward_bound is None else 2 * reward_bound
    return nll(np.clip(chosen - rejected, -bound, bound)), two(chosen, rejected)
