"""The objective: the weighted sum of losses that a configuration asks for, as one function of named inputs."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_prefopt.examples import KINDS, PAIRS, ExampleKind
from hf_prefopt.losses.base import LossOutput, check_range
from hf_prefopt.losses.dpo import wpo_weights
from hf_prefopt.losses.modifiers import Modifier
from hf_prefopt.losses.registry import LossSpec, get_loss, list_losses, token_stats_of

State = dict[str, Tensor]
_WPO_INPUTS = ("policy_chosen_alignment", "policy_rejected_alignment")


@dataclass(frozen=True)
class Term:
    """One loss of the objective: its weight, its hyperparameters, and the inputs it is given.

    `absent` are the inputs that it can do without and that the data do not have.
    """

    spec: LossSpec
    weight: float
    params: dict[str, Any] = field(default_factory=dict)
    reference_free: bool = False
    absent: tuple[str, ...] = ()
    modifiers: tuple[Modifier, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that the loss is called with."""
        left_out = (*self.absent, *(self.spec.reference_inputs if self.reference_free else ()))
        return tuple(name for name in self.spec.inputs if name not in left_out)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that these are made of; the same without modifiers."""
        return functools.reduce(lambda names, modifier: modifier.reads(names), reversed(self.modifiers), self.names)

    @property
    def initial_state(self) -> Mapping[str, float]:
        """What the loss keeps before the first batch."""
        return {} if self.spec.state is None else self.spec.state.initial

    def __call__(self, inputs: dict[str, Tensor], of_the_run: Mapping[str, Any]) -> LossOutput:
        """The loss on the inputs it asks for, not weighted, and on what is known of what it asks of the run."""
        asked = {name: of_the_run[name] for name in self.spec.of_the_run if name in of_the_run}
        return self.spec(**self._modified(inputs), **self.params, **asked)

    def updated(self, state: State, inputs: dict[str, Tensor]) -> State:
        """The loss's state after the global batch of these inputs; what it was, of a loss that keeps none."""
        if self.spec.state is None:
            return state
        with torch.no_grad():
            return self.spec.state.update(state, **self._modified(inputs), **self.params)

    def _modified(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the loss is called with."""
        for modifier in self.modifiers:
            inputs = modifier(inputs, self.names)
        return {name: inputs[name] for name in self.names}


class Objective:
    """Σ_k w_k · loss_k over one forward, every component logged by its own name.

    The implicit rewards are those of the first loss that has any. With `use_weighting`, each loss that has rewards is
    multiplied by the pair's WPO weight. With `use_weights`, an example's sum is multiplied by the example's own weight;
    the loss of a step stays the mean over its examples, whatever their weights add up to.

    Attributes:
        kind: the kind of examples that all its losses compare.
        state: what losses keep across batches, by loss: numbers `[]`.
        progress, epoch: the part of a run's optimiser steps that is done, in [0, 1], and the number of the epoch, for
            losses that change with them; who runs it says so.

    Raises:
        ValueError: at construction, when a loss refuses its hyperparameters, on two examples of made-up numbers.
    """

    def __init__(self, terms: list[Term], use_weighting: bool = False, use_weights: bool = False):
        self.terms = terms
        self.use_weighting, self.use_weights = use_weighting, use_weights
        self.state: dict[str, State] = {}
        self.progress, self.epoch = 0.0, 0
        self.reset_state()
        modifiers = (*(_WPO_INPUTS if use_weighting else ()), *(("weights",) if use_weights else ()))
        self.inputs = tuple(dict.fromkeys([*(name for term in terms for name in term.inputs), *modifiers]))
        self.kind = next(kind for kind in KINDS if all(map(kind.takes, self.inputs)))
        self._check_on_made_up_numbers()

    @property
    def needs_reference_model(self) -> bool:
        """Whether any loss reads the reference's log-probs."""
        return any(name.startswith("ref_") for name in self.inputs)

    @property
    def needs_global_batch(self) -> bool:
        """Whether any loss of an example depends on the other examples of the global batch."""
        return any(term.spec.needs_global_batch for term in self.terms)

    @property
    def needs_mismatched(self) -> bool:
        """Whether any loss reads log-probs of another prompt's responses."""
        return any("mismatched" in name for name in self.inputs)

    @property
    def token_stats(self) -> tuple[str, ...]:
        """The per-token statistics, besides the log-prob, that the policy's head must compute."""
        return tuple(sorted(token_stats_of(self.inputs, "policy")))

    @property
    def reference_token_stats(self) -> tuple[str, ...]:
        """The same for the reference's head."""
        return tuple(sorted(token_stats_of(self.inputs, "ref")))

    def __call__(self, inputs: dict[str, Tensor], training: bool = True) -> LossOutput:
        """The weighted sum on named inputs `[B]` or `[B, K]`; see `losses.inputs`. In evaluations not `training`."""
        outputs = {term.spec.name: self._weighted(term, inputs, training) for term in self.terms}
        parts = (term.weight * output.losses for term, output in zip(self.terms, outputs.values(), strict=True))
        total = functools.reduce(torch.add, parts)
        if self.use_weights:
            total = total * inputs["weights"]
        rewards = next((output.rewards for output in outputs.values() if output.rewards is not None), None)
        components = {
            f"{name}_{part}": values for name, output in outputs.items() for part, values in output.components.items()
        }
        if len(outputs) > 1:
            components |= {name: output.losses.detach() for name, output in outputs.items()}
        return LossOutput(total, rewards, components)

    def reset_state(self) -> None:
        """Forget all batches."""
        initial = {term.spec.name: term.spec.state.initial for term in self.terms if term.spec.state is not None}
        self.state = {loss: {} for loss in initial}
        self.load_state_dict(initial)

    def update_state(self, inputs: dict[str, Tensor]) -> None:
        """Take the global batch of a step into what losses keep: once, before they are computed on it."""
        for term in self.terms:
            if term.spec.name in self.state:
                self.state[term.spec.name] = term.updated(self._state_beside(term, inputs), inputs)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What losses keep, as numbers for a checkpoint."""
        return {loss: {name: value.item() for name, value in state.items()} for loss, state in self.state.items()}

    def load_state_dict(self, saved: Mapping[str, Mapping[str, float]]) -> None:
        """Take over what `state_dict` gave; losses that it does not name start afresh."""
        for loss in self.state.keys() & saved.keys():
            self.state[loss] = {name: torch.tensor(value, dtype=torch.float64) for name, value in saved[loss].items()}

    def _state_beside(self, term: Term, inputs: dict[str, Tensor]) -> State:
        """The state of a loss, on the device and in the precision of its inputs."""
        like = inputs[term.inputs[0]]
        return {name: value.to(like) for name, value in self.state.get(term.spec.name, {}).items()}

    def _weighted(self, term: Term, inputs: dict[str, Tensor], training: bool) -> LossOutput:
        """The output of one loss, times the pair's WPO weight where that is asked for and the loss is of pairs."""
        of_the_run = {
            "state": self._state_beside(term, inputs),
            "progress": self.progress,
            # Evaluations of a data set are to be compared with each other.
            "epoch": self.epoch if training else 0,
            "training": training,
        }
        output = term(inputs, of_the_run)
        if self.use_weighting and term.spec.computes_reward_metrics:
            chosen, rejected = (inputs[name] for name in _WPO_INPUTS)
            output.losses = output.losses * wpo_weights(chosen, rejected, output.losses)
        return output

    def _check_on_made_up_numbers(self) -> None:
        """Call every loss once, so that a bad hyperparameter is refused now and not at the first step."""
        self({name: self.kind.made_up(name) for name in self.inputs})


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
) -> Objective:
    """The objective of a configuration.

    Args:
        loss_types: names or aliases.
        loss_weights: one per loss; 1 each when left out.
        loss_params: hyperparameters, flat for one loss (`{"gamma": 0.5}`), by name for several
            (`{"simpo": {"gamma": 0.5}}`).
        shared_params: hyperparameters that every loss takes that has them (`beta`, `label_smoothing`).
        sft_weight: adds this times the NLL of the chosen response.
        use_weighting: multiplies pair losses by their WPO weight.
        reference_free: leaves the reference out of the losses that can do without.
        kind: the examples that there are, for losses that take several kinds; by default what the losses agree on.
        modifiers: change what the losses that have rewards are given, in that order.
        columns: what the data say of the examples besides (`ExampleKind.extras`): `weights` multiply the examples'
            losses, `margins` go to the losses that subtract one, the others to the losses that ask for them.

    Raises:
        ValueError: an unknown name, a parameter that no loss takes (the valid ones are listed with their defaults), a
            combination without meaning, or a value out of range.
    """
    specs = [get_loss(name) for name in loss_types]
    weights = list(loss_weights) if loss_weights is not None else [1.0] * len(specs)
    if not specs:
        raise ValueError("loss_type is empty: name at least one loss")
    if len(weights) != len(specs):
        raise ValueError(f"loss_weights has {len(weights)} values for {len(specs)} losses {loss_types}")
    check_range("sft_weight", sft_weight, 0.0)
    if sft_weight > 0:
        specs, weights = [*specs, get_loss("sft")], [*weights, sft_weight]
    specs = _of_one_kind(specs, kind)
    _refuse_senseless(specs, use_weighting, reference_free)
    _refuse_senseless_columns(specs, use_weighting, columns)
    params = _distribute(specs, loss_params or {}, shared_params or {})
    terms = [
        Term(
            spec,
            weight,
            params[spec.name],
            reference_free and spec.can_be_reference_free,
            absent=tuple(name for name in spec.optional_columns if name not in columns),
        )
        for spec, weight in zip(specs, weights, strict=True)
    ]
    return Objective(_with_modifiers(terms, modifiers), use_weighting, use_weights="weights" in columns)


