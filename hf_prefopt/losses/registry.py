"""The registry of losses. The signature of a loss declares what it needs.

A loss is a pure function of tensors. The names of its parameters say what it needs, so nothing is declared twice:

    policy_chosen_logps, ref_rejected_logps, ...   pairs: {policy | ref}_{chosen | rejected}_{statistic}, `[B]`; the
                                                   statistics are `kinds.STATISTICS`
    chosen_lengths, rejected_lengths               scored tokens per response: `[B]`
    policy_chosen_token_logps, ...                 log-probs of the scored tokens: `[B, T]`, padded with 0
    chosen_token_mask, rejected_token_mask         `[B, T]` bool, False for padding
    chosen_token_weights, rejected_token_weights   token weights from the dataset's columns: `[B, T]`
    rows, pair_in_row                              the pair's row in the dataset, and its index in that row: `[B]`
    policy_gold_logps, gold_lengths, ...           triples: a pair and a third, gold response: `[B]`
    policy_logps, ref_logps, lengths, labels       single responses, desirable (True) or not: `[B]`
    quantiles                                      the quantile of a response's reward among the reference's: `[B]`
    policy_token_logps, token_mask, ...            the same for the tokens of single responses: `[B, T]`
    policy_mismatched_logps, ...                   another prompt's response, scored after this prompt: `[B]`
    policy_list_logps, ref_list_logps, list_lengths, list_mask, list_ranks, list_scores     lists: `[B, K]`
    chosen_scores, chosen_win_rates, margins, ...  optional columns of pairs: `[B]`; see `kinds.pairs`
    state                                          numbers kept across batches; see `RunningState`
    progress                                       the fraction of the run's optimizer steps that is done, in [0, 1]
    epoch                                          the number of the epoch, from 0; 0 in evaluations
    training                                       False in evaluations
    everything else                                a hyperparameter, which must have a default

If a reference input has the default `None`, the loss also works without a reference. If an optional column has the
default `None`, the loss gets it whenever the data have it.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_prefopt.kinds import KINDS, PAIRS, STATISTICS, ExampleKind
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.returned import check_returned


@dataclass(frozen=True)
class RunningState:
    """The numbers that a loss keeps across the batches of a training run.

    Attributes:
        initial: the values before the first batch.
        update: `(state, **inputs, **hyperparameters) -> new state`, with scalar tensors without gradients. `update` is
            called once per optimizer step, on the global batch, before the loss is computed, and never in evaluation.
    """

    initial: Mapping[str, float]
    update: Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class LossSpec:
    """A registered loss: the function, and what the trainer must know to call it.

    Attributes:
        name: the loss's main name.
        aliases: other names, accepted wherever the main name is.
        function: `(named tensors [B], **hyperparameters) -> LossOutput`, or a tensor `[B]` of losses.
        paper: arXiv number of the source; empty if there is none.
        description: the first line of the function's docstring.
        is_average_loss: the log-probs are averaged over tokens, so the scale of beta differs from DPO's.
        computes_reward_metrics: the loss has implicit rewards.
        needs_global_batch: the loss of an example depends on the other examples of the global batch.
        has_own_divergence: the loss contains its own divergence from the reference, so no other divergence can be used.
        state: the numbers that the loss keeps across batches; the loss gets them as the argument `state`.
        is_one_value: the loss is one value for the global batch, so the losses of examples cannot be weighted.
        check_data: checks the examples of a whole dataset before training. Its parameters are hyperparameters and
            inputs of the loss (`[N]`, `[N, K]`). It returns advice for the user, or `None`, and raises
            `UnsuitableExamples` for examples that the loss cannot compare.
        form_of: the name of the loss that this loss adapts to another kind of examples.
        inputs: the names of the loss's tensor parameters.
        defaults: its hyperparameters and their default values.
    """

    name: str
    function: Callable[..., LossOutput | Tensor]
    aliases: tuple[str, ...] = ()
    paper: str = ""
    description: str = ""
    is_average_loss: bool = False
    computes_reward_metrics: bool = True
    needs_global_batch: bool = False
    has_own_divergence: bool = False
    is_one_value: bool = False
    check_data: Callable[..., str | None] | None = None
    state: RunningState | None = None
    form_of: str = ""
    inputs: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> ExampleKind:
        """The kind of examples that the loss compares."""
        return next((kind for kind in KINDS if self.fits(kind)), PAIRS)

    def fits(self, kind: ExampleKind) -> bool:
        """Return whether the loss can compare examples of that kind; triples also count as pairs."""
        return all(map(kind.has_input, self.inputs))

    def for_kind(self, kind: ExampleKind) -> "LossSpec":
        """Return the form of this loss for examples of that kind, or the loss itself if there is no such form."""
        forms = (spec for spec in _LOSSES.values() if self.name in (spec.name, spec.form_of))
        return next((spec for spec in forms if spec.kind is kind), self)

    @property
    def reference_inputs(self) -> tuple[str, ...]:
        """The inputs that come from the reference model."""
        return tuple(name for name in self.inputs if name.startswith("ref_"))

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """The inputs that the loss gets only if the data have them."""
        parameters = inspect.signature(self.function).parameters
        return tuple(
            name for name in self.inputs if name in self.kind.optional_columns and parameters[name].default is None
        )

    @property
    def run_inputs(self) -> tuple[str, ...]:
        """The loss's parameters that describe the run, among `state`, `progress`, `epoch` and `training`."""
        parameters = inspect.signature(self.function).parameters
        return tuple(name for name in _RUN_INPUTS if name in parameters and (name != "state" or self.state))

    @property
    def needs_reference_model(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return bool(self.reference_inputs)

    @property
    def can_be_reference_free(self) -> bool:
        """Whether the reference's log-probs may be left out."""
        parameters = inspect.signature(self.function).parameters
        return self.needs_reference_model and all(parameters[name].default is None for name in self.reference_inputs)

    def __call__(self, **arguments: Any) -> LossOutput:
        """Compute the loss from named inputs and hyperparameters.

        If the function returns only losses, the implicit rewards are β·(s − s_ref).

        Raises:
            ValueError: the function does not return one number per example; see `losses.returned`.
        """
        output = self.function(**arguments)
        if not isinstance(output, LossOutput):
            output = LossOutput(output, self._default_rewards(arguments))
        given = {name: arguments[name] for name in self.inputs if arguments.get(name) is not None}
        check_returned(self, output, given)
        return output

    def _default_rewards(self, arguments: dict[str, Any]) -> Tensor | None:
        """Return β·(s − s_ref), the implicit reward of a loss function that returns only the losses."""
        if not self.computes_reward_metrics:
            return None
        return self.kind.default_rewards(arguments, arguments.get("beta", self.defaults.get("beta", 1.0)))


def token_stats_of(inputs: Iterable[str], model: str) -> frozenset[str]:
    """Return the per-token statistics that a model's head must compute for these inputs, in addition to log-probs.

    Args:
        inputs: the names of the losses' inputs.
        model: "policy" or "ref".
    """
    found = [(name, kind.statistic(name)) for name in inputs for kind in KINDS if kind.has_input(name)]
    asked = [(name, STATISTICS[statistic]) for name, statistic in found if statistic]
    own = {stat for name, statistic in asked if name.startswith(model) for stat in statistic.own}
    return frozenset(own | {stat for _, statistic in asked if model == "ref" for stat in statistic.of_reference})


# Parameters that are neither inputs of examples nor hyperparameters.
_RUN_INPUTS = ("state", "progress", "epoch", "training")
_LOSSES: dict[str, LossSpec] = {}
_ALIASES: dict[str, str] = {}


def register_loss(
    name: str, *, aliases: tuple[str, ...] = (), paper: str = "", **capabilities: Any
) -> Callable[[Callable], Callable]:
    """Register a loss, so that its name works in YAML, on the command line and in `PreferenceConfig`.

    Example:
        ```python
        @register_loss("my_loss", paper="2305.18290")
        def my_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
            chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
            return torch.relu(1 - beta * (chosen - rejected))
        ```

    Args:
        name: the loss's name.
        aliases: other accepted names.
        paper: arXiv number.
        **capabilities: what else the trainer must know, such as `needs_global_batch` or `state`: the attributes of
            `hf_prefopt.losses.LossSpec`, where they differ from its defaults.

    Returns:
        A decorator that returns the function unchanged. A function with the same module and qualified name replaces the
        one that was registered before, so a notebook cell can be run again.

    Raises:
        ValueError: the name or an alias belongs to another loss, a parameter is neither a known input nor has a
            default, or the inputs belong to several kinds of examples.
    """

    def decorate(function: Callable) -> Callable:
        inputs, defaults = _split_signature(name, function)
        owners = {n: _LOSSES[_ALIASES.get(n, n)] for n in (name, *aliases) if n in _LOSSES or n in _ALIASES}
        taken = [n for n, owner in owners.items() if owner.name != name or not _is_anew(function, owner.function)]
        if taken:
            raise ValueError(f"loss name {', '.join(taken)} is already registered; choose another name")
        description = (inspect.getdoc(function) or "").split("\n", 1)[0]
        spec = LossSpec(
            name, function, tuple(aliases), paper, description, inputs=inputs, defaults=defaults, **capabilities
        )
        for alias in _LOSSES[name].aliases if name in _LOSSES else ():
            del _ALIASES[alias]
        _LOSSES[name] = spec
        _ALIASES.update(dict.fromkeys(aliases, name))
        return function

    return decorate


def _is_anew(function: Callable, before: Callable) -> bool:
    """Return whether a function comes from the same definition as an earlier one, executed again."""
    return _definition(function) is not None and _definition(function) == _definition(before)


def _definition(function: Callable) -> tuple[str, str] | None:
    """Return the module and qualified name of a function, or `None` for lambdas, closures and callable objects."""
    function = inspect.unwrap(function)
    name = getattr(function, "__qualname__", "<lambda>")
    is_one_of_several = name.endswith("<lambda>") or getattr(function, "__closure__", None) is not None
    return None if is_one_of_several else (function.__module__, name)


def _split_signature(name: str, function: Callable) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the inputs of a loss function, which are recognized by name, and its hyperparameters with defaults."""
    parameters = inspect.signature(function).parameters.values()
    inputs = tuple(p.name for p in parameters if any(kind.has_input(p.name) for kind in KINDS))
    if not any(all(map(kind.has_input, inputs)) for kind in KINDS):
        kinds = " and ".join(dict.fromkeys(next(k.name for k in KINDS if k.has_input(given)) for given in inputs))
        raise ValueError(f"loss {name!r} takes inputs of {kinds}: a loss compares one kind of examples")
    defaults = {p.name: p.default for p in parameters if p.name not in (*inputs, *_RUN_INPUTS)}
    unknown = [parameter for parameter, default in defaults.items() if default is inspect.Parameter.empty]
    if unknown:
        raise ValueError(
            f"loss {name!r}: parameter {', '.join(unknown)} is neither a known input nor a hyperparameter, which needs "
            f"a default value; {_offered(unknown[0])}"
        )
    _refuse_misspelt(name, {p.name: p.default for p in parameters}, inputs)
    return inputs, defaults


def _refuse_misspelt(loss: str, given: Mapping[str, Any], inputs: tuple[str, ...]) -> None:
    """Raise `ValueError` for parameters that look like inputs but would be hyperparameters.

    Args:
        given: all parameters of the function, with their defaults.
    """
    for name, default in given.items():
        if name in inputs and default not in (inspect.Parameter.empty, None):
            raise ValueError(
                f"loss {loss!r}: {name}={default!r} is an input, which comes from the data or the models: remove the "
                "default, or make it None if the input is optional"
            )
        meant = None if name in inputs or name in _RUN_INPUTS else _input_near(name)
        # A name without an underscore and with a default is a hyperparameter that resembles an input: `weight=1.0`.
        if meant and (default is None or "_" in name):
            raise ValueError(
                f"loss {loss!r}: {name} is not an input, and its default makes it a hyperparameter: did you mean "
                f"{meant}? Otherwise choose another name"
            )


def _offered(name: str) -> str:
    """Return a hint for a parameter that is not an input: the input that was probably meant, or examples."""
    prefixed = [f"{model}_{name}" for model in ("policy", "ref")]
    known = [near for near in prefixed if any(kind.has_input(near) for kind in KINDS)]
    meant = " or ".join(known) or _input_near(name)
    return f"did you mean {meant}?" if meant else "inputs have names such as policy_chosen_logps and chosen_lengths"


def _input_near(name: str) -> str | None:
    """Return an input whose name differs from `name` by one letter that is added, removed or replaced, or `None`."""
    letters = "abcdefghijklmnopqrstuvwxyz_"
    cuts = [(name[:at], name[at:]) for at in range(len(name) + 1)]
    less = (head + tail[1:] for head, tail in cuts if tail)
    others = (head + letter + tail[1:] for head, tail in cuts for letter in letters if tail)
    more = (head + letter + tail for head, tail in cuts for letter in letters)
    known = (near for near in (*more, *less, *others) if near in _RUN_INPUTS or any(k.has_input(near) for k in KINDS))
    return next(known, None)


def get_loss(name: str) -> LossSpec:
    """Return the registered loss with that name or alias, callable with named tensors and hyperparameters.

    Args:
        name: the loss's name or one of its aliases.

    Returns:
        The loss, with its `description`, `paper`, `inputs` (names of tensors), and `defaults` of hyperparameters.

    Raises:
        ValueError: no loss has this name; the message suggests similar names.
    """
    canonical = _ALIASES.get(name, name)
    if canonical not in _LOSSES:
        known = [*_LOSSES, *_ALIASES]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        *others, last = near or [""]
        meant = f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}? " if near else ""
        raise ValueError(f"there is no loss {name}; {meant}`hf_prefopt losses` lists all")
    return _LOSSES[canonical]


def list_losses() -> list[str]:
    """Return the names of all registered losses, sorted, without aliases."""
    return sorted(_LOSSES)
