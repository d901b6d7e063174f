"""References that run during training, with the policy's forward but no gradients, dropout or checkpointing.

A reference consists of a model and a context manager. Inside the context, the model *is* the reference. To achieve
this, the context disables an adapter, activates another adapter, or replaces the trained tensors by a frozen copy of
their initial values. For a separate model, the context changes nothing.
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
        switch: function that returns the context in which the model is the reference.
        description: a phrase for logs and model cards.
        copies: the frozen copies of trained tensors, if the reference uses them.
        is_separate: True if the model is not the policy's module.
        engine: the object that keeps a separate module sharded; `None` if the module is not sharded.
        compiled: the compiled model, which is called instead of the model; `None` if the model is not compiled.
        lower: the lower decoder layers that run only once for reference and policy; `None` if there are none.
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
        """True if freeing the reference saves memory."""
        return self.is_separate or self.copies is not None

    def place(self, accelerator: Accelerator) -> None:
        """Move a separate model to the device, or shard it if the policy is sharded.

        A model that must not be moved stays where it is; see `has_its_place`.
        """
        if not self.is_separate or has_its_place(self.model):
            return
        self.engine = self.engine or shard_like_the_policy(self.model, accelerator)
        if self.engine is None:
            self.model.to(accelerator.device)

    def score(self, batch: PreferenceBatch, token_stats: tuple[str, ...] = ()) -> ResponseScores:
        """Return the reference's scores of a batch, without gradients and in evaluation mode."""
        return self._scored(batch, token_stats, self.lower.states() if self.lower is not None else None)

    def _scored(
        self, batch: PreferenceBatch, token_stats: tuple[str, ...], states: LowerStates | None
    ) -> ResponseScores:
        # Reshard first, because PEFT must enable the same parameter objects that it has disabled.
        with self.tree.held():
            reshard(self.tree)
            with torch.no_grad(), evaluation_mode(self.tree), self.switch():
                called = self.compiled if self.compiled is not None else self.model
                scores = score(called, batch, token_stats, lower_states=states)
                reshard(self.tree)
        return scores

    def share_lower_layers(self, policy: ModuleTree, batch: PreferenceBatch, known: str | None = None) -> str | None:
        """Find the lower layers that policy and reference have in common, and from now on run them only once per batch.

        Return a line for the start summary, or `None`. See `settle_lower_layers`.
        """

        def scored(batch: PreferenceBatch, states: LowerStates) -> ResponseScores:
            return self._scored(batch, (), states)

        self.lower, said = settle_lower_layers(policy, self.model, self.switch, scored, batch, known)
        return said

    def predictions(self, scores: ResponseScores) -> Callable[[slice], Tensor]:
        """Return a function that maps a slice of the scored tokens to the reference's log-probs `[C, V]`.

        The function computes the log-probs from the hidden states in `scores` on every call, also in the backward pass
        of a checkpointed policy, so only one chunk is in memory at a time. The head's weights are gathered beforehand,
        because ranks have different numbers of chunks.
        """
        head, hidden = base_causal_lm(self.model).get_output_embeddings(), scores.token_stats[HIDDEN]
        release_gathered(self.tree)
        with self.switch():
            in_hand = self.copies or any(map(is_sharded, head.parameters()))
            weights = _weights(head, hidden.dtype) if in_hand else {}
        # For a frozen copy, `weights` already holds the reference's weights. Adapters must be switched for each chunk.
        acting, modules = nullcontext if self.copies else self.switch, ModuleTree(head)

        def predict(tokens: slice) -> Tensor:
            with torch.no_grad(), evaluation_mode(modules), acting():
                return head_predictions(head, hidden[tokens], weights)

        return predict


def _weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the unsharded parameters of a module, keyed by name. Those that were sharded are cast to `dtype`."""
    weights = {}
    for name, parameter in module.named_parameters():
        with gathered(parameter) as values:
            weights[name] = values.to(dtype, copy=True) if is_sharded(parameter) else values
    return weights


def has_its_place(model: nn.Module) -> bool:
    """Return whether a model must not be moved: it is quantized, spread over devices by a device map, or offloaded."""
    placed = hasattr(model, "hf_device_map") or getattr(model, "quantization_method", None) is not None
    return placed or any(hasattr(module, "_hf_hook") for module in model.modules())


def adapter_off(model: PeftModel) -> LiveReference:
    """Return a reference that is the model with its adapter disabled."""
    tree = ModuleTree(model)
    return LiveReference(tree, partial(adapters_off, tree), "the base model, the adapter switched off")


def named_adapter(model: PeftModel, name: str) -> LiveReference:
    """Return a reference that is the model with the adapter `name` active instead of the trained adapter.

    Raises:
        ValueError: the model has no adapter with that name.
    """
    if name not in model.peft_config:
        raise ValueError(
            f"reference='adapter:{name}': no such adapter; the model's adapters are {', '.join(model.peft_config)}"
        )

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
    """Freeze a separate model, and return it as a reference."""
    model.requires_grad_(False).eval()
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return LiveReference(ModuleTree(model), nullcontext, f"another model ({name})", is_separate=True)


def frozen_copy(model: nn.Module) -> LiveReference:
    """Return the current policy as a reference. Trained tensors are copied; all others are shared with the policy."""
    copies = FrozenTensors(tree := ModuleTree(model))
    return LiveReference(tree, copies.swapped_in, "a frozen copy of the policy as given", copies)


@dataclass
class FrozenTensors:
    """Copies of a model's trainable parameters that can temporarily replace the parameters' values.

    The parameter objects stay the same, so optimizers, engines and tied weights are not affected. The copies are not in
    the model's state dict, and so not in checkpoints of the model. If an engine shards the parameters, each rank keeps
    its shards of the copies.
    """

    tree: ModuleTree
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.tensors = {name: local_shard(p).clone() for name, p in _named(self.tree).items() if p.requires_grad}

    def not_copied(self) -> list[str]:
        """Return the names of parameters that have no copy because they became trainable after the copies were made."""
        return [name for name, p in _named(self.tree).items() if p.requires_grad and name not in self.tensors]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Make the model compute with the copies inside this context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Set copy ← share · parameter + (1 − share) · copy. Each rank updates its shards, so nothing is gathered."""
        parameters = _named(self.tree)
        for name, values in self.tensors.items():
            policy = local_shard(parameters[name])
            mine = shard_of(parameters[name], values).to(policy.device)
            self.tensors[name] = mine.lerp_(policy.to(mine.dtype), share)

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full copy) of each copied parameter; if parameters are sharded, call it on every rank."""
        with self.swapped_in():
            for name, parameter in _named(self.tree).items():
                if name in self.tensors:
                    with gathered(parameter) as tensor:
                        yield name, tensor

    def replace(self, values: Callable[[str], Tensor]) -> None:
        """Replace the copies. `values` maps a name to the full tensor; each rank keeps its shard of the tensor."""
        release_gathered(self.tree)
        parameters = _named(self.tree)
        for name, old in self.tensors.items():
            self.tensors[name] = shard_of(parameters[name], values(name)).to(old.device, old.dtype)

    def _exchange(self) -> None:
        # Autocast caches low-precision casts per parameter object, so the cache would still hold casts of the old
        # values.
        torch.clear_autocast_cache()
        release_gathered(self.tree)
        parameters = _named(self.tree)
        self.tensors = {name: swap_shard(parameters[name], tensor) for name, tensor in self.tensors.items()}


def _named(tree: ModuleTree) -> dict[str, nn.Parameter]:
    """Return the parameters, keyed by name. Names omit the part that an engine's activation checkpointing inserts."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in tree.named_parameters()}