def _with_modifiers(terms: list[Term], modifiers: Sequence[Modifier]) -> list[Term]:
    """The terms, those that have rewards modified; what is not changed by a modifier is refused."""
    rewarded = [term for term in terms if term.spec.computes_reward_metrics]
    for modifier in modifiers:
        reasons = [(term.spec.name, modifier.refusal(term)) for term in rewarded] or [
            (terms[0].spec.name, "it has no rewards")
        ]
        refused = [f"{name} cannot be modified so: {reason}" for name, reason in reasons if reason]
        if refused:
            raise ValueError(f"{modifier.setting}, but {'; '.join(refused)}")
    return [replace(term, modifiers=tuple(modifiers)) if term in rewarded else term for term in terms]


def _of_one_kind(specs: list[LossSpec], kind: ExampleKind | None) -> list[LossSpec]:
    """The losses in their forms for the given kind of examples, or for the first kind that all of them take."""
    for tried in ([kind] if kind else []) + [spec.kind for spec in specs]:
        forms = [spec.for_kind(tried) for spec in specs]
        if all(form.fits(tried) for form in forms):
            return forms
    wants = "; ".join(f"{spec.name} wants {spec.kind.wanted}" for spec in specs)
    raise ValueError(f"these losses compare different kinds of examples, which no data set holds at once: {wants}")


