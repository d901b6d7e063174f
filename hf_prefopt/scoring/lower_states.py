"""What a model's lower decoder layers give for a batch: computed by one forward, and used by the next on that batch.

Where policy and reference have the same lower layers, those run once: the reference's forward records the output of the
last of them, and in the policy's forward the lower layers return what they get, but the last one, which returns the
recorded output. Everything around them (embeddings, masks, positions, the layers above) is computed by each forward.

A layer is switched (see `scoring.switched`) where it is called, outside its activation checkpoint and its engine's
hooks, so that a layer that does not run is not gathered, and none runs again during the backward.
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
    """The lower layers of a model do more than hand one tensor of hidden states to the next layer."""


@dataclass
class LowerStates:
    """The output of the last of the lower layers: recorded in the first forward that gets this, used in later ones.

    Attributes:
        count: the number of lower layers.
        hidden: the recorded output; `None` before.
        calls: how many lower layers the forward has passed.
        autocast: the dtype of the autocast that they were recorded under, if any.
    """

    count: int
    hidden: Tensor | None = None
    calls: int = 0
    autocast: torch.dtype | None = None
    _version: int = 0
    # For each layer, how many values it returns beside hidden states; `None` where it returns no tuple.
    _others: list[int | None] = field(default_factory=list)

    def enter(self, index: int) -> None:
        """A layer is called; `UnsharedLayers` if it is not its turn."""
        if index != self.calls:
            raise UnsharedLayers(f"layer {index} is called after {self.calls} layers")
        self.calls += 1

    def record(self, index: int, output: Any) -> None:
        """What a layer has returned, in the first forward."""
        hidden, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, Tensor):
            raise UnsharedLayers("a layer returns no hidden states")
        self._others.append(len(others) if isinstance(output, tuple) else None)
        if index == self.count - 1:
            self.hidden, self._version, self.autocast = hidden, hidden._version, _autocast(hidden)

    @property
    def fits(self) -> bool:
        """Whether a forward that begins now would give the same: it runs in the precision of the first."""
        return self.hidden is None or self.autocast == _autocast(self.hidden)

    def given(self, index: int, hidden: Tensor) -> Any:
        """What a layer returns in a later forward, in which it gets these hidden states; all beside them is `None`.

        Reentrant checkpoints need inputs that require a gradient, so they do if the embeddings' output does.
        """
        if index == self.count - 1:
            if self.hidden is None or self.hidden._version != self._version:
                raise UnsharedLayers("a layer changes the hidden states that it gets")
            hidden = self.hidden.detach().requires_grad_() if hidden.requires_grad else self.hidden
        others = self._others[index]
        return hidden if others is None else (hidden, *(None,) * others)


def _autocast(hidden: Tensor) -> torch.dtype | None:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass
class _OfBody:
    """What the body and its lower layers share: the number of layers, the states of the forward that runs, if any."""

    count: int
    states: LowerStates | None = None


@dataclass(frozen=True)
class _OfLayer:
    """What a lower layer knows: its place, and the name of the hidden states that it takes."""

    body: _OfBody
    index: int
    hidden: str


class _Body(Switched):
    """The model beneath the head: takes the states, and checks that each lower layer was called once."""

    def __call__(self, *args, lower_states=None, **kwargs):
        state: _OfBody = vars(self)[_KEY]
        # Another trainer may have made the model ready for other layers.
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
    """A lower layer as it is called."""

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
    """Let a model's forward take `lower_states` of its first `count` layers; it must not be installed before."""
    shared = _OfBody(count)
    switch(body_of(model), (_Body,), shared, _KEY)
    for index, layer in enumerate(decoder_layers(model)[:count]):
        switch(layer, (_Layer,), _OfLayer(shared, index, first_parameter(unwrapped(layer))), _KEY)


def takes_lower_states(body: nn.Module) -> bool:
    """Whether the forward of a model's body takes `lower_states`, which another trainer may have undone."""
    return _KEY in vars(body)


def remove_lower_states(model: PreTrainedModel) -> None:
    """Undo `install_lower_states`, if it was called."""
    for module in model.modules():
        if _KEY in vars(module):
            unswitch(module, _KEY)
