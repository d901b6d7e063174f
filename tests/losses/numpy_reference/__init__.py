"""A second implementation of every loss, in NumPy float64, written from the papers' equations and not from the package.

Arguments are arrays [B]: policy and reference log-probs of chosen (w) and rejected (l) responses, their lengths n and
their log alignment weights a. unpaired.py and lists.py name the arguments for other examples. Each function returns
(losses [B], rewards [B, 2], [B, 1] or [B, K], or None).
"""

from tests.losses.numpy_reference.both_ratios import (  # noqa: F401
    apo_down,
    apo_zero,
    cal_dpo,
    chi_po,
    dpo_shift,
    dpop,
    nca_pair,
    r_dpo,
    sppo_hard,
)
from tests.losses.numpy_reference.dpo import (  # noqa: F401
    cauchy,
    discopop,
    dpo,
    dpo_norm,
    exo_pair,
    focal_po,
    gpo,
    hinge,
    ipo,
    robust,
    wpo,
)
from tests.losses.numpy_reference.lists import (  # noqa: F401
    exo_rw,
    infonca,
    lipo,
    nca,
    plackett_luce,
    rrhf,
    s_dpo,
    sft_lists,
)
from tests.losses.numpy_reference.over_the_batch import (  # noqa: F401
    alpha_dpo,
    aot,
    aot_unpaired,
    beta_dpo,
    dr_dpo,
    kto_pair,
)
from tests.losses.numpy_reference.reference_free import (  # noqa: F401
    alphapo,
    cpo,
    orpo,
    orpo_sequence,
    repo,
    sft,
    simper,
    simpo,
    slic_hf,
)
from tests.losses.numpy_reference.scored_pairs import odpo, rpo_bwd, rpo_fwd, rpo_sq, sppo  # noqa: F401
from tests.losses.numpy_reference.token_level import (  # noqa: F401
    d2po,
    mallows_dpo,
    mallows_dpo_per_token,
    sampo,
    tdpo1,
    tdpo2,
    tis_dpo,
)
from tests.losses.numpy_reference.triples import sft_gold, tpo, tpo_l  # noqa: F401
from tests.losses.numpy_reference.unpaired import (  # noqa: F401
    apo_zero_unpaired,
    bco,
    bco_pair,
    kto,
    npo,
    qrpo,
    sft_unpaired,
)

# Maps the package's input names to the short names used above.
SHORT = {
    "policy_chosen_logps": "w",
    "policy_rejected_logps": "l",
    "ref_chosen_logps": "rw",
    "ref_rejected_logps": "rl",
    "chosen_lengths": "nw",
    "rejected_lengths": "nl",
    "policy_gold_logps": "g",
    "gold_lengths": "ng",
    "policy_prompt_logps": "x",
    "prompt_lengths": "nx",
    "policy_chosen_alignment": "aw",
    "policy_rejected_alignment": "al",
    "policy_chosen_token_logps": "tw",
    "policy_rejected_token_logps": "tl",
    "ref_chosen_token_logps": "trw",
    "ref_rejected_token_logps": "trl",
    "chosen_token_weights": "ww",
    "rejected_token_weights": "wl",
    "rows": "row",
    "pair_in_row": "place",
    "policy_chosen_kl": "dw",
    "policy_rejected_kl": "dl",
    "ref_chosen_normalized_entropy": "hw",
    "ref_rejected_normalized_entropy": "hl",
    "margins": "D",
    "chosen_scores": "Rw",
    "rejected_scores": "Rl",
    "chosen_win_rates": "Pw",
    "rejected_win_rates": "Pl",
    "policy_logps": "s",
    "ref_logps": "rs",
    "lengths": "n",
    "labels": "y",
    "quantiles": "q",
    "policy_mismatched_logps": "m",
    "ref_mismatched_logps": "rm",
    "policy_list_logps": "S",
    "ref_list_logps": "RS",
    "list_lengths": "N",
    "list_mask": "M",
    "list_ranks": "K",
    "list_scores": "R",
}
