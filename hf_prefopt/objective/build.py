"""Build the objective that a configuration defines: look up its losses, assign hyperparameters, check for conflicts."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from difflib import get_close_matches
from numbers import Real
from typing import Any

from hf_prefopt.kinds import PAIRS, ExampleKind
from hf_prefopt.losses.base import check_range
from hf_prefopt.losses.registry import LossSpec, get_loss, list_losses
from hf_prefopt.objective.objective import Objective
from hf_prefopt.objective.term import Modifier, Term


def build_objective(
    loss_types: list[str],
    loss_weights: list[float] | None = None,
    loss_params: dict[str, Any] | None = None,
    shared_params: dict[str, Any] | None = None,
    sft_weight: float = 0.0,
    use_weighting: bool = False,
    reference_free: bool = False,
    kind: ExampleKind | None = None,
    modifiers: Sequence[Modifier] = (),
    columns: Collection[str] = (),
    use_win_rates: bool = False,
) -> Objective:
    """Build the objective that a configuration defines.

    Args:
        loss_types: names or aliases of losses.
        loss_weights: one weight per loss. By default, all weights are 1.
        loss_params: hyperparameters. For a single loss, they may be keyed by hyperparameter (`{"gamma": 0.5}`). For
            several losses, they are keyed by loss first (`{"simpo": {"gamma": 0.5}}`).
        shared_params: hyperparameters that every loss gets if it has them, such as `beta` and `label_smoothing`.
        sft_weight: the weight of an additional loss, the NLL of the chosen response. With 0, it is not added.
        use_weighting: whether to multiply the losses of each pair by the pair's WPO weight.
        reference_free: whether to compute losses without the reference, if they support this.
        kind: the kind of examples in the data. By default, it is the first kind that all losses can compare.
        modifiers: modifiers of the inputs of all losses that have rewards. They are applied in this order.
        columns: the optional columns that the data have (`ExampleKind.optional_columns`). `weights` multiply the losses
            of examples. Every other column, such as `margins`, is passed to the losses that have a parameter of this
            name.
        use_win_rates: whether to use `chosen_win_rates` as soft labels. Otherwise, only losses that require win rates
            get them.

    Raises:
        ValueError: a name is unknown, no loss has a given hyperparameter (the message lists those that exist), the
            settings cannot be combined, or a value is out of range.
    """
    specs, weights = _weighted(loss_types, loss_weights, sft_weight)
    specs = _of_one_kind(specs, kind)
    _refuse_senseless(specs, use_weighting, reference_free)
    _refuse_senseless_columns(specs, use_weighting, columns)
    if use_win_rates:
        _refuse_hard_labels(specs)
    given = {*columns} - {_WIN_RATES} | ({_WIN_RATES} if use_win_rates else set())
    params = _distribute(specs, loss_params or {}, shared_params or {})
    terms = [
        Term(
            spec,
            weight,
            params[spec.name],
            reference_free and spec.can_be_reference_free,
            absent=tuple(name for name in spec.optional_inputs if name not in given),
        )
        for spec, weight in zip(specs, weights, strict=True)
    ]
    return Objective(_with_modifiers(terms, modifiers), use_weighting, use_weights="weights" in columns)


_WIN_RATES = "chosen_win_rates"


def _weighted(
    loss_types: list[str], loss_weights: list[float] | None, sft_weight: float
) -> tuple[list[LossSpec], list[float]]:
    """Return the losses and their weights, including the loss `sft` if `sft_weight` is above 0."""
    specs = [get_loss(name) for name in loss_types]
    weights = list(loss_weights) if loss_weights is not None else [1.0] * len(specs)
    if not specs:
        raise ValueError("loss_type is empty: name at least one loss")
    if len(weights) != len(specs):
        raise ValueError(
            f"loss_weights={weights}: give one weight for each of {', '.join(loss_types)}, such as "
            f"loss_weights={[1.0] * len(specs)}"
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"loss_weights={weights} must be finite, and not all 0")
    check_range("sft_weight", sft_weight, 0.0)
    return ([*specs, get_loss("sft")], [*weights, sft_weight]) if sft_weight > 0 else (specs, weights)


def _refuse_hard_labels(specs: list[LossSpec]) -> None:
    """Raise `ValueError` if no loss has rewards, or if a loss with rewards cannot use win rates as soft labels."""
    labeled = [spec for spec in specs if spec.computes_reward_metrics]
    others = [spec.name for spec in labeled if _WIN_RATES not in spec.optional_inputs] or ([] if labeled else ["sft"])
    if others:
        takers = ", ".join(name for name in list_losses() if _WIN_RATES in get_loss(name).optional_inputs)
        reads = [name for name in others if _WIN_RATES in get_loss(name).inputs]
        why = f"{', '.join(reads)} already reads `win_rate`" if reads else f"{', '.join(others)} has no soft labels"
        raise ValueError(f"use_win_rates=True makes soft labels, but {why}: remove it, or choose one of {takers}")


def _with_modifiers(terms: list[Term], modifiers: Sequence[Modifier]) -> list[Term]:
    """Add the modifiers to the terms that have rewards.

    Raises:
        ValueError: a modifier cannot modify one of these terms, or no term has rewards.
    """
    rewarded = [term for term in terms if term.spec.computes_reward_metrics]
    for modifier in modifiers:
        reasons = [(term.spec.name, modifier.refusal(term)) for term in rewarded] or [
            (terms[0].spec.name, "it has no rewards")
        ]
        refused = [f"it cannot modify {name}: {reason}" for name, reason in reasons if reason]
        if refused:
            raise ValueError(f"{modifier.setting}, but {'; '.join(refused)}")
    return [replace(term, modifiers=tuple(modifiers)) if term in rewarded else term for term in terms]


def _of_one_kind(specs: list[LossSpec], kind: ExampleKind | None) -> list[LossSpec]:
    """Return the form of each loss for one kind of examples.

    The kind is `kind`, if it is given and all losses have a form for it. Otherwise, it is the first kind for which all
    losses have a form.

    Raises:
        ValueError: there is no such kind.
    """
    for tried in ([kind] if kind else []) + [spec.kind for spec in specs]:
        forms = [spec.for_kind(tried) for spec in specs]
        if all(form.fits(tried) for form in forms):
            return forms
    wants = "; ".join(f"{spec.name} needs {spec.kind.wanted}" for spec in specs)
    raise ValueError(f"these losses compare different kinds of examples, and a dataset has only one kind: {wants}")


def _refuse_senseless(specs: list[LossSpec], use_weighting: bool, reference_free: bool) -> None:
    names = [spec.name for spec in specs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is listed twice (sft_weight also adds sft): keep one")
    other = next((spec for spec in specs if spec.kind is not PAIRS), None)
    if use_weighting and other:
        raise ValueError(f"use_weighting=True weights pairs, but {other.name} compares {other.kind.name}: leave it out")
    if use_weighting and "policy_chosen_alignment" in {name for spec in specs for name in spec.inputs}:
        raise ValueError("use_weighting=True would apply the WPO weight twice, as wpo already applies it: leave it out")
    if use_weighting and not any(spec.computes_reward_metrics for spec in specs):
        raise ValueError(
            f"use_weighting=True weights pairs, but {', '.join(names)} does not compare pairs: leave it out"
        )
    needing = [spec for spec in specs if spec.needs_reference_model]
    if reference_free and not needing:
        raise ValueError(f"reference_free=True has no effect, as {', '.join(names)} uses no reference: leave it out")
    bound = [spec.name for spec in needing if reference_free and not spec.can_be_reference_free]
    if bound:
        raise ValueError(f"reference_free=True, but {', '.join(bound)} is undefined without a reference: leave it out")


def _refuse_senseless_columns(specs: list[LossSpec], use_weighting: bool, columns: Collection[str]) -> None:
    one_value = [spec.name for spec in specs if spec.is_one_value]
    if one_value and (use_weighting or "weights" in columns):
        which, cure = ("use_weighting=True", "leave it out") if use_weighting else ("`weight`", "remove the column")
        raise ValueError(
            f"{which} weights the losses of examples, but {', '.join(one_value)} is one value for the batch: {cure}"
        )
    if "margins" in columns and not any("margins" in spec.inputs for spec in specs):
        takers = [name for name in list_losses() if "margins" in get_loss(name).inputs]
        raise ValueError(
            f"the data have a column `margin`, but {', '.join(spec.name for spec in specs)} has no margin: remove the "
            f"column, or choose one of {', '.join(takers)}"
        )


def _distribute(specs: list[LossSpec], loss_params: dict, shared_params: dict) -> dict[str, dict[str, Any]]:
    """Return the hyperparameters of each loss, keyed by loss.

    Raises:
        ValueError: a hyperparameter belongs to no loss, is given twice, has no effect, or has a value of the wrong
            type.
    """
    is_by_name = loss_params and all(isinstance(values, dict) for values in loss_params.values())
    by_name = loss_params if len(specs) > 1 or is_by_name else {specs[0].name: loss_params}
    own = {}
    for name, values in by_name.items():
        if not isinstance(values, dict):
            taker = next((spec.name for spec in specs if name in spec.defaults), specs[0].name)
            grouped = {taker: {name: values}}
            raise ValueError(
                f"loss_params={loss_params}: with several losses, group the hyperparameters by loss: "
                f"loss_params={grouped}"
            )
        if get_loss(name).name in own:
            raise ValueError(f"loss_params={loss_params} names {get_loss(name).name} twice ({name} is the same loss)")
        own[get_loss(name).name] = values
    missing = [name for name in own if name not in {spec.name for spec in specs}]
    if missing:
        raise ValueError(f"loss_params has {', '.join(missing)}, which is not among the losses: remove it")
    for spec in specs:
        _refuse_unknown(own.get(spec.name, {}), [spec])
        _refuse_other_types(own.get(spec.name, {}), spec)
    _refuse_unknown(shared_params, specs)
    _refuse_overridden(shared_params, own, specs)
    return {
        spec.name: {name: value for name, value in shared_params.items() if name in spec.defaults}
        | {name: value for name, value in own.get(spec.name, {}).items() if name in spec.defaults}
        for spec in specs
    }


def _refuse_overridden(shared: dict[str, Any], own: dict[str, dict[str, Any]], specs: list[LossSpec]) -> None:
    """Raise `ValueError` for a shared value without effect, because `loss_params` sets another one for every loss."""
    for name, value in shared.items():
        others = [own.get(spec.name, {}).get(name, value) for spec in specs if name in spec.defaults]
        if others and value not in others:
            raise ValueError(
                f"{name}={value!r} has no effect, because loss_params sets {name}={others[0]!r}: leave one out"
            )


def _refuse_other_types(params: dict[str, Any], spec: LossSpec) -> None:
    """Raise `ValueError` for a value that is not a number if the default is a number, and the same for bool."""
    for name, value in params.items():
        default = spec.defaults.get(name)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} of {spec.name} must be True or False, without quotes")
        elif isinstance(default, Real) and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{name}={value!r} of {spec.name} must be a number, without quotes")


# Values at which a hyperparameter has no effect. They are accepted even if no loss has the hyperparameter.
_OFF = {
    "label_smoothing": 0.0,
    "gamma": 0.0,
    "cpo_alpha": 0.0,
    "tpo_alpha": 0.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
}


def _refuse_unknown(params: dict[str, Any], specs: list[LossSpec]) -> None:
    asked = [name for name, value in params.items() if name not in _OFF or value != _OFF[name]]
    unknown = [name for name in asked if not any(name in spec.defaults for spec in specs)]
    if unknown:
        valid = "; ".join(f"{spec.name} takes " + (", ".join(spec.defaults) or "no hyperparameters") for spec in specs)
        given = ", ".join(f"{name}={params[name]!r}" for name in unknown)
        raise ValueError(f"{given} is not used by any loss: {valid}; {_meant(unknown, params, specs)}")


def _meant(unknown: list[str], params: dict[str, Any], specs: list[LossSpec]) -> str:
    """Return advice for hyperparameters that the losses of the objective do not have.

    If no registered loss has a hyperparameter of this name, the name may be misspelled, so suggest a similar one.
    """
    known = {name for loss in list_losses() for name in get_loss(loss).defaults}
    taken = [name for spec in specs for name in spec.defaults]
    near = {name: get_close_matches(name, taken, 1) for name in unknown if name not in known}
    meant = {found[0]: params[name] for name, found in near.items() if found}
    return f"did you mean loss_params={meant}?" if len(meant) == len(unknown) else "leave it out"
