"""All cases in which a loss here differs from TRL 1.16 with the same settings; docs/from_trl.md prints this list.

The losses are computed with a tiny model on synthetic rows. The log-probs of policy and reference differ by about one
nat. `tests/parity/test_dropin_faults.py` computes the losses of TRL and of this package, and compares both with this
list. All other losses agree with TRL's to 1e-5.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A case in which a loss here differs from TRL's.

    Attributes:
        what: a description of TRL's behavior and of this package's behavior.
        method: the name of the trainer, without "Trainer".
        settings: the fields of the configuration that are not at their defaults.
        rows: the name of the synthetic rows in the test.
        theirs, ours: the loss of one batch in TRL and here, or the name of the error that is raised.
    """

    what: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: str = "three"
    theirs: float | str = "nan"
    ours: float | str = "ValueError"


# Fields whose default differs from TRL's: the default in TRL, the default here, and the reason. `loss_type` is not
# listed: here its default is always a list, and in some of TRL's configurations a string.
OTHER_DEFAULTS: dict[str, tuple[Any, Any, str]] = {
    "train_sampling_strategy": (
        "sequential",
        "random",
        "For KTO, TRL pairs each row with its neighbor in the batch, so it must not shuffle; here mismatched pairs "
        "come from the whole dataset.",
    ),
    "logging_nan_inf_filter": (True, False, "A loss that is not finite stops the run."),
    "ddp_broadcast_buffers": (None, False, "Buffers do not change in training, so they need no broadcast."),
}

DIFFERENCES = (
    Difference(
        "`sigmoid` ignores `label_smoothing`; here it is conservative DPO's ε.",
        "DPO",
        {"loss_type": "sigmoid", "label_smoothing": 0.3, "beta": 0.5},
        theirs=1.26500,
        ours=1.40046,
    ),
    Difference(
        "Losses without label smoothing, such as `hinge`, ignore `label_smoothing`; here it raises an error.",
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
        "WPO's weights (`use_weighting`) can exceed 1; here they are at most 1, as in the paper. The responses are "
        "the policy's own greedy responses.",
        "DPO",
        {"loss_type": "sigmoid", "use_weighting": True},
        rows="greedy",
        theirs=14.78274,
        ours=0.85903,
    ),
    Difference(
        "`use_weighting` together with `sft` raises a RuntimeError; here it only weights the pair loss.",
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
        rows="uneven",
        theirs="RuntimeError",
        ours=7.40663,
    ),
    Difference(
        "The NLL of `sft` is the mean over the tokens of a micro-batch, so gradient accumulation changes it; here it "
        "is the mean over examples of the NLL per token. The chosen responses have 8 and 2 tokens.",
        "DPO",
        {"loss_type": ["sigmoid", "sft"]},
        rows="uneven",
        theirs=8.38684,
        ours=8.09033,
    ),
    Difference("The same difference in CPO's NLL.", "CPO", {}, rows="uneven", theirs=7.73878, ours=7.44227),
    Difference(
        "The same difference in ORPO's NLL, which covers prompt and response in both packages.",
        "ORPO",
        {},
        rows="uneven",
        theirs=7.94695,
        ours=7.99980,
    ),
    Difference(
        "The same difference in TPO's NLL of the gold response.",
        "TPO",
        {},
        rows="uneven triples",
        theirs=7.76937,
        ours=6.90046,
    ),
    Difference(
        "`alpha` with `sigmoid` or `hinge` computes e^(−α·s) from summed log-probs, which is NaN for responses of 60 "
        "tokens; here it raises an error.",
        "CPO",
        {"loss_type": "sigmoid", "alpha": 0.5},
        rows="long",
    ),
)
