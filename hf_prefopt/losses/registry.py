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
    policy_logps, ref_logps, lengths, labels       single responses: `[B]`; `labels` is True for desirable ones
    quantiles                                      single responses: the quantile of a response's reward among the
                                                   rewards of the reference's own responses: `[B]`
    policy_token_logps, token_mask, ...            single responses: as for pairs, without "chosen_": `[B, T]`
    policy_mismatched_logps, ...                   log-probs of another prompt's response after this prompt: `[B]`
    policy_list_logps, ref_list_logps, list_lengths, list_mask, list_ranks, list_scores     lists: `[B, K]`
    chosen_scores, chosen_win_rates, margins, ...  optional columns of pairs: `[B]`; see `kinds.pairs`
    state                                          numbers kept across batches; see `RunningState`
    progress                                       the fraction of the run's optimizer steps that is done, in [0, 1]
    epoch                                          the number of the epoch, from 0; 0 in evaluations
    training                                       False in evaluations
    everything else                                a hyperparameter, which must have a default

If the parameter for a reference input has the default `None`, the loss also works without a reference. If the parameter
for an optional column has the default `None`, the loss gets the column if the data have it.
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
        update: a function `(state, **inputs, **hyperparameters)` that returns the new state. A state maps names to
            scalar tensors without gradients. The function is called once per optimizer step, with the inputs of the
            global batch, before the loss is computed. Evaluations do not call it.
    """

    initial: Mapping[str, float]
    update: Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class LossSpec:
    """A registered loss: its function, and the properties that the trainer needs to know.

    Attributes:
        name: the loss's main name.
        aliases: other names, accepted wherever the main name is.
        function: the loss function. It takes tensors and hyperparameters by name, and returns a `LossOutput` or only
            the losses, `[B]`.
        paper: the arXiv number of the paper; empty if there is none.
        description: the first line of the function's docstring.
        is_average_loss: True if the loss averages log-probs over tokens. β then has another scale than in DPO.
        computes_reward_metrics: True if the loss has implicit rewards.
        needs_global_batch: True if the loss of an example depends on the other examples of the global batch.
        has_own_divergence: True if the loss contains its own divergence from the reference, so that no other divergence
            can be used.
        state: describes the numbers that the loss keeps across batches and gets as the argument `state`. `None` if it
            keeps none.
        is_one_value: True if the loss is one value for the global batch, so that the losses of examples cannot be
            weighted.
        check_data: a function that checks a dataset of N examples before training. Its parameters are inputs of the
            loss (`[N]` or `[N, K]`) and hyperparameters. It returns advice for the user, or `None`. It raises
            `UnsuitableExamples` if the loss cannot compare some of the examples.
        form_of: the name of the loss that this loss adapts to another kind of examples, such as "sft" for
            "sft_lists"; empty for all other losses.
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
        """Return whether the loss can compare examples of that kind. Losses of pairs also compare triples."""
        return all(map(kind.has_input, self.inputs))

    def for_kind(self, kind: ExampleKind) -> "LossSpec":
        """Return the form of this loss for examples of that kind, or the loss itself if there is no such form."""
        forms = (spec for spec in _LOSSES.values() if self.name in (spec.name, spec.form_of))
        return next((spec for spec in forms if spec.kind is kind), self)

    @property
    def reference_inputs(self) -> tuple[str, ...]:
        """The names of the inputs that come from the reference model."""
        return tuple(name for name in self.inputs if name.startswith("ref_"))

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """The names of the inputs that the loss gets only if the data have them."""
        parameters = inspect.signature(self.function).parameters
        return tuple(
            name for name in self.inputs if name in self.kind.optional_columns and parameters[name].default is None
        )

    @property
    def run_inputs(self) -> tuple[str, ...]:
        """Those of the names `state`, `progress`, `epoch` and `training` that the loss has as parameters."""
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

        If the function returns only losses, the implicit rewards are β·(s − s_ref), where s and s_ref are a response's
        summed log-probs under policy and reference.

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
        """Return the implicit rewards β·(s − s_ref) for a loss function that returns only losses; see `__call__`."""
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


