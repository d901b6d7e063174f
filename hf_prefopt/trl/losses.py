"""Translate the `loss_type` of TRL's CPO, ORPO, TPO and KTO configurations to the losses of this package.

The losses of TRL's DPOTrainer need no translation, because they have the same names here. A loss of the other trainers
translates to one loss here, and for some of them to an additional loss, the NLL of a response.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Translation:
    """The translation of one of TRL's losses.

    Attributes:
        loss: the name of the loss here.
        params: maps the names of the loss's hyperparameters to the names of TRL's fields. `beta` and `label_smoothing`
            are left out, because they have the same names in both.
        nll: the name of the loss that adds the NLL of a response. `None` if none is added, for example because `loss`
            includes the NLL.
        nll_weight: the name of TRL's field for the weight of `nll`. `None` means a weight of 0.
        reference_free: whether the loss is used without a reference.
        bent: the name of the loss that replaces `loss` if TRL's field `alpha` is not 0. It gets this value as its
            hyperparameter `alpha`. `None` if there is no such loss.
    """

    loss: str
    params: Mapping[str, str] = field(default_factory=dict)
    nll: str | None = None
    nll_weight: str | None = None
    reference_free: bool = False
    bent: str | None = None


_SIMPO = Translation("simpo", {"gamma": "simpo_gamma"}, "sft", "cpo_alpha", bent="alphapo")
CPO = {
    "sigmoid": Translation("cpo", {"cpo_alpha": "cpo_alpha"}),
    "hinge": Translation("hinge", {}, "sft", "cpo_alpha", reference_free=True),
    "ipo": Translation("ipo", {}, "sft", "cpo_alpha", reference_free=True),
    "simpo": _SIMPO,
    # There is no NLL, because TRL sets cpo_alpha=0.0 for alphapo.
    "alphapo": Translation("simpo", {"gamma": "simpo_gamma"}, bent="alphapo"),
}
TPO = {
    "sigmoid": Translation("tpo", {"tpo_alpha": "tpo_alpha"}),
    "hinge": Translation("hinge", {}, "sft_gold", "tpo_alpha", reference_free=True),
    "ipo": Translation("ipo", {}, "sft_gold", "tpo_alpha", reference_free=True),
    "tpo-l": Translation("tpo_l", {"gamma": "tpo_l_gamma", "tpo_alpha": "tpo_alpha"}),
}
ORPO = {"orpo": Translation("orpo_sequence")}
_KTO_WEIGHTS = {name: name for name in ("desirable_weight", "undesirable_weight")}
KTO = {name: Translation(name, _KTO_WEIGHTS) for name in ("kto", "apo_zero_unpaired")}


def translated(table: Mapping[str, Translation], args: Any) -> dict[str, Any]:
    """Translate the loss of a configuration. Return keyword arguments for `objective.build.build_objective`.

    Args:
        table: the translations of the losses of this trainer, keyed by TRL's `loss_type`.
        args: the configuration, with a single `loss_type`.

    Raises:
        ValueError: TRL's trainer does not have the loss, or `alpha` is set for a loss without `alpha`.
    """
    (name,) = args.loss_type
    if name not in table:
        raise ValueError(
            f"loss_type={name!r} is not one of {', '.join(table)}, the losses of TRL's {type(args).__name__}: choose "
            "one of them, or use PreferenceConfig, which has every loss"
        )
    this, alpha = table[name], getattr(args, "alpha", 0.0)
    if alpha and this.bent is None:
        takers = " or ".join(other for other in table if table[other].bent)
        raise ValueError(f"alpha={alpha} is for loss_type={takers}; with {name}, it would overflow: leave it out")
    loss = this.bent if alpha else this.loss
    params = {ours: getattr(args, theirs) for ours, theirs in this.params.items()} | ({"alpha": alpha} if alpha else {})
    weight = getattr(args, this.nll_weight) if this.nll_weight else 0.0
    return {
        "loss_types": [loss, *([this.nll] if this.nll else [])],
        "loss_weights": [1.0, *([weight] if this.nll else [])],
        "loss_params": {loss: params},
        "reference_free": this.reference_free,
    }
