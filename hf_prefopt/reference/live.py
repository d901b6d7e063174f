"""References that are computed beside the policy: the same forward, without gradients, dropout or checkpointing.

Every one of them is a model and a context manager inside which that model *is* the reference: an adapter switched off,
another adapter switched on, the trained tensors replaced by a frozen copy of what they were, or nothing to do.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_prefopt.data.batch import PreferenceBatch, ResponseScores
from hf_prefopt.scoring.forward import HIDDEN, base_causal_lm, head_predictions, score


@dataclass
class LiveReference:
    """A reference that is run on every batch.

    Attributes:
        model: the module that is called.
        switch: makes the context in which it is the reference.
        description: a phrase for logs and model cards.
    """

    model: nn.Module
    switch: Callable[[], AbstractContextManager]
    description: str

    def score(self, batch: PreferenceBatch, token_stats: tuple[str, ...] = ()) -> ResponseScores:
        """The reference's scores of a batch: no gradients, evaluation mode, whatever state the policy is in."""
        with torch.no_grad(), evaluation_mode(self.model), self.switch():
            return score(self.model, batch, token_stats)

    def predictions(self, scores: ResponseScores) -> Callable[[slice], Tensor]:
        """From a slice of the scored tokens to the reference's log-probs of the whole vocabulary there, `[C, V]`.

        They are made of the hidden states in `scores` whenever they are asked for, also in the backward of a
        checkpointed policy: one chunk of them lives at a time.
        """
        head = base_causal_lm(self.model).get_output_embeddings()

        def predict(tokens: slice) -> Tensor:
            with torch.no_grad(), evaluation_mode(head), self.switch():
                return head_predictions(self.model, scores.token_stats[HIDDEN][tokens])

        return predict


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the time of the context; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def adapter_off(model: PeftModel) -> LiveReference:
    """The model beneath the adapter."""
    return LiveReference(model, model.disable_adapter, "the base model, the adapter switched off")


def named_adapter(model: PeftModel, name: str) -> LiveReference:
    """The model under another of its adapters.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    if name not in model.peft_config:
        raise ValueError(f"reference='adapter:{name}': the model's adapters are {', '.join(model.peft_config)}")

    @contextmanager
    def switch() -> Iterator[None]:
        policy = model.active_adapter
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(policy)
            # set_adapter makes the adapter it activates trainable, and the one it leaves not.
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)

    return LiveReference(model, switch, f"the adapter {name!r}")


def separate_model(model: nn.Module) -> LiveReference:
    """Another model, frozen."""
    model.requires_grad_(False).eval()
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return LiveReference(model, nullcontext, f"another model ({name})")


def frozen_copy(model: nn.Module) -> LiveReference:
    """The policy as it is now: a copy in memory of every tensor that trains, everything else shared with the policy."""
    return LiveReference(model, FrozenTensors(model).swapped_in, "a frozen copy of the policy as given")


@dataclass
class FrozenTensors:
    """Copies of a model's trainable parameters, which can take the parameters' place for a while.

    The parameters stay the same objects, so that optimisers, engines and tied weights never notice; nothing of the copy
    is in the model's state dict, so it is in no checkpoint.
    """

    model: nn.Module
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.tensors = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the copies inside this context."""
        parameters = dict(self.model.named_parameters())
        self._exchange(parameters)
        try:
            yield
        finally:
            self._exchange(parameters)

    def _exchange(self, parameters: dict[str, nn.Parameter]) -> None:
        # Autocast keeps low-precision casts by parameter object: they would be those of the other tensors.
        torch.clear_autocast_cache()
        for name, tensor in self.tensors.items():
            parameter = parameters[name]
            tensor = tensor.to(device=parameter.device, dtype=parameter.dtype)
            self.tensors[name], parameter.data = parameter.data, tensor
