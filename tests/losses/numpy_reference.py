"""Every loss once more, in NumPy float64, written from the papers' equations and from nothing in the package.

Arguments are arrays [B]: policy and reference log-probs of chosen (w) and rejected (l) responses, their lengths n and
their log alignment weights a. Each function returns (losses [B], rewards [B, 2] or None).
"""

import numpy as np


def nll(z):
    """ℓ(z) = −log σ(z), stable in float64."""
    return np.logaddexp(0.0, -z)


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def two(chosen, rejected):
    return np.stack([chosen, rejected], axis=-1)


def dpo(w, l, rw, rl, beta=0.1, label_smoothing=0.0, **_):
    z = beta * ((w - rw) - (l - rl))
    losses = (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z)
    return losses, two(beta * (w - rw), beta * (l - rl))


def dpo_norm(w, l, rw, rl, nw, nl, beta=5.0, label_smoothing=0.0, **_):
    chosen, rejected = (w - rw) / nw, (l - rl) / nl
    z = beta * (chosen - rejected)
    return (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z), two(beta * chosen, beta * rejected)


def ipo(w, l, rw, rl, nw, nl, beta=0.1, length_normalize=True, **_):
    chosen, rejected = w - rw, l - rl
    if length_normalize:
        chosen, rejected = chosen / nw, rejected / nl
    return (chosen - rejected - 0.5 / beta) ** 2, two(beta * chosen, beta * rejected)


def hinge(w, l, rw, rl, beta=0.05, **_):
    return np.maximum(0.0, 1 - beta * ((w - rw) - (l - rl))), two(beta * (w - rw), beta * (l - rl))


def wpo(w, l, rw, rl, aw, al, beta=0.1, label_smoothing=0.0, **_):
    losses, rewards = dpo(w, l, rw, rl, beta, label_smoothing)
    return np.minimum(1.0, np.exp(aw) * np.exp(al)) * losses, rewards


def kto_pair(w, l, rw, rl, beta=0.1, **_):
    chosen, rejected = w - rw, l - rl
    z_w, z_l = max(0.0, chosen.mean()), max(0.0, rejected.mean())
    losses = 0.5 * ((1 - sigmoid(beta * (chosen - z_l))) + (1 - sigmoid(beta * (z_w - rejected))))
    return losses, two(beta * chosen, beta * rejected)


def simpo(w, l, nw, nl, beta=2.0, gamma=None, gamma_beta_ratio=None, label_smoothing=0.0, **_):
    if gamma is None:
        gamma = beta * (0.5 if gamma_beta_ratio is None else gamma_beta_ratio)
    z = beta * (w / nw - l / nl) - gamma
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


def sft(w, nw, **_):
    return -w / nw, None


# The package's input names, in the short names used above.
SHORT = {
    "policy_chosen_logps": "w",
    "policy_rejected_logps": "l",
    "ref_chosen_logps": "rw",
    "ref_rejected_logps": "rl",
    "chosen_lengths": "nw",
    "rejected_lengths": "nl",
    "policy_chosen_alignment": "aw",
    "policy_rejected_alignment": "al",
}
