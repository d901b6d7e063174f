"""Losses of lists, one list at a time: policy S, reference RS, lengths N, ranks K or scores R; M: no padding."""

import itertools

import numpy as np

from tests.losses.numpy_reference.basics import nll, sigmoid


def _of_each_list(function, M, *matrices):
    """(losses [B], rewards [B, K] with 0 at padding) of a function of one list's vectors."""
    losses, rewards = np.zeros(len(M)), np.zeros(M.shape)
    for b, mask in enumerate(M):
        losses[b], rewards[b, mask] = function(*(matrix[b][mask].astype(float) for matrix in matrices))
    return losses, rewards


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def plackett_luce(S, RS, K, M, beta=0.1):
    """2305.18290 appendix A.3: −log Π_k exp(βr_(k)) / Σ_{j≥k} exp(βr_(j)), without the terms of equal ranks."""

    def of(s, rs, ranks):
        e = np.exp(beta * (s - rs))
        return -sum(np.log(e[k] / (e[k] + e[ranks > ranks[k]].sum())) for k in range(len(e))), beta * (s - rs)

    return _of_each_list(of, M, S, RS, K)


def s_dpo(S, RS, K, M, beta=1.0):
    """2406.09215: −log σ(−log Σ_l exp(β r_l − β r_w))."""

    def of(s, rs, ranks):
        r = beta * (s - rs)
        e_worse = np.exp(r[ranks > ranks.min()]).sum()
        best = [sigmoid(-np.log(e_worse / np.exp(x))) if e_worse else 1.0 for x in r[ranks == ranks.min()]]
        return -np.mean(np.log(best)), r

    return _of_each_list(of, M, S, RS, K)


def rrhf(S, N, K, M, sft_coef=1.0):
    """2304.05302: Σ_{R_i<R_j} max(0, p_i − p_j) + the NLL of the best."""

    def of(s, n, ranks):
        p = s / n
        pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if ranks[i] > ranks[j]]
        return sum(max(0.0, p[i] - p[j]) for i, j in pairs) - sft_coef * p[ranks == ranks.min()].mean(), p

    return _of_each_list(of, M, S, N, K)


def infonca(S, RS, R, M, beta=0.01, alpha=1e-4):
    """2402.05369: the cross-entropy of softmax(r/α) and softmax(β log-ratio)."""

    def of(s, rs, scores):
        r = beta * (s - rs)
        return -(_softmax(scores / alpha) * np.log(_softmax(r))).sum(), r

    return _of_each_list(of, M, S, RS, R)


def nca(S, RS, R, M, beta=0.01, alpha=1e-4):
    """2402.05369: −Σ softmax(r/α) log σ(βr) − (1/K) Σ log σ(−βr)."""

    def of(s, rs, scores):
        r = beta * (s - rs)
        return (_softmax(scores / alpha) * nll(r)).sum() + nll(-r).mean(), r

    return _of_each_list(of, M, S, RS, R)


def exo_rw(S, RS, R, M, beta=1.0, tau=1.0):
    """2402.00856: Σ p_policy log(p_policy / p_data)."""

    def of(s, rs, scores):
        p, q = _softmax(beta * (s - rs)), _softmax(scores / tau)
        return (p * np.log(p / q)).sum(), beta * (s - rs)

    return _of_each_list(of, M, S, RS, R)


def lipo(S, RS, R, M, beta=0.05, normalize_scores=False):
    """2402.01878 eq. 8 to 10: gains 2^ψ − 1, discounts log(1 + τ), where τ is the rank by the policy's own score; for
    equal scores, the mean over all possible orders."""

    def of(s, rs, scores):
        r = beta * (s - rs)
        psi = (scores - scores.min()) / (scores.max() - scores.min()) if normalize_scores else scores
        orders = [o for o in itertools.permutations(range(len(r))) if (np.diff(r[list(o)]) <= 0).all()]
        total = 0.0
        for order in orders:
            tau = 1 + np.argsort(order)
            for i in range(len(r)):
                for j in range(len(r)):
                    if psi[i] > psi[j]:
                        delta = abs(2 ** psi[i] - 2 ** psi[j]) * abs(1 / np.log(1 + tau[i]) - 1 / np.log(1 + tau[j]))
                        total += -delta * np.log(sigmoid(r[i] - r[j])) / len(orders)
        return total, r

    return _of_each_list(of, M, S, RS, R)


def sft_lists(S, N, K, M):
    """The negative log-likelihood per token of the responses with the smallest rank."""
    losses, _ = _of_each_list(lambda s, n, ranks: (-(s / n)[ranks == ranks.min()].mean(), s), M, S, N, K)
    return losses, None
