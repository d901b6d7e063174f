"""The objective: the weighted sum of the losses that a configuration names, as one function of named inputs."""

import functools
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.kinds import KINDS, PAIRS, Metric
from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.dpo import wpo_weights
from hf_prefopt.losses.registry import token_stats_of
from hf_prefopt.objective.term import State, Term
from hf_prefopt.objective.trial import try_loss

# The name of a mixture of experts' auxiliary loss, both as an input of the objective and in the logs.
AUX_LOSS = "aux_loss"
AsLogged = Callable[[dict[str, Metric], dict[str, Tensor]], dict[str, Metric]]
_WPO_INPUTS = ("policy_chosen_alignment", "policy_rejected_alignment")


class Objective:
    """The weighted sum Σ_k w_k · loss_k of several losses, where w_k is the weight of loss k.

    All losses are computed from one forward pass, and every component is logged under its own name. The implicit
    rewards are those of the first loss that has rewards. With `use_weighting`, each loss that has rewards is multiplied
    by the pair's WPO weight. With `use_weights`, the weighted sum of an example is multiplied by the example's weight.
    The loss of a step is still the mean over its examples; it is not divided by the sum of the weights. The auxiliary
    loss of a mixture of experts is added with its own coefficient, and none of these weights affects it.

    Attributes:
        kind: the kind of examples that all losses compare.
        state: the numbers that losses keep across batches, as scalar tensors, keyed by loss and name.
        aux_loss_coef: the coefficient of the auxiliary loss of a mixture of experts. The trainer sets it.
        progress: the fraction of the run's optimizer steps that is done, in [0, 1]. The trainer sets it.
        epoch: the number of the epoch, from 0. The trainer sets it.
        as_logged: a function that takes the metrics of the examples and the inputs of the losses, and returns the
            metrics to log. `hf_prefopt.trl` sets it to follow TRL's conventions.

    Raises:
        ValueError: a loss fails in a trial on two synthetic examples at construction; see `trial.try_loss`.
    """

    def __init__(self, terms: list[Term], use_weighting: bool = False, use_weights: bool = False):
        self.terms = terms
        self.use_weighting, self.use_weights = use_weighting, use_weights
        self.state: dict[str, State] = {}
        self.progress, self.epoch, self.aux_loss_coef = 0.0, 0, 0.0
        self.as_logged: AsLogged = lambda metrics, inputs: metrics
        self.reset_state()
        modifiers = (*(_WPO_INPUTS if use_weighting else ()), *(("weights",) if use_weights else ()))
        self.inputs = tuple(dict.fromkeys([*(name for term in terms for name in term.inputs), *modifiers]))
        self.kind = next(kind for kind in KINDS if all(map(kind.has_input, self.inputs)))
        self._check_on_made_up_numbers()

    @property
    def needs_reference_model(self) -> bool:
        """Whether any loss reads the reference's log-probs."""
        return any(name.startswith("ref_") for name in self.inputs)

    @property
    def needs_global_batch(self) -> bool:
        """Whether, for any of the losses, the loss of an example depends on other examples of the global batch."""
        return any(term.spec.needs_global_batch for term in self.terms)

    @cached_property
    def ignores_shared_tokens(self) -> bool:
        """Whether tokens with which both responses of a pair begin can be scored as part of the prompt.

        Scoring them as part of the responses adds the same log-probs to the sums of both responses, and the same number
        of tokens to their lengths. A trial on synthetic examples checks whether this leaves the losses unchanged.
        """
        if self.kind is not PAIRS or not all(map(_counts_tokens, self.inputs)):
            return False
        inputs = made_up_examples(self.inputs, count=8, dtype=torch.float64)
        moved = dict(inputs)
        for name, value in inputs.items():
            if name.endswith(("_logps", "_lengths")):
                shift = 5 if name.endswith("_lengths") else -9 if name.startswith("policy") else -7
                moved[name] = value + shift
        before, after = (self(given).losses.detach() for given in (inputs, moved))
        return torch.allclose(before, after, rtol=1e-9, atol=1e-9)

    @property
    def needs_mismatched(self) -> bool:
        """Whether any loss reads log-probs of another prompt's responses."""
        return any("mismatched" in name for name in self.inputs)

    @property
    def needs_prompts(self) -> bool:
        """Whether any loss reads log-probs of prompts."""
        return any("prompt" in name for name in self.inputs)

    @property
    def token_stats(self) -> tuple[str, ...]:
        """The per-token statistics that the policy's head must compute in addition to log-probs."""
        return tuple(sorted(token_stats_of(self.inputs, "policy")))

    @property
    def reference_token_stats(self) -> tuple[str, ...]:
        """The per-token statistics that the reference's head must compute in addition to log-probs."""
        return tuple(sorted(token_stats_of(self.inputs, "ref")))

    def read(
        self, batch: PreferenceBatch, policy: ResponseScores, reference: ResponseScores | None
    ) -> dict[str, Tensor]:
        """Return the inputs that the losses and metrics need for the examples of a batch, keyed by name."""
        names = dict.fromkeys((*self.inputs, *self.kind.metric_inputs))
        inputs = loss_inputs(names, batch, policy, reference)
        if policy.aux_loss is not None:
            # Every example gets the auxiliary loss of its forward pass, so the mean over the examples of a step weights
            # each forward pass by its number of examples.
            inputs[AUX_LOSS] = policy.aux_loss.to(policy.token_logps.dtype).expand(len(batch["rows"]))
        return inputs

    def __call__(self, inputs: dict[str, Tensor], training: bool = True) -> LossOutput:
        """Return the weighted sum of the losses.

        Args:
            inputs: the result of `read`, or tensors with the same names.
            training: False in evaluation.
        """
        outputs = {term.spec.name: self._weighted(term, inputs, training) for term in self.terms}
        parts = (term.weight * output.losses for term, output in zip(self.terms, outputs.values(), strict=True))
        total = functools.reduce(torch.add, parts)
        if self.use_weights:
            total = total * inputs["weights"]
        if AUX_LOSS in inputs:
            total = total + self.aux_loss_coef * inputs[AUX_LOSS]
        rewards = next((output.rewards for output in outputs.values() if output.rewards is not None), None)
        components = {
            f"{name}_{part}": values for name, output in outputs.items() for part, values in output.components.items()
        }
        if len(outputs) > 1:
            components |= {name: output.losses.detach() for name, output in outputs.items()}
        return LossOutput(total, rewards, components)

    def reset_state(self) -> None:
        """Reset the state of all losses to its initial values."""
        initial = {term.spec.name: term.spec.state.initial for term in self.terms if term.spec.state is not None}
        self.state = {loss: {} for loss in initial}
        self.load_state_dict(initial)

    def update_state(self, inputs: dict[str, Tensor]) -> None:
        """Update the state of the losses with the inputs of a step's global batch.

        Call this once per step, before the losses are computed.
        """
        for term in self.terms:
            if term.spec.name in self.state:
                self.state[term.spec.name] = term.updated(self._state_beside(term, inputs), inputs)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the state of the losses, as numbers for a checkpoint."""
        return {loss: {name: value.item() for name, value in state.items()} for loss, state in self.state.items()}

    def load_state_dict(self, saved: Mapping[str, Mapping[str, float]]) -> None:
        """Load the result of `state_dict`. Losses that are missing in it keep their current state."""
        for loss in self.state.keys() & saved.keys():
            self.state[loss] = {name: torch.tensor(value, dtype=torch.float64) for name, value in saved[loss].items()}

    def _state_beside(self, term: Term, inputs: dict[str, Tensor]) -> State:
        """Return the state of a loss, moved to the device and dtype of the loss's inputs."""
        like = inputs[term.inputs[0]]
        return {name: value.to(like) for name, value in self.state.get(term.spec.name, {}).items()}

    def _weighted(self, term: Term, inputs: dict[str, Tensor], training: bool) -> LossOutput:
        """Return the output of one loss. With `use_weighting`, a loss that has rewards is multiplied by WPO weights."""
        run_inputs = {
            "state": self._state_beside(term, inputs),
            "progress": self.progress,
            # A fixed epoch keeps evaluations comparable with each other.
            "epoch": self.epoch if training else 0,
            "training": training,
        }
        output = term(inputs, run_inputs)
        if self.use_weighting and term.spec.computes_reward_metrics:
            chosen, rejected = (inputs[name] for name in _WPO_INPUTS)
            output.losses = output.losses * wpo_weights(chosen, rejected, output.losses)
        return output

    def _check_on_made_up_numbers(self) -> None:
        """Try every loss with `trial.try_loss`, so that mistakes raise an error now and not at the first step."""
        for term in self.terms:
            with torch.device("cpu"):  # also if the caller has another default device
                try_loss(term, partial(self._weighted, term, training=True), self.inputs)


