"""Pairs given by their log-ratios, for tests with numbers derived by hand."""

import torch

from hf_prefopt.losses import LossOutput
from hf_prefopt.testing import call


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def by_log_ratios(name: str, r_w, r_l, lengths=(1.0, 1.0), **params) -> LossOutput:
    """Return the loss of pairs with log-ratios `r_w` and `r_l` (numbers, or vectors `[B]`) to a reference of zeros.

    Scores are 1 and 0, and the chosen response always wins. A loss of lists gets
    each pair as a list of two with ranks 1 and 2 and these scores.
    """
    chosen, rejected = (r if torch.is_tensor(r) else vector(r) for r in (r_w, r_l))
    values = {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
    values |= {f"ref_{side}_logps": torch.zeros_like(chosen) for side in ("chosen", "rejected")}
    values |= {
        f"{side}_lengths": torch.full_like(chosen, n) for side, n in zip(("chosen", "rejected"), lengths, strict=True)
    }
    values |= {"chosen_scores": torch.ones_like(chosen), "rejected_scores": torch.zeros_like(chosen)}
    values |= {"chosen_win_rates": torch.ones_like(chosen)}
    values |= _as_lists(chosen, rejected)
    return call(name, values, **params)


def _as_lists(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    logps = torch.stack([chosen, rejected], dim=-1)
    return {
        "policy_list_logps": logps,
        "ref_list_logps": torch.zeros_like(logps),
        "list_lengths": torch.ones_like(logps),
        "list_mask": torch.ones_like(logps, dtype=torch.bool),
        "list_ranks": vector(1, 2).expand_as(logps),
        "list_scores": vector(1, 0).expand_as(logps),
    }
