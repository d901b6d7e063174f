"""References that are computed during training: the same forward, without gradients, dropout or checkpointing.

Each consists of a model and a context manager, inside which that model *is* the reference: an adapter is disabled,
another adapter is enabled, the trained tensors are replaced by a frozen copy of their initial values, or nothing
changes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.reference.engine import shard_like_the_policy
from hf_prefopt.reference.lower_layers import LowerLayers, settle_lower_layers
from hf_prefopt.reference.shards import (
    gathered,
    is_sharded,
    local_shard,
    release_gathered,
    reshard,
    shard_of,
    swap_shard,
)
from hf_prefopt.scoring.forward import HIDDEN, base_causal_lm, head_predictions, score
from hf_prefopt.scoring.lower_states import LowerStates
from hf_prefopt.scoring.modes import ModuleTree, adapter_on, adapters_off, evaluation_mode, is_set_by_layer


@dataclass
class LiveReference:
    """A reference that is run on every batch.

    Attributes:
        tree: the modules of the model that is called.
        switch: returns the context in which the model is the reference.
        description: a phrase for logs and model cards.
        copies: the frozen copies of trained tensors, if the reference uses them.
        is_separate: whether the module is not the policy's.
        engine: the object that keeps a separate module sharded, if it is.
        compiled: the compiled module, which is called instead if it is set.
        lower: the layers that run once for reference and policy, if there are any.
    """

    tree: ModuleTree
    switch: Callable[[], AbstractContextManager]
    description: str
    copies: "FrozenTensors | None" = None
    is_separate: bool = False
    engine: Any = None
    compiled: nn.Module | None = None
    lower: LowerLayers | None = None

    @property
    def model(self) -> nn.Module:
        """The module that is called."""
        return self.tree.model

    @property
    def has_own_memory(self) -> bool:
        """Whether freeing it saves memory."""
        return self.is_separate or self.copies is not None

    def place(self, accelerator: Accelerator) -> None:
        """Move a separate model to the device, sharded like the policy, unless it was loaded with a device map."""
        if not self.is_separate or has_its_place(self.model):
            return
        self.engine = self.engine or shard_like_the_policy(self.model, accelerator)
        if self.engine is None:
            self.model.to(accelerator.device)

    def score(self, batch: PreferenceBatch, token_stats: tuple[str, ...] = ()) -> ResponseScores:
        """The reference's scores of a batch: no gradients, evaluation mode, whatever state the policy is in."""
        return self._scored(batch, token_stats, self.lower.states() if self.lower is not None else None)

    def _scored(
        self, batch: PreferenceBatch, token_stats: tuple[str, ...], states: LowerStates | None
    ) -> ResponseScores:
        # Reshard first: PEFT must enable the same parameter objects again that it disabled.
        with self.tree.held():
            reshard(self.tree)
            with torch.no_grad(), evaluation_mode(self.tree), self.switch():
                called = self.compiled if self.compiled is not None else self.model
                scores = score(called, batch, token_stats, lower_states=states)
                reshard(self.tree)
        return scores

    def share_lower_layers(self, policy: ModuleTree, batch: PreferenceBatch, known: str | None = None) -> str | None:
        """Run layers that are the policy's once for both, see `settle_lower_layers`; what there is to say of it."""

        def scored(batch: PreferenceBatch, states: LowerStates) -> ResponseScores:
            return self._scored(batch, (), states)

        self.lower, said = settle_lower_layers(policy, self.model, self.switch, scored, batch, known)
        return said

    def predictions(self, scores: ResponseScores) -> Callable[[slice], Tensor]:
        """A function that maps a slice of the scored tokens to the reference's log-probs over the vocabulary, `[C, V]`.

        It computes them from the hidden states in `scores` on every call, also in the backward pass of a checkpointed
        policy, so only one chunk is in memory at a time. The head's weights are gathered here, because ranks have
        different numbers of chunks.
        """
        head, hidden = base_causal_lm(self.model).get_output_embeddings(), scores.token_stats[HIDDEN]
        release_gathered(self.tree)
        with self.switch():
            in_hand = self.copies or any(map(is_sharded, head.parameters()))
            weights = _weights(head, hidden.dtype) if in_hand else {}
        # The weights of a copy are in `weights` already; an adapter is switched for each chunk.
        acting, modules = nullcontext if self.copies else self.switch, ModuleTree(head)

        def predict(tokens: slice) -> Tensor:
            with torch.no_grad(), evaluation_mode(modules), acting():
                return head_predictions(head, hidden[tokens], weights)

        return predict