def _counts_tokens(name: str) -> bool:
    """Return whether the trial in `ignores_shared_tokens` can handle an input.

    It can handle sums over tokens, lengths, and inputs that do not depend on tokens.
    """
    of_tokens = ("token", "alignment", "entropy", "_kl", "gold", "mismatched", "prompt")
    return not any(part in name for part in of_tokens)


class ResponseStatistics:
    """The statistics of a batch's responses under one model. Each is computed at its first access, and then cached.

    Attributes:
        logps, alignment, entropy, normalized_entropy, kl, lengths: `[R]`, for the batch's R responses, as in
            `ResponseScores`.
        token_logps: `[R, T]`. Log-probs (nats) of each response's scored tokens, in order, padded with 0. T is the
            length of the longest response of the batch.
        token_mask: `[R, T]` bool. False for padding.
    """

    def __init__(self, scores: ResponseScores, longest: int):
        self._scores, self._longest = scores, longest

    @cached_property
    def token_logps(self) -> Tensor:
        return self._scores.by_response(self._scores.token_logps, self._longest)

    @cached_property
    def token_mask(self) -> Tensor:
        lengths = self._scores.lengths
        return torch.arange(self._longest, device=lengths.device) < lengths[:, None]

    def __getattr__(self, statistic: str) -> Tensor:
        value = getattr(self._scores, statistic)
        setattr(self, statistic, value)
        return value


def loss_inputs(
    names: Iterable[str], batch: PreferenceBatch, policy: ResponseScores, reference: ResponseScores | None
) -> dict[str, Tensor]:
    """Return the inputs of losses for the examples of a batch, keyed by name.

    Args:
        names: the names of the inputs, which are parameters of losses (see `losses.registry`).
        batch: the batch.
        policy, reference: the scores of the batch's responses under each model. The reference may be `None`.

    Returns:
        Tensors `[B]`, or `[B, T]` for tokens, or `[B, K]` for lists. Gradients flow to the policy's scores.
    """
    given = {"policy": policy, "ref": reference}
    scores = {model: ResponseStatistics(scores, batch["longest_response"]) for model, scores in given.items() if scores}
    kind_of = {name: next(kind for kind in KINDS if kind.has_input(name)) for name in names}
    return {name: kind.input_of(name, batch, scores) for name, kind in kind_of.items()}
