"""Find the lower decoder layers that policy and reference can share, and check that sharing is exact.

Suppose that layers 0 … k−1 have no trained parameter and no active adapter, except adapters that are also active in the
reference. Then these layers compute the same hidden states for policy and reference. The reference's forward pass
records them, and the policy's forward pass continues from them (`scoring.lower_states`). The results are bitwise equal
to those of two complete forward passes.

k is determined from the modules. A trial on synthetic tokens checks that the rest of the model allows sharing: the
log-probs with and without sharing must be bitwise equal. They differ, for example, if layers use other layers' outputs,
or with dropout or router jitter in the lower layers.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.scoring.forward import base_causal_lm, score
from hf_prefopt.scoring.layout import is_failure
from hf_prefopt.scoring.lower_states import LowerStates, install_lower_states, remove_lower_states
from hf_prefopt.scoring.modes import ModuleTree, is_switched_by_layer, training_mode
from hf_prefopt.scoring.switched import decoder_layers

# Config entries that do not affect hidden states: the model's origin, and generation.
_WITHOUT_EFFECT = ("_name_or_path", "architectures", "transformers_version", "use_cache")
# Names that PEFT inserts into the paths of wrapped modules.
_WRAPPED = re.compile(r"\b(base_layer|original_module)\.")


@dataclass(frozen=True)
class LowerLayers:
    """The first `count` decoder layers of a policy, which run once for policy and reference.

    Attributes:
        tree: Modules of the policy.
        count: Number of shared layers.
        later: Ids of modules outside the decoder layers that are trained or differ from the reference's. They run after
            the shared layers.
        acting: Active and merged adapters of the modules that the shared layers depend on, when the layers were chosen.
    """

    tree: ModuleTree
    count: int
    later: frozenset[int]
    acting: tuple[Any, ...]

    def states(self) -> LowerStates | None:
        """Return an empty `LowerStates` to record hidden states of a batch.

        Return `None` if the layers can no longer be shared: a module that they depend on has become trainable, or its
        adapters have changed.
        """
        below = list(_below(self.tree, self.count, self.later))
        is_same = not any(map(_trains, below)) and _all_acting(below) == self.acting
        return LowerStates(self.count) if is_same else None


def settle_lower_layers(
    tree: ModuleTree,
    reference: nn.Module,
    switch: Callable[[], AbstractContextManager],
    score_reference: Callable[[PreferenceBatch, LowerStates], ResponseScores],
    batch: PreferenceBatch,
    known: str | None = None,
) -> tuple[LowerLayers | None, str | None]:
    """Find the layers that policy and reference can share, prepare both models, and test that sharing is exact.

    Args:
        tree: Modules of the policy.
        reference: Module that the reference calls; it may be the policy's module.
        switch: Function that returns a context in which `reference` computes the reference.
        score_reference: Function that scores a batch with the reference and records the hidden states.
        batch: Synthetic rows in the layout of the run, on the policy's device.
        known: Reason against sharing that does not depend on the models alone; `None` if there is no such reason.

    Returns:
        The shared layers (`None` if there are none), and a line for the start summary (`None` if no layer qualifies).
    """
    models = [base_causal_lm(model) for model in dict.fromkeys((tree.model, reference))]
    for model in models:
        remove_lower_states(model)
    lower, outside = find_lower_layers(tree, reference, switch)
    if not lower.count:
        return None, None
    depth = len(tree.derived(_places)[0])
    names, run = f"layers 0 to {lower.count - 1} of {depth}", "run"
    if lower.count == 1:
        names, run = f"layer 0 of {depth}", "runs"
    reason = known or _reason_against(lower, models, outside, score_reference, batch)
    if reason is None:
        return lower, f"{names} {run} once for policy and reference, without gradients"
    for model in models:
        remove_lower_states(model)
    return None, f"{names} {run} twice, for policy and reference, although they are not trained: {reason}"


def find_lower_layers(
    tree: ModuleTree, reference: nn.Module, switch: Callable[[], AbstractContextManager]
) -> tuple[LowerLayers, list[nn.Module]]:
    """Find the decoder layers before the first one that is trained or differs from the reference's.

    This function does not test that sharing these layers is exact.

    Args:
        tree, reference, switch: As for `settle_lower_layers`.

    Returns:
        The layers, and the modules outside the decoder layers that are trained or differ from the reference's.
    """
    if isinstance(tree.model, PeftModel) and not is_switched_by_layer(tree):
        return LowerLayers(tree, 0, frozenset(), ()), []
    is_separate = reference is not tree.model
    acting = {id(module): _acting(module) for module in tree}
    with switch():
        in_reference = {id(module): (((), ()) if is_separate else _acting(module)) for module in tree}

    def changes(module: nn.Module) -> bool:
        mine, theirs = acting[id(module)], in_reference[id(module)]
        # A layer with merged adapters counts as changed, because disabling it unmerges the adapters.
        return _trains(module) or (mine is not None and (mine != theirs or mine[1] != ()))

    layers, outside = tree.derived(_places)
    count = next((i for i, modules in enumerate(layers) if any(map(changes, modules))), len(layers))
    if is_separate:
        count = min(count, _equal_layers(base_causal_lm(tree.model), base_causal_lm(reference)))
    changing = [module for module in outside if changes(module)]
    later = frozenset(map(id, changing))
    return LowerLayers(tree, count, later, _all_acting(_below(tree, count, later))), changing


def _reason_against(
    lower: LowerLayers,
    models: list[PreTrainedModel],
    outside: list[nn.Module],
    score_reference: Callable[[PreferenceBatch, LowerStates], ResponseScores],
    batch: PreferenceBatch,
) -> str | None:
    """Return the reason why these layers cannot be shared, or `None` if they can.

    `outside` are the modules outside the decoder layers that are trained or differ from the reference's. The batch is
    scored with and without sharing, in training mode and with the same random numbers.
    """
    for model in models:
        install_lower_states(model, lower.count)
    whole = LowerStates(lower.count)
    try:
        with torch.no_grad(), _first_calls(outside, whole) as first:
            expected = _policy_logps(lower.tree, batch, whole)
        before = [type(module).__name__ for module in outside if first.get(id(module), 0) < lower.count]
        if before:
            return f"a module that they may depend on is trained ({before[0]})"
        states = LowerStates(lower.count)
        score_reference(batch, states)
        with torch.no_grad():
            found = _policy_logps(lower.tree, batch, states)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        if is_failure(error):
            raise
        return next(iter(str(error).splitlines()), type(error).__name__)
    same = "dropout or other noise in these layers, or later layers that use more than hidden states"
    return None if torch.equal(found, expected) else f"the policy's log-probs would change ({same})"


@contextmanager
def _first_calls(modules: list[nn.Module], states: LowerStates) -> Iterator[dict[int, int]]:
    """Yield a dict that maps the id of each called module to the number of lower layers called before it."""
    first: dict[int, int] = {}

    def called(module: nn.Module, _: Any) -> None:
        first.setdefault(id(module), states.calls)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(called).remove)
        yield first


def _policy_logps(tree: ModuleTree, batch: PreferenceBatch, states: LowerStates) -> Tensor:
    device = batch["input_ids"].device
    with training_mode(tree), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return score(tree.model, batch, lower_states=states).token_logps


def _places(modules: list[nn.Module]) -> tuple[list[list[nn.Module]], list[nn.Module]]:
    """Return the modules of each decoder layer, and the modules outside the layers and the head.

    Return two empty lists if a layer occurs more than once.
    """
    causal_lm = base_causal_lm(modules[0])
    layers = [list(layer.modules()) for layer in decoder_layers(causal_lm)]
    if len({id(layer[0]) for layer in layers}) < len(layers):
        return [], []
    inside = {id(module) for layer in [*layers, list(causal_lm.get_output_embeddings().modules())] for module in layer}
    return layers, [module for module in modules if id(module) not in inside]


def _below(tree: ModuleTree, count: int, later: frozenset[int]) -> Iterator[nn.Module]:
    """Yield the modules on which the output of the first `count` layers depends."""
    layers, outside = tree.derived(_places)
    for layer in layers[:count]:
        yield from layer
    yield from (module for module in outside if id(module) not in later)


def _trains(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values())


def _acting(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the names of a module's active adapters and of its merged adapters; `None` if it is not a PEFT layer."""
    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return None
    names = () if module.disable_adapters else tuple(module.active_adapters)
    available = module._get_available_adapters()
    return tuple(name for name in names if name in available), tuple(getattr(module, "merged_adapters", ()))


