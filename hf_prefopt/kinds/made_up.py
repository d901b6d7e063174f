"""Synthetic examples of every kind, in the form of loss inputs, to try a loss before training and to test it.

The five default examples include hard cases: a chosen response of one token (example 0), a list in which two responses
have the same score and rank (example 2), a pair whose responses have equal log-probs (example 3), and a list of one
response (example 4).
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

EXAMPLES = 5
LONGEST_LIST = 4
LONGEST_RESPONSE = 32


def made_up_inputs(dtype=torch.float64, pairs: int = EXAMPLES, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return loss inputs of all kinds, keyed by name.

    The log-probs are about −1.5 nats per token, and the log-ratios of policy to reference are a few nats per response.
    """
    rng = np.random.default_rng(seed)
    lengths = {side: rng.integers(3, 30, pairs) for side in ("chosen", "rejected")}
    lengths["chosen"][0] = 1
    inputs = {f"{side}_lengths": torch.tensor(lengths[side]) for side in lengths}
    for side, n in lengths.items():
        reference = -n * rng.uniform(0.5, 2.5, pairs)
        policy = np.minimum(reference + rng.normal(0, 3, pairs), -0.05 * n)
        inputs[f"ref_{side}_logps"] = torch.tensor(reference, dtype=dtype)
        inputs[f"policy_{side}_logps"] = torch.tensor(policy, dtype=dtype)
        inputs[f"policy_{side}_alignment"] = torch.tensor(rng.normal(-0.2, 0.4, pairs), dtype=dtype)
    for model in ("ref", "policy") if pairs > 3 else ():
        inputs[f"{model}_rejected_logps"][3] = inputs[f"{model}_chosen_logps"][3]
    scores = rng.uniform(0.2, 3, (2, pairs))
    inputs["rejected_scores"] = torch.tensor(scores[0], dtype=dtype)
    inputs["chosen_scores"] = torch.tensor(scores.sum(0), dtype=dtype)
    inputs["chosen_win_rates"] = torch.tensor(rng.uniform(0.3, 1, pairs), dtype=dtype)
    others = {**_unpaired(rng, pairs, dtype), **_lists(rng, pairs, dtype)}
    others |= {**_tokens(rng, inputs), **_whole_predictions(rng, pairs, dtype)}
    further = {name: _logps(rng, pairs, dtype) for name in ("gold", "prompt")}
    others |= {f"policy_{name}_logps": of["policy"] for name, of in further.items()}
    return {**inputs, **others, **{f"{name}_lengths": of["lengths"] for name, of in further.items()}}


