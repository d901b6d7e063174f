"""Losses of pairs with scores Rw, Rl or win rates Pw, Pl."""

import numpy as np

from tests.losses.numpy_reference.basics import nll, sigmoid, two


def odpo(w, l, rw, rl, Rw, Rl, beta=0.1, alpha=1.0, margin="difference"):
    """2402.10571: −log σ(β log-ratio difference − Δ_r), Δ_r = α log(score_w − score_l), or α log(score_w/score_l)."""
    offset = alpha * (np.log(Rw - Rl) if margin == "difference" else np.log(Rw) - np.log(Rl))
    return nll(beta * ((w - rw) - (l - rl)) - offset), two(beta * (w - rw), beta * (l - rl))


def _two_point(p, q):
    """KL of (p, 1 − p) from (q, 1 − q)."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def rpo_bwd(w, l, rw, rl, Rw, Rl, beta=0.2, eta=1.0):
    """2406.11704: the distance D of the implicit margin from η(r*_w − r*_l), D a KL of two Bernoulli distributions."""
    p, target = sigmoid(beta * ((w - rw) - (l - rl))), sigmoid(eta * (Rw - Rl))
    return _two_point(target, p), two(beta * (w - rw), beta * (l - rl))


def rpo_fwd(w, l, rw, rl, Rw, Rl, beta=0.2, eta=1.0):
    p, target = sigmoid(beta * ((w - rw) - (l - rl))), sigmoid(eta * (Rw - Rl))
    return _two_point(p, target), two(beta * (w - rw), beta * (l - rl))


def rpo_sq(w, l, rw, rl, Rw, Rl, beta=0.2, eta=1.0):
    return (beta * ((w - rw) - (l - rl)) - eta * (Rw - Rl)) ** 2, two(beta * (w - rw), beta * (l - rl))


def sppo(w, l, rw, rl, Pw, Pl=None, beta=0.001):
    """2405.00675, its squares of the two responses: the mean of (log π/π_ref − η(P − ½))², η = 1/β."""
    Pl = 1 - Pw if Pl is None else Pl
    squares = [(s - rs - (P - 0.5) / beta) ** 2 for s, rs, P in ((w, rw, Pw), (l, rl, Pl))]
    return np.mean(squares, axis=0), two(beta * (w - rw), beta * (l - rl))