def _weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The full parameters of a module, keyed by name; sharded ones in the dtype in which their engine computes."""
    weights = {}
    for name, parameter in module.named_parameters():
        with gathered(parameter) as values:
            weights[name] = values.to(dtype, copy=True) if is_sharded(parameter) else values
    return weights


def has_its_place(model: nn.Module) -> bool:
    """Whether a model must not be moved: it is quantized, spread over devices by a device map, or offloaded."""
    placed = hasattr(model, "hf_device_map") or getattr(model, "quantization_method", None) is not None
    return placed or any(hasattr(module, "_hf_hook") for module in model.modules())


def adapter_off(model: PeftModel) -> LiveReference:
    """The model without its adapter."""
    tree = ModuleTree(model)
    return LiveReference(tree, partial(adapters_off, tree), "the base model, the adapter switched off")


def named_adapter(model: PeftModel, name: str) -> LiveReference:
    """The model with another of its adapters.

    Raises:
        ValueError: the model has no adapter with that name.
    """
    if name not in model.peft_config:
        raise ValueError(f"reference='adapter:{name}': the model's adapters are {', '.join(model.peft_config)}")

    tree = ModuleTree(model)
    if is_set_by_layer(tree):
        return LiveReference(tree, partial(adapter_on, tree, name), f"the adapter {name!r}")

    @contextmanager
    def switch() -> Iterator[None]:
        policy, all_active = model.active_adapter, list(model.active_adapters)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(policy)
            if len(all_active) > 1:
                cast(BaseTuner, model.base_model).set_adapter(all_active)
            # set_adapter makes the adapter that it activates trainable, and the previous one not trainable.
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)

    return LiveReference(tree, switch, f"the adapter {name!r}")


def separate_model(model: nn.Module) -> LiveReference:
    """A separate model, frozen."""
    model.requires_grad_(False).eval()
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return LiveReference(ModuleTree(model), nullcontext, f"another model ({name})", is_separate=True)


def frozen_copy(model: nn.Module) -> LiveReference:
    """The policy as it is now: a copy in memory of every tensor that trains, everything else shared with the policy."""
    copies = FrozenTensors(tree := ModuleTree(model))
    return LiveReference(tree, copies.swapped_in, "a frozen copy of the policy as given", copies)


@dataclass
class FrozenTensors:
    """Copies of a model's trainable parameters, which can take the parameters' place for a while.

    The parameters stay the same objects, so that optimizers, engines and tied weights never notice; nothing of the copy
    is in the model's state dict, so it is in no checkpoint. Where an engine shards the parameters, a rank keeps its
    shards of the copy.
    """

    tree: ModuleTree
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.tensors = {name: local_shard(p).clone() for name, p in _named(self.tree).items() if p.requires_grad}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the copies inside this context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def move(self, share: float) -> None:
        """copy ← share · parameter + (1 − share) · copy; each rank updates its shards, without gathering."""
        parameters = _named(self.tree)
        for name, values in self.tensors.items():
            policy = local_shard(parameters[name])
            mine = shard_of(parameters[name], values).to(policy.device)
            self.tensors[name] = mine.lerp_(policy.to(mine.dtype), share)

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, full copy) of the parameters; if they are sharded, call it on every rank."""
        with self.swapped_in():
            for name, parameter in _named(self.tree).items():
                if name in self.tensors:
                    with gathered(parameter) as tensor:
                        yield name, tensor

    def replace(self, values: Callable[[str], Tensor]) -> None:
        """Replace the copies; the argument maps a name to the full tensor, of which each rank keeps its shard."""
        release_gathered(self.tree)
        parameters = _named(self.tree)
        for name, old in self.tensors.items():
            self.tensors[name] = shard_of(parameters[name], values(name)).to(old.device, old.dtype)

    def _exchange(self) -> None:
        # Autocast caches low-precision casts per parameter object, so the cache would hold the other tensors' casts.
        torch.clear_autocast_cache()
        release_gathered(self.tree)
        parameters = _named(self.tree)
        self.tensors = {name: swap_shard(parameters[name], tensor) for name, tensor in self.tensors.items()}


def _named(tree: ModuleTree) -> dict[str, nn.Parameter]:
    """The parameters, keyed by their original names; an engine's checkpointing inserts a part into the names."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in tree.named_parameters()}