def _all_acting(modules: Any) -> tuple[Any, ...]:
    return tuple(found for found in map(_acting, modules) if found is not None)


def _equal_layers(policy: PreTrainedModel, reference: PreTrainedModel) -> int:
    """Return the number of lower layers with equal weights in policy and reference.

    The number is 0 if the classes, the configs, or tensors outside the layers and the head differ. Tensors that the
    policy trains may differ: their modules must run after the shared layers, which `_reason_against` tests. Adapters
    are not compared.
    """
    if type(policy) is not type(reference) or _settings(policy) != _settings(reference):
        return 0
    paths = {id(module): f"{path}." for path, module in reference.named_modules()}
    mine = {_WRAPPED.sub("", name): tensor for name, tensor in _tensors(policy)}

    def is_equal(name: str, theirs: Tensor) -> bool:
        found = mine.get(name)
        if found is None or theirs.is_meta or found.is_meta or not found.numel():  # tensors are empty under ZeRO-3
            return False
        same = type(found) is type(theirs) and found.dtype == theirs.dtype and found.shape == theirs.shape
        return same and torch.equal(found, theirs.to(found.device))

    layers = [paths[id(layer)] for layer in decoder_layers(reference)]
    head = paths[id(reference.get_output_embeddings())]
    for name, tensor in _tensors(reference):
        is_outside = not name.startswith((*layers, head))
        if is_outside and not is_equal(name, tensor) and not (name in mine and mine[name].requires_grad):
            return 0
    differing = (
        index
        for index, path in enumerate(layers)
        if not all(is_equal(name, tensor) for name, tensor in _tensors(reference) if name.startswith(path))
    )
    return next(differing, len(layers))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _settings(model: PreTrainedModel) -> tuple[dict[str, Any], str | None]:
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _WITHOUT_EFFECT}
    return settings, getattr(model.config, "_attn_implementation", None)
