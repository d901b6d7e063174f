"""From the `loss_type` of TRL's CPO, ORPO, TPO and KTO configurations to the losses of this package.

TRL's DPO losses have the same names here. Those of the other trainers stand for a loss and an NLL beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Translation:
    """What one of TRL's losses is here.

    Attributes:
        loss: the loss of pairs, triples or single responses.
        params: from its hyperparameters to TRL's fields; `beta` and `label_smoothing` have the same name.
        nll: the loss that holds it to a response, if another one does; its weight is TRL's field `nll_weight`.
        nll_weight: that field; `None`: always 0.
        reference_free: whether it is taken without a reference.
        bent: the loss in its place where TRL's `alpha` is not 0; its hyperparameter `alpha` is that.
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
    # TRL sets cpo_alpha=0.0 for it.
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
    """The losses of a configuration, as arguments of `objective.build.build_objective`.

    Args:
        args: the configuration, with a single `loss_type`.

    Raises:
        ValueError: the loss is none of TRL's, or it takes no `alpha`.
    """
    (name,) = args.loss_type
    if name not in table:
        raise ValueError(
            f"loss_type={name!r} is not one of {', '.join(table)}, which {type(args).__name__} has in TRL: choose one, "
            "or PreferenceConfig, which has every loss"
        )
    this, alpha = table[name], getattr(args, "alpha", 0.0)
    if alpha and this.bent is None:
        takers = " or ".join(other for other in table if table[other].bent)
        raise ValueError(f"alpha={alpha} is of loss_type={takers}, and beside {name} it would overflow: leave it out")
    loss = this.bent if alpha else this.loss
    params = {ours: getattr(args, theirs) for ours, theirs in this.params.items()} | ({"alpha": alpha} if alpha else {})
    weight = getattr(args, this.nll_weight) if this.nll_weight else 0.0
    return {
        "loss_types": [loss, *([this.nll] if this.nll else [])],
        "loss_weights": [1.0, *([weight] if this.nll else [])],
        "loss_params": {loss: params},
        "reference_free": this.reference_free,
    }
