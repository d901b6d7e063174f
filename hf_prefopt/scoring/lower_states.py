"""Record the output of a model's lower decoder layers in one forward pass, and reuse it in the next one.

If policy and reference have the same lower layers, these layers run once per batch. The reference's forward pass
records the output of the last lower layer. In the policy's forward pass, the lower layers return their inputs
unchanged, except the last one, which returns the recorded output. Everything else (embeddings, masks, positions, upper
layers) runs in both forward passes.

For this, the classes of the lower layers are replaced (see `scoring.switched`). A layer is skipped before its
activation checkpoint and the hooks of the engine are reached. Therefore the weights of a skipped layer are not
gathered, and the layer does not run again in the backward pass.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefopt.scoring.switched import STATE, Switched, decoder_layers, first_parameter, switch, unswitch, unwrapped
from hf_prefopt.scoring.tail import body_of

_KEY = f"{STATE}_lower"


class UnsharedLayers(RuntimeError):
    """Raised if lower layers do more than pass one tensor of hidden states to the next layer."""


@dataclass
class LowerStates:
    """The output of the last lower layer, recorded in the first forward pass and reused in later ones.

    Attributes:
        count: Number of lower layers.
        hidden: The recorded output; `None` before it is recorded.
        calls: Number of lower layers that have been called in the current forward pass.
        autocast: Dtype of autocast during the recording; `None` without autocast.
    """

    count: int
    hidden: Tensor | None = None
    calls: int = 0
    autocast: torch.dtype | None = None
    _version: int = 0
    # For each layer, the number of values that it returns in addition to hidden states; `None` if it returns no tuple.
    _others: list[int | None] = field(default_factory=list)

    def enter(self, index: int) -> None:
        """Count a call of the layer with this index. Raise `UnsharedLayers` if layers are not called in order."""
        if index != self.calls:
            raise UnsharedLayers(f"layer {index} is called after {self.calls} layers")
        self.calls += 1

    def record(self, index: int, output: Any) -> None:
        """Record the output of a layer in the first forward pass; raise `UnsharedLayers` if it has no hidden states."""
        hidden, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, Tensor):
            raise UnsharedLayers("a layer returns no hidden states")
        self._others.append(len(others) if isinstance(output, tuple) else None)
        if index == self.count - 1:
            self.hidden, self._version, self.autocast = hidden, hidden._version, _autocast(hidden)

    @property
    def fits(self) -> bool:
        """Whether nothing is recorded yet, or the current autocast dtype is the dtype of the recording."""
        return self.hidden is None or self.autocast == _autocast(self.hidden)

    def given(self, index: int, hidden: Tensor) -> Any:
        """Return the output of a lower layer in a later forward pass.

        The last lower layer returns the recorded hidden states, all others return their input `hidden`. If a layer also
        returns other values, these are `None`.

        The returned hidden states require a gradient if the layer's input does, because reentrant checkpoints need
        inputs that require a gradient.
        """
        if index == self.count - 1:
            if self.hidden is None or self.hidden._version != self._version:
                raise UnsharedLayers("a layer changes its input in place")
            hidden = self.hidden.detach().requires_grad_() if hidden.requires_grad else self.hidden
        others = self._others[index]
        return hidden if others is None else (hidden, *(None,) * others)


def _autocast(hidden: Tensor) -> torch.dtype | None:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass
class _OfBody:
    """The state shared by the base model and its lower layers.

    Attributes:
        count: Number of lower layers.
        states: The `LowerStates` of the current forward pass; `None` outside a forward pass that uses them.
    """

    count: int
    states: LowerStates | None = None


@dataclass(frozen=True)
class _OfLayer:
    """The state of a lower layer: its index, and the name of its hidden-states parameter."""

    body: _OfBody
    index: int
    hidden: str


class _Body(Switched):
    """A base model that accepts `lower_states`, and checks that each lower layer is called once."""

    def __call__(self, *args, lower_states=None, **kwargs):
        state: _OfBody = vars(self)[_KEY]
        # Another trainer may have prepared the model for a different number of layers.
        if lower_states is None or not lower_states.fits or lower_states.count != state.count:
            return super().__call__(*args, **kwargs)
        state.states, lower_states.calls = lower_states, 0
        try:
            outputs = super().__call__(*args, **kwargs)
        finally:
            state.states = None
        if lower_states.calls != lower_states.count:
            raise UnsharedLayers(f"{lower_states.calls} of {lower_states.count} layers were called")
        return outputs


class _Layer(Switched):
    """A lower layer that records its output, or returns the recorded output without running."""

    def __call__(self, *args, **kwargs):
        state: _OfLayer = vars(self)[_KEY]
        states = state.body.states
        if states is None:
            return super().__call__(*args, **kwargs)
        states.enter(state.index)
        if states.hidden is not None:
            return states.given(state.index, args[0] if args else kwargs[state.hidden])
        output = super().__call__(*args, **kwargs)
        states.record(state.index, output)
        return output


def install_lower_states(model: PreTrainedModel, count: int) -> None:
    """Make the base model accept `lower_states` for its first `count` decoder layers.

    Call `remove_lower_states` before you call this function again.
    """
    shared = _OfBody(count)
    switch(body_of(model), (_Body,), shared, _KEY)
    for index, layer in enumerate(decoder_layers(model)[:count]):
        switch(layer, (_Layer,), _OfLayer(shared, index, first_parameter(unwrapped(layer))), _KEY)


def takes_lower_states(body: nn.Module) -> bool:
    """Return True if the base model accepts `lower_states`. Another trainer may have called `remove_lower_states`."""
    return _KEY in vars(body)


def remove_lower_states(model: PreTrainedModel) -> None:
    """Undo `install_lower_states`, if it was called."""
    for module in model.modules():
        if _KEY in vars(module):
            unswitch(module, _KEY)
