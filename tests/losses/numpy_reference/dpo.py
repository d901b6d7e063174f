"""DPO and the functions of its margin."""

import numpy as np

from tests.losses.numpy_reference.basics import nll, sigmoid, two


def dpo(w, l, rw, rl, beta=0.1, label_smoothing=0.0, D=0.0, Pw=None, **_):
    """If a label has probability P, its flip has probability 1 − P."""
    z = beta * ((w - rw) - (l - rl)) - D
    label_smoothing = label_smoothing if Pw is None else 1 - Pw
    losses = (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z)
    return losses, two(beta * (w - rw), beta * (l - rl))


def dpo_norm(w, l, rw, rl, nw, nl, beta=5.0, label_smoothing=0.0, D=0.0, Pw=None, **_):
    label_smoothing = label_smoothing if Pw is None else 1 - Pw
    chosen, rejected = (w - rw) / nw, (l - rl) / nl
    z = beta * (chosen - rejected) - D
    return (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z), two(beta * chosen, beta * rejected)


def ipo(w, l, rw, rl, nw, nl, beta=0.1, length_normalize=True, **_):
    chosen, rejected = w - rw, l - rl
    if length_normalize:
        chosen, rejected = chosen / nw, rejected / nl
    return (chosen - rejected - 0.5 / beta) ** 2, two(beta * chosen, beta * rejected)


def hinge(w, l, rw, rl, beta=0.05, D=0.0, **_):
    return np.maximum(0.0, 1 + D - beta * ((w - rw) - (l - rl))), two(beta * (w - rw), beta * (l - rl))


def wpo(w, l, rw, rl, aw, al, beta=0.1, label_smoothing=0.0, Pw=None, **_):
    losses, rewards = dpo(w, l, rw, rl, beta, label_smoothing, Pw=Pw)
    return np.minimum(1.0, np.exp(aw) * np.exp(al)) * losses, rewards


def robust(w, l, rw, rl, beta=0.1, label_smoothing=0.1, **_):
    """2403.00409: ((1 − ε) L(y_w, y_l) − ε L(y_l, y_w)) / (1 − 2ε), L the DPO loss of a pair and of its flip."""
    (kept, rewards), (flipped, _) = dpo(w, l, rw, rl, beta), dpo(l, w, rl, rw, beta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing), rewards


def exo_pair(w, l, rw, rl, beta=0.1, label_smoothing=1e-3, **_):
    """2402.00856 eq. 16: KL(q ‖ p), q = softmax(β log π/π_ref) over the two responses, p = (1 − ε, ε)."""
    rewards = two(beta * (w - rw), beta * (l - rl))
    q = np.exp(rewards) / np.exp(rewards).sum(axis=-1, keepdims=True)
    p = np.array([1 - label_smoothing, label_smoothing])
    return (q * np.log(q / p)).sum(axis=-1), rewards


def discopop(w, l, rw, rl, beta=0.05, discopop_tau=0.05, **_):
    """2406.08414 eq. 5: (1 − σ(ρ/τ)) · logistic(ρ) + σ(ρ/τ) · exponential(ρ)."""
    z = beta * ((w - rw) - (l - rl))
    m = sigmoid(z / discopop_tau)
    return (1 - m) * np.log(1 + np.exp(-z)) + m * np.exp(-z), two(beta * (w - rw), beta * (l - rl))


def gpo(w, l, rw, rl, beta=0.1, function="logistic", **_):
    """2402.05749 table 1."""
    z = beta * ((w - rw) - (l - rl))
    value = {
        "logistic": np.log(1 + np.exp(-z)),
        "hinge": np.where(z < 1, 1 - z, 0),
        "square": (z - 1) ** 2,
        "exponential": np.exp(-z),
        "truncated_square": np.where(z < 1, (1 - z) ** 2, 0),
        "savage": 1 / (1 + np.exp(z)) ** 2,
    }[function]
    return value, two(beta * (w - rw), beta * (l - rl))


def cauchy(w, l, rw, rl, beta=0.1, **_):
    """−log of the standard Cauchy distribution function at βh."""
    z = beta * ((w - rw) - (l - rl))
    return -np.log(np.arctan(z) / np.pi + 0.5), two(beta * (w - rw), beta * (l - rl))


def focal_po(w, l, rw, rl, beta=0.1, gamma=0.05, **_):
    """2501.06645: −p^γ log p."""
    p = sigmoid(beta * ((w - rw) - (l - rl)))
    return -(p**gamma) * np.log(p), two(beta * (w - rw), beta * (l - rl))
