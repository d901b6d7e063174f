"""Preference losses: pure functions of tensors, looked up by name in the registry."""

from hf_prefopt.losses.adaptive import alpha_dpo_loss, beta_dpo_loss
from hf_prefopt.losses.anchored import apo_down_loss, apo_zero_loss, cal_dpo_loss, nca_pair_loss, sppo_hard_loss
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.batchwise import aot_loss, aot_unpaired_loss, dr_dpo_loss
from hf_prefopt.losses.bco import bco_loss, bco_pair_loss
from hf_prefopt.losses.dpo import dpo_loss, dpo_norm_loss, hinge_loss, ipo_loss, reference_free_dpo_loss, wpo_loss
from hf_prefopt.losses.kto import kto_loss, kto_pair_loss, kto_weights
from hf_prefopt.losses.link_functions import (
    cauchy_loss,
    discopop_loss,
    exo_pair_loss,
    focal_po_loss,
    gpo_loss,
    robust_loss,
)
from hf_prefopt.losses.lists import plackett_luce_loss, rrhf_loss, s_dpo_loss, sft_lists_loss
from hf_prefopt.losses.reference_free import cpo_loss, orpo_loss, orpo_sequence_loss, sft_loss, slic_hf_loss
from hf_prefopt.losses.registry import LossSpec, RunningState, get_loss, list_losses, register_loss
from hf_prefopt.losses.regularized import chi_po_loss, dpo_shift_loss, dpop_loss, r_dpo_loss
from hf_prefopt.losses.reward_aware import odpo_loss, rpo_bwd_loss, rpo_fwd_loss, rpo_sq_loss, sppo_loss
from hf_prefopt.losses.scored_lists import exo_rw_loss, infonca_loss, lipo_loss, nca_loss
from hf_prefopt.losses.simpo import alphapo_loss, repo_loss, simper_loss, simpo_loss
from hf_prefopt.losses.token_level import d2po_loss, sampo_loss, tis_dpo_loss
from hf_prefopt.losses.triples import sft_gold_loss, tpo_l_loss, tpo_loss
from hf_prefopt.losses.unpaired import apo_zero_unpaired_loss, npo_loss, qrpo_loss, sft_unpaired_loss
from hf_prefopt.losses.vocabulary import (
    mallows_dpo_loss,
    mallows_dpo_per_token_loss,
    tdpo1_loss,
    tdpo2_loss,
)

__all__ = [
    "LossOutput",
    "LossSpec",
    "RunningState",
    "alpha_dpo_loss",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_loss",
    "bco_pair_loss",
    "beta_dpo_loss",
    "cal_dpo_loss",
    "cauchy_loss",
    "chi_po_loss",
    "cpo_loss",
    "d2po_loss",
    "discopop_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "dpo_shift_loss",
    "dpop_loss",
    "dr_dpo_loss",
    "exo_pair_loss",
    "exo_rw_loss",
    "focal_po_loss",
    "get_loss",
    "gpo_loss",
    "hinge_loss",
    "infonca_loss",
    "ipo_loss",
    "kto_loss",
    "kto_pair_loss",
    "kto_weights",
    "lipo_loss",
    "list_losses",
    "mallows_dpo_loss",
    "mallows_dpo_per_token_loss",
    "nca_loss",
    "nca_pair_loss",
    "npo_loss",
    "odpo_loss",
    "orpo_loss",
    "orpo_sequence_loss",
    "plackett_luce_loss",
    "qrpo_loss",
    "r_dpo_loss",
    "reference_free_dpo_loss",
    "register_loss",
    "repo_loss",
    "robust_loss",
    "rpo_bwd_loss",
    "rpo_fwd_loss",
    "rpo_sq_loss",
    "rrhf_loss",
    "s_dpo_loss",
    "sampo_loss",
    "sft_gold_loss",
    "sft_lists_loss",
    "sft_loss",
    "sft_unpaired_loss",
    "simper_loss",
    "simpo_loss",
    "slic_hf_loss",
    "sppo_hard_loss",
    "sppo_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "tis_dpo_loss",
    "tpo_l_loss",
    "tpo_loss",
    "wpo_loss",
]
