"""Losses without a reference."""

import numpy as np

from tests.losses.numpy_reference.basics import nll, two


def simpo(w, l, nw, nl, beta=2.0, gamma=None, gamma_beta_ratio=None, label_smoothing=0.0, D=0.0, **_):
    if gamma is None:
        gamma = beta * (0.5 if gamma_beta_ratio is None else gamma_beta_ratio)
    z = beta * (w / nw - l / nl) - gamma - D
    losses = (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z)
    return losses, two(beta * w / nw, beta * l / nl)


def cpo(w, l, nw, beta=0.1, cpo_alpha=1.0, label_smoothing=0.0, **_):
    z = beta * (w - l)
    losses = (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z)
    return losses + cpo_alpha * -(w / nw), two(beta * w, beta * l)


def orpo(w, l, nw, nl, beta=0.1, **_):
    p_w, p_l = np.exp(w / nw), np.exp(l / nl)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -w / nw + beta * nll(np.log(odds_ratio)), two(beta * w / nw, beta * l / nl)


def orpo_sequence(w, l, x, nw, nl, nx, beta=0.1, **_):
    losses, rewards = orpo(w, l, nw, nl, beta)
    return losses + w / nw - (x + w) / (nx + nw), rewards


def sft(w, nw, **_):
    return -w / nw, None


def slic_hf(w, l, nw, delta=1.0, lambda_coef=0.1, length_normalize=False, **_):
    """2305.10425: max(0, δ − log P(y⁺) + log P(y⁻)) − λ log P(y_ref), with y_ref = y⁺."""
    log_p_target = w / nw if length_normalize else w
    return np.maximum(0, delta - w + l) - lambda_coef * log_p_target, two(w, l)


def alphapo(w, l, nw, nl, beta=2.5, alpha=0.25, gamma=None, gamma_beta_ratio=None, label_smoothing=0.0, **_):
    """2501.03884: SimPO with the reward (1 − π^(−α/|y|)) / α, π^(1/|y|) the geometric mean probability of a token."""
    if gamma is None:
        gamma = beta * (0.1 / 2.5 if gamma_beta_ratio is None else gamma_beta_ratio)
    chosen, rejected = (beta * (1 - np.exp(s / n) ** -alpha) / alpha for s, n in ((w, nw), (l, nl)))
    z = chosen - rejected - gamma
    return (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z), two(chosen, rejected)


def simper(w, l, nw, nl, **_):
    """2502.00883: 1/perplexity of the rejected minus 1/perplexity of the chosen response."""
    perplexity_w, perplexity_l = np.exp(-w / nw), np.exp(-l / nl)
    return 1 / perplexity_l - 1 / perplexity_w, two(1 / perplexity_w, 1 / perplexity_l)


def repo(w, l, nw, nl, gamma=0.5, **_):
    """2503.07426: ReLU(−(M − γ)), M = s̄_w − s̄_l."""
    margin = w / nw - l / nl
    return np.maximum(0, -(margin - gamma)), two(w / nw, l / nl)
