"""Where the numbers differ from TRL 1.16's with the same settings: a closed list, which docs/from_trl.md prints.

The losses are those of a tiny model on made-up rows, policy and reference about a nat apart; tests/parity/
test_dropin_faults.py computes both and compares them with this list. In everything else they agree to 1e-5.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A loss that is another one here.

    Attributes:
        what: what TRL does, and what is done here.
        method: the trainer's name without "Trainer". settings: by TRL's names.
        rows: which rows of the test.
        theirs, ours: the loss of one batch, or the name of the error.
    """

    what: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: str = "three"
    theirs: float | str = "nan"
    ours: float | str = "ValueError"


# Fields with another default, by name: TRL's, ours, why. `loss_type` is a list here, where some of TRL's are a text.
OTHER_DEFAULTS: dict[str, tuple[Any, Any, str]] = {
    "train_sampling_strategy": (
        "sequential",
        "random",
        "TRL pairs each row of KTO with a neighbor in its batch, so it must not shuffle; here the pairs come from the "
        "whole data set.",
    ),
    "logging_nan_inf_filter": (True, False, "A loss that is not finite stops the run."),
    "ddp_broadcast_buffers": (None, False, "There is nothing to send: buffers do not change in training."),
}

DIFFERENCES = (
    Difference(
        "`label_smoothing` is ignored by `sigmoid`; here it is conservative DPO's ε.",
        "DPO",
        {"loss_type": "sigmoid", "label_smoothing": 0.3, "beta": 0.5},
        theirs=1.26500,
        ours=1.40046,
    ),
    Difference(
        "`label_smoothing` is ignored by losses without one, such as `hinge`; here it is an error.",
        "DPO",
        {"loss_type": "hinge", "label_smoothing": 0.3},
        theirs=0.90969,
    ),
    Difference(
        "`bco_pair` has no reward shift δ; here δ is the paper's running mean of the rewards.",
        "DPO",
        {"loss_type": "bco_pair", "beta": 0.5},
        theirs=1.93975,
        ours=1.79476,
    ),
    Difference(
        "WPO's weights (`use_weighting`) grow beyond 1; here they are at most 1, as in the paper. Responses are the "
        "policy's own greedy ones.",
        "DPO",
        {"loss_type": "sigmoid", "use_weighting": True},
        rows="greedy",
        theirs=14.78274,
        ours=0.85903,
    ),
    Difference(
        "`use_weighting` beside `sft` raises a RuntimeError; here it weighs the loss of pairs alone.",
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
        rows="uneven",
        theirs="RuntimeError",
        ours=7.40663,
    ),
    Difference(
        "The NLL of `sft` is a mean over the tokens of a micro-batch, so that accumulation changes it; here each "
        "example counts by its own length. Chosen responses of 8 and 2 tokens.",
        "DPO",
        {"loss_type": ["sigmoid", "sft"]},
        rows="uneven",
        theirs=8.38684,
        ours=8.09033,
    ),
    Difference("The same of CPO's NLL.", "CPO", {}, rows="uneven", theirs=7.73878, ours=7.44227),
    Difference(
        "The same of ORPO's NLL, of prompt and response in both.",
        "ORPO",
        {},
        rows="uneven",
        theirs=7.94695,
        ours=7.99980,
    ),
    Difference(
        "The same of TPO's NLL, of the gold response.", "TPO", {}, rows="uneven triples", theirs=7.76937, ours=6.90046
    ),
    Difference(
        "`alpha` beside `sigmoid`, `hinge`: e^(−α·s) of summed log-probs, not a number for responses of 60 tokens; "
        "here an error.",
        "CPO",
        {"loss_type": "sigmoid", "alpha": 0.5},
        rows="long",
    ),
)
