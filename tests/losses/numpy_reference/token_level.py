"""Losses of tokens, one pair at a time: policy w, l and reference rw, rl `[B, T]`, weights ww, wl, lengths nw, nl."""

import numpy as np

from tests.losses.numpy_reference.basics import nll, two


def _sums_of_pairs(weighted, pairs):
    """(losses, rewards) of −log σ(reward_w − reward_l), both from `weighted(b)`."""
    rewards = np.array([weighted(b) for b in range(pairs)])
    return nll(rewards[:, 0] - rewards[:, 1]), rewards


def d2po(tw, tl, trw, trl, beta=0.1, gamma=0.98):
    """2502.14340: Σ_t γ^t log π(y_t)/π_ref(y_t), t = 1, 2, …"""

    def rewards(b):
        return [
            beta * sum(gamma ** (t + 1) * (p - r) for t, (p, r) in enumerate(zip(policy[b], ref[b], strict=True)))
            for policy, ref in ((tw, trw), (tl, trl))
        ]

    return _sums_of_pairs(rewards, len(tw))


def tis_dpo(tw, tl, trw, trl, ww, wl, beta=0.1):
    """2410.04350: u = β Σ w_t log-ratio_t of the chosen minus that of the rejected response."""
    return _sums_of_pairs(
        lambda b: [beta * np.dot(ww[b], tw[b] - trw[b]), beta * np.dot(wl[b], tl[b] - trl[b])], len(tw)
    )


def _hash(number):
    """The 32-bit hash "lowbias32", with Python's integers."""
    number &= 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    number = ((number ^ (number >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return number ^ (number >> 16)


def sampo(tw, tl, trw, trl, nw, nl, row, place, beta=0.1, seed=0, epoch=0):
    """2406.10957; the tokens are those with the smallest hashes of (seed, epoch, row, pair, side, position)."""

    def rewards(b):
        count = min(int(nw[b]), int(nl[b]))
        pair = _hash(_hash(int(row[b]) + seed * 0x9E3779B9 + epoch * 0x85EBCA6B) + int(place[b]))
        values = []
        for side, (policy, ref, n) in enumerate(((tw, trw, nw), (tl, trl, nl))):
            key = _hash(pair + side)
            drawn = sorted(range(int(n[b])), key=lambda t: _hash(key + t))[:count]
            values.append(beta * sum(policy[b][t] - ref[b][t] for t in drawn))
        return values

    return _sums_of_pairs(rewards, len(tw))


def tdpo1(w, l, rw, rl, dw, dl, beta=0.1):
    """2404.11999, TDPO1: σ(u − δ), δ = β D(y_l) − β D(y_w)."""
    u, delta = beta * (w - rw) - beta * (l - rl), beta * dl - beta * dw
    return nll(u - delta), two(beta * (w - rw + dw), beta * (l - rl + dl))


def tdpo2(w, l, rw, rl, dw, dl, beta=0.1, alpha=0.5):
    """2404.11999, TDPO2: σ(u − αδ₂)."""
    u, delta = beta * (w - rw) - beta * (l - rl), beta * dl - beta * dw
    return nll(u - alpha * delta), two(beta * (w - rw + alpha * dw), beta * (l - rl + alpha * dl))


def mallows_dpo(w, l, rw, rl, hw, hl, beta=0.1, dispersion_scale=1.0):
    """2405.14953: DPO with β times −log of the normalized entropy."""
    weight = dispersion_scale * np.log(1 / ((hw + hl) / 2))
    return nll(weight * beta * (w - rw - l + rl)), two(weight * beta * (w - rw), weight * beta * (l - rl))


def mallows_dpo_per_token(w, l, nw, nl, hw, hl, beta=10.0, dispersion_scale=0.29):
    """As in the authors' code: log-probs averaged over tokens, and no reference in the margin."""
    weight = dispersion_scale * np.log(1 / ((hw + hl) / 2))
    return nll(weight * beta * (w / nw - l / nl)), two(weight * beta * w / nw, weight * beta * l / nl)