# Parameters that describe the run; they are neither inputs from the examples nor hyperparameters.
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
        **capabilities: further attributes of `hf_prefopt.losses.LossSpec` that are not at their defaults, such as
            `needs_global_batch=True` or `state`.

    Returns:
        A decorator that returns the function unchanged. If a function with the same module and qualified name was
        registered before, the new one replaces it, so a notebook cell can be run again.

    Raises:
        ValueError: the name or an alias belongs to another loss; a parameter is not a known input and has no default;
            a parameter looks like a misspelled input; or the inputs belong to several kinds of examples.
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
    """Return whether both functions come from the same definition in the source code, executed twice."""
    return _definition(function) is not None and _definition(function) == _definition(before)


def _definition(function: Callable) -> tuple[str, str] | None:
    """Return the module and qualified name of a function, or `None` for lambdas, closures and callable objects."""
    function = inspect.unwrap(function)
    name = getattr(function, "__qualname__", "<lambda>")
    is_one_of_several = name.endswith("<lambda>") or getattr(function, "__closure__", None) is not None
    return None if is_one_of_several else (function.__module__, name)


def _split_signature(name: str, function: Callable) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of a loss function's inputs, and its hyperparameters with their defaults.

    Inputs are recognized by their names.
    """
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
    """Raise `ValueError` for parameters that look like inputs, but are hyperparameters because they have defaults.

    Args:
        loss: the name of the loss.
        given: the defaults of all parameters of the function, keyed by parameter.
        inputs: the names of the parameters that are inputs.
    """
    for name, default in given.items():
        if name in inputs and default not in (inspect.Parameter.empty, None):
            raise ValueError(
                f"loss {loss!r}: {name}={default!r} is an input, which comes from the data or the models: remove the "
                "default, or make it None if the input is optional"
            )
        meant = None if name in inputs or name in _RUN_INPUTS else _input_near(name)
        # A name without an underscore and with a default other than None, such as `weight=1.0`, is a hyperparameter
        # that only resembles an input.
        if meant and (default is None or "_" in name):
            raise ValueError(
                f"loss {loss!r}: {name} is not an input, and its default makes it a hyperparameter: did you mean "
                f"{meant}? Otherwise choose another name"
            )


def _offered(name: str) -> str:
    """Return a hint for a parameter that is not an input: the input that was probably meant, or examples of inputs."""
    prefixed = [f"{model}_{name}" for model in ("policy", "ref")]
    known = [near for near in prefixed if any(kind.has_input(near) for kind in KINDS)]
    meant = " or ".join(known) or _input_near(name)
    return f"did you mean {meant}?" if meant else "inputs have names such as policy_chosen_logps and chosen_lengths"


def _input_near(name: str) -> str | None:
    """Return a valid name that differs from `name` by one added, removed or replaced letter; `None` if there is none.

    Valid are the names of inputs and of the parameters that describe the run.
    """
    letters = "abcdefghijklmnopqrstuvwxyz_"
    cuts = [(name[:at], name[at:]) for at in range(len(name) + 1)]
    less = (head + tail[1:] for head, tail in cuts if tail)
    others = (head + letter + tail[1:] for head, tail in cuts for letter in letters if tail)
    more = (head + letter + tail for head, tail in cuts for letter in letters)
    known = (near for near in (*more, *less, *others) if near in _RUN_INPUTS or any(k.has_input(near) for k in KINDS))
    return next(known, None)


def get_loss(name: str) -> LossSpec:
    """Return the registered loss with that name or alias. Call it with tensors and hyperparameters as keywords.

    Args:
        name: the loss's name or one of its aliases.

    Returns:
        The loss. It has the attributes `description`, `paper`, `inputs` (the names of its tensors) and `defaults` (its
        hyperparameters with their default values).

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
    """Return the names of all registered losses in alphabetical order, without aliases."""
    return sorted(_LOSSES)