def _refuse_senseless(specs: list[LossSpec], use_weighting: bool, reference_free: bool) -> None:
    names = [spec.name for spec in specs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} stands twice among the losses (sft_weight adds sft): keep one")
    other = next((spec for spec in specs if spec.kind is not PAIRS), None)
    if use_weighting and other:
        raise ValueError(f"use_weighting=True weighs preference pairs, and {other.name} compares {other.kind.name}")
    if use_weighting and "policy_chosen_alignment" in {name for spec in specs for name in spec.inputs}:
        raise ValueError("use_weighting=True would apply the WPO weight twice: wpo has it already")
    if use_weighting and not any(spec.computes_reward_metrics for spec in specs):
        raise ValueError(f"use_weighting=True weighs preference pairs, and {', '.join(names)} has none")
    needing = [spec for spec in specs if spec.needs_reference_model]
    if reference_free and not needing:
        raise ValueError(f"reference_free=True changes nothing: {', '.join(names)} uses no reference")
    bound = [spec.name for spec in needing if reference_free and not spec.can_be_reference_free]
    if bound:
        raise ValueError(f"reference_free=True, but {', '.join(bound)} is undefined without a reference")


def _refuse_senseless_columns(specs: list[LossSpec], use_weighting: bool, columns: Collection[str]) -> None:
    one_value = [spec.name for spec in specs if spec.is_one_value]
    if one_value and (use_weighting or "weights" in columns):
        which, cure = ("use_weighting=True", "leave it out") if use_weighting else ("`weight`", "remove the column")
        raise ValueError(
            f"{which} weighs the losses of examples, and {', '.join(one_value)} is one value for a whole batch: {cure}"
        )
    if "margins" in columns and not any("margins" in spec.inputs for spec in specs):
        takers = [name for name in list_losses() if "margins" in get_loss(name).inputs]
        raise ValueError(
            f"there is a column `margin`, and {', '.join(spec.name for spec in specs)} subtracts none: remove it, or "
            f"choose one of {', '.join(takers)}"
        )


def _distribute(specs: list[LossSpec], loss_params: dict, shared_params: dict) -> dict[str, dict[str, Any]]:
    """The hyperparameters of each loss by its name; whatever no loss takes is refused with what they do take."""
    by_name = loss_params if len(specs) > 1 or specs[0].name in loss_params else {specs[0].name: loss_params}
    own = {}
    for name, values in by_name.items():
        if not isinstance(values, dict):
            raise ValueError(
                f"loss_params[{name!r}]={values!r}: with several losses, give them by loss, "
                f"as in {{{specs[0].name!r}: {{{name!r}: {values!r}}}}}"
            )
        own[get_loss(name).name] = values
    missing = [name for name in own if name not in {spec.name for spec in specs}]
    if missing:
        raise ValueError(f"loss_params names {', '.join(missing)}, which is not among the losses")
    for spec in specs:
        _refuse_unknown(own.get(spec.name, {}), [spec])
    _refuse_unknown(shared_params, specs)
    return {
        spec.name: {name: value for name, value in shared_params.items() if name in spec.defaults}
        | own.get(spec.name, {})
        for spec in specs
    }


def _refuse_unknown(params: dict[str, Any], specs: list[LossSpec]) -> None:
    unknown = [name for name in params if not any(name in spec.defaults for spec in specs)]
    if unknown:
        valid = "; ".join(
            f"{spec.name} takes " + (", ".join(f"{k}={v!r}" for k, v in spec.defaults.items()) or "no hyperparameters")
            for spec in specs
        )
        raise ValueError(f"{', '.join(f'{name}={params[name]!r}' for name in unknown)} is used by no loss: {valid}")
