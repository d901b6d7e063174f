"""Losses of triples: policy w, l and gold g, lengths nw, nl, ng."""

from tests.losses.numpy_reference.basics import nll, two


def _smoothed(z, label_smoothing):
    return (1 - label_smoothing) * nll(z) + label_smoothing * nll(-z)


def sft_gold(g, ng):
    """The negative log-likelihood of the gold response, divided by its length."""
    return -g / ng, None


def tpo(w, l, g, ng, beta=0.01, tpo_alpha=1.0, label_smoothing=0.0):
    """2405.16681: −log σ(β log π(y_w) − β log π(y_l)) − α log π(y_gold), with the last term per token."""
    losses = _smoothed(beta * w - beta * l, label_smoothing) - tpo_alpha * g / ng
    return losses, two(beta * w, beta * l)


def tpo_l(w, l, g, nw, nl, ng, beta=0.01, gamma=0.5, tpo_alpha=1.0, label_smoothing=0.0):
    """2405.16681, TPO-L: log-probs divided by length, and a margin γ."""
    losses = _smoothed(beta / nw * w - beta / nl * l - gamma, label_smoothing) - tpo_alpha * g / ng
    return losses, two(beta * w / nw, beta * l / nl)