def made_up_examples(names: Iterable[str], count: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the inputs with these names for `count` examples. All inputs of all kinds are supported."""
    known = made_up_inputs(dtype, count)
    return {name: known[name] if name in known else _any_input(name, count, dtype) for name in names}


def _any_input(name: str, count: int, dtype: torch.dtype) -> Tensor:
    """Return an input with the same value everywhere.

    The value is True for masks, 8 for lengths, −4 nats for log-probs of responses (of 8 tokens), −½ nats for log-probs
    of tokens, 1 for weights, and ½ for all other inputs.
    """
    shape = (count, LONGEST_RESPONSE) if "token" in name else (count, LONGEST_LIST) if "list" in name else (count,)
    if name.endswith("mask"):
        return torch.ones(shape, dtype=torch.bool)
    if name.endswith("lengths"):
        return torch.full(shape, 8)
    value = 1.0 if name.endswith("weights") else -4.0 if name.endswith("logps") and "token" not in name else 0.5
    return torch.full(shape, -value if name.endswith("token_logps") else value, dtype=dtype)


def _tokens(rng, inputs) -> dict[str, torch.Tensor]:
    """Return the inputs of pairs that concern tokens, and `rows` and `pair_in_row`.

    The token log-probs of a response add up to its log-prob in `inputs`. The token weights are between 0.5 and 2.
    """
    tokens = {"rows": torch.tensor(rng.permutation(100)[: len(inputs["chosen_lengths"])])}
    for side in ("chosen", "rejected"):
        mask = torch.arange(LONGEST_RESPONSE) < inputs[f"{side}_lengths"][:, None]
        tokens[f"{side}_token_mask"] = mask
        for name in (f"policy_{side}", f"ref_{side}"):
            shares = torch.tensor(rng.uniform(0.2, 1, mask.shape)) * mask
            sums = inputs[f"{name}_logps"]
            tokens[f"{name}_token_logps"] = (shares / shares.sum(1, keepdim=True)).to(sums) * sums[:, None]
        tokens[f"{side}_token_weights"] = (torch.tensor(rng.uniform(0.5, 2, mask.shape)) * mask).to(sums)
    tokens["pair_in_row"] = torch.arange(len(tokens["rows"])) % 2
    return tokens


def _whole_predictions(rng, pairs, dtype) -> dict[str, torch.Tensor]:
    """Return the policy's KLs, 0.5 to 8 nats per response, and the reference's normalized entropies, 0.1 to 0.5."""
    kl = {f"policy_{side}_kl": rng.uniform(0.5, 8, pairs) for side in ("chosen", "rejected")}
    entropies = {f"ref_{side}_normalized_entropy": rng.uniform(0.1, 0.5, pairs) for side in ("chosen", "rejected")}
    return {name: torch.tensor(values, dtype=dtype) for name, values in {**kl, **entropies}.items()}


def _logps(rng, shape, dtype) -> dict[str, torch.Tensor]:
    """Return lengths of responses and their log-probs under policy and reference, all with the shape `shape`."""
    n = rng.integers(3, 30, shape)
    reference = -n * rng.uniform(0.5, 2.5, shape)
    policy = np.minimum(reference + rng.normal(0, 3, shape), -0.05 * n)
    return {
        "lengths": torch.tensor(n),
        "ref": torch.tensor(reference, dtype=dtype),
        "policy": torch.tensor(policy, dtype=dtype),
    }


def _unpaired(rng, count, dtype) -> dict[str, torch.Tensor]:
    """Return the inputs of single responses.

    Every second response is desirable. Quantiles increase from 0 to 1. Log-ratios of mismatched responses are ≥ 0.
    """
    own, other = _logps(rng, count, dtype), _logps(rng, count, dtype)
    return {
        "policy_logps": own["policy"],
        "ref_logps": own["ref"],
        "lengths": own["lengths"],
        "labels": torch.arange(count) % 2 == 0,
        "quantiles": torch.linspace(0, 1, count, dtype=dtype),
        "policy_mismatched_logps": other["ref"] + other["policy"].new_tensor(rng.uniform(0, 4, count)),
        "ref_mismatched_logps": other["ref"],
    }


def _lists(rng, count, dtype) -> dict[str, torch.Tensor]:
    """Return the inputs of lists with 2, 3, 4, 2, 1, 4, … responses.

    The scores are in [0, 1], in random order, and the ranks follow from them. Padding has arbitrary values, because
    losses must not use them.
    """
    shape = (count, LONGEST_LIST)
    own = _logps(rng, shape, dtype)
    sizes = torch.arange(count) % (LONGEST_LIST - 1) + 2
    sizes[4:5] = 1
    mask = torch.arange(LONGEST_LIST) < sizes[:, None]
    scores = torch.tensor(rng.permuted(np.tile(np.linspace(0.05, 0.9, LONGEST_LIST), (count, 1)), axis=1), dtype=dtype)
    scores[2:3, 1] = scores[2:3, 0]
    better = (scores[:, None] > scores[:, :, None]) & mask[:, None]
    return {
        "policy_list_logps": own["policy"].masked_fill(~mask, -77.0),
        "ref_list_logps": own["ref"].masked_fill(~mask, 33.0),
        "list_lengths": own["lengths"].masked_fill(~mask, 0),
        "list_mask": mask,
        "list_scores": scores.masked_fill(~mask, 55.0),
        "list_ranks": better.sum(2).to(dtype).masked_fill(~mask, -9.0),
    }
