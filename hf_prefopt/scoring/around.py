"""Layout "around": prefix sharing for models whose token mixers need whole sequences.

A token mixer is a module in a decoder layer that computes a token from several tokens, such as attention or a state
space model. All other parts of a layer (norms, MLPs, experts) compute each token independently. The linear projections
inside a token mixer do, too.

In this layout, the model is called with ordinary right-padded sequences `[R, L]`, so rotary embeddings, masks and
position biases are those of padded sequences. The first decoder layer packs the sequences into one row `[1, T]`. The
row has no padding, and contains each prompt only once. The last decoder layer unpacks the row into padded sequences. In
between, each token mixer unpacks its input and packs its output. Inside a token mixer, each linear projection packs its
input and unpacks its output. Padding is on the right and models are causal, so values in the padding have no effect.

The classes of the modules that pack and unpack are replaced by subclasses (see `scoring.switched`). The indices for
packing (`Rows`) are passed to a layer as a keyword argument of its call. They are therefore also available when an
activation checkpoint runs the layer again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hf_prefopt.scoring.switched import (
    STATE,
    Switched,
    decoder_layers,
    first_parameter,
    mixers_of,
    outermost,
    switch,
    unwrapped,
)

AROUND_INPUTS = ("around_places", "around_tokens")


class UnsupportedLayer(RuntimeError):
    """Raised if a layer's structure does not support the layout "around"."""


@dataclass(frozen=True)
class Rows:
    """The indices that convert between the padded sequences and the packed row of a batch.

    Attributes:
        places: `[T]` int64. For each token of the packed row, its position when the padded sequences are flattened.
        tokens: `[R, L]` int64. For each position of the padded sequences, the index of its token in the packed row.
    """

    places: Tensor
    tokens: Tensor

    def collapsed(self, padded: Tensor) -> Tensor:
        """Pack padded values `[R, L, ...]` into a row `[1, T, ...]`. Only the first copy of each prompt is used."""
        return padded.flatten(0, 1).index_select(0, self.places.to(padded.device))[None]

    def padded(self, row: Tensor) -> Tensor:
        """Unpack values of the packed row `[1, T, ...]` into padded sequences `[R, L, ...]`."""
        tokens = self.tokens.to(row.device)
        return row[0].index_select(0, tokens.flatten()).unflatten(0, tokens.shape)

    def is_row(self, value: Any) -> bool:
        """Return True if the value is a packed row, a tensor `[1, T, H]`.

        Padded sequences `[R, L, H]` have another shape, because T > L: the row contains tokens of several sequences.
        """
        return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (1, len(self.places))

    def is_padded(self, value: Any) -> bool:
        """Return True if the value has the shape of the padded sequences, `[R, L, H]`."""
        return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == self.tokens.shape


@dataclass
class _OfBody:
    """The state shared by all layers of a model.

    Attributes:
        rows: Indices of the current batch; `None` outside a forward pass, or if no sequence has to be packed.
    """

    rows: Rows | None = None


@dataclass
class _OfLayer:
    """The state shared by the modules of a layer during the layer's forward pass.

    Attributes:
        body: State of the model; see `_OfBody`.
        hidden: Name of the first parameter of the layer's forward, the hidden states.
        is_last: True for the last layer.
        rows: Indices of the current batch.
        pairs: Pairs of a padded tensor and the packed row from which it was unpacked. If the padded tensor must be
            packed again, this row is reused. At most two pairs are stored: for the mixer's input and for the last
            tensor that was unpacked.
    """

    body: _OfBody
    hidden: str
    is_last: bool
    rows: Rows | None = None
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def row_of(self, rows: Rows, padded: Tensor) -> Tensor:
        found = next((row for known, row in self.pairs if known is padded), None)
        return rows.collapsed(padded) if found is None else found

    def padded_of(self, rows: Rows, row: Tensor) -> Tensor:
        self.pairs[1:] = [(rows.padded(row), row)]
        return self.pairs[-1][0]


class _Body(Switched):
    """A base model that accepts the indices of a batch, and runs without a mask because padding is on the right."""

    def __call__(self, *args, around_places=None, around_tokens=None, **kwargs):
        if around_places is None:
            return super().__call__(*args, **kwargs)
        state: _OfBody = vars(self)[STATE]
        is_row_already = len(around_places) == around_tokens.numel()
        state.rows = None if is_row_already else Rows(around_places, around_tokens)
        try:
            return super().__call__(*args, **(kwargs | {"attention_mask": None}))
        finally:
            state.rows = None


class _Called(Switched):
    """A decoder layer outside its activation checkpoint.

    It packs its input, and passes the indices to the layer inside the checkpoint. The last layer unpacks its output.
    """

    def __call__(self, *args, **kwargs):
        state: _OfLayer = vars(self)[STATE]
        rows = state.body.rows
        if rows is None:
            return super().__call__(*args, **kwargs)
        if args:
            args = (_row(rows, args[0]), *args[1:])
        else:
            kwargs[state.hidden] = _row(rows, kwargs[state.hidden])
        output = super().__call__(*args, around_rows=rows, **kwargs)
        return _first(output, rows.is_row, rows.padded) if state.is_last else output


class _Layer(Switched):
    """A decoder layer inside its activation checkpoint. It stores the indices, which its token mixers read."""

    def forward(self, *args, around_rows=None, **kwargs):
        state: _OfLayer = vars(self)[STATE]
        state.rows = around_rows
        try:
            return super().forward(*args, **kwargs)
        finally:
            state.rows = None


class _Mixer(Switched):
    """A token mixer that unpacks its input into padded sequences, and packs its output into a row."""

    def __call__(self, *args, **kwargs):
        state: _OfLayer = vars(self)[STATE]
        rows = state.rows
        if rows is None:
            return super().__call__(*args, **kwargs)

        def padded(value: Any) -> Any:
            return state.padded_of(rows, value) if rows.is_row(value) else value

        try:
            output = super().__call__(*map(padded, args), **{name: padded(value) for name, value in kwargs.items()})
            return _first(output, rows.is_padded, lambda hidden: state.row_of(rows, hidden))
        finally:
            state.pairs.clear()


class _Projection(Switched):
    """A linear layer inside a token mixer. It packs its input, runs on the packed row, and unpacks its output."""

    def __call__(self, hidden, *args, **kwargs):
        state: _OfLayer = vars(self)[STATE]
        rows = state.rows
        if rows is None or not rows.is_padded(hidden):
            return super().__call__(hidden, *args, **kwargs)
        return state.padded_of(rows, super().__call__(state.row_of(rows, hidden), *args, **kwargs))


def _row(rows: Rows, hidden: Tensor) -> Tensor:
    """Pack the input of a layer, unless it is a packed row already."""
    return rows.collapsed(hidden) if rows.is_padded(hidden) else hidden


def _first(output: Any, is_it: Callable[[Any], bool], change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the hidden states of a module's output: the first element of a tuple, or the output itself.

    Raises:
        UnsupportedLayer: `is_it` returns False for the hidden states.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not is_it(hidden):
        raise UnsupportedLayer(f"a layer returns hidden states of shape {tuple(getattr(hidden, 'shape', ()))}")
    return (change(hidden), *output[1:]) if isinstance(output, tuple) else change(hidden)


def install_around(model: PreTrainedModel, body: nn.Module) -> None:
    """Prepare a model for the layout "around"; a second call has no effect.

    The classes of the base model, its decoder layers, their token mixers and the projections in them are replaced by
    subclasses.

    Raises:
        UnsupportedLayer: see `reason_against_layers`.
    """
    if isinstance(body, Switched):
        return
    if reason := reason_against_layers(model):
        raise UnsupportedLayer(reason)
    shared, layers = _OfBody(), decoder_layers(model)
    switch(body, (_Body,), shared)
    for called in layers:
        layer = unwrapped(called)
        state = _OfLayer(shared, first_parameter(layer), called is layers[-1])
        for mixer in mixers_of(layer):
            for projection in outermost(mixer, _is_linear):
                switch(projection, (_Projection,), state)
            switch(mixer, (_Mixer,), state)
        if called is layer:
            switch(layer, (_Called, _Layer), state)
        else:
            switch(called, (_Called,), state)
            switch(layer, (_Layer,), state)


def reason_against_layers(model: PreTrainedModel) -> str | None:
    """Return the reason why a model does not support the layout "around"; `None` if none is found.

    Only the classes of the modules are checked. The model is not run.
    """
    layers = [unwrapped(layer) for layer in decoder_layers(model)]
    mixers = [mixer for layer in layers for mixer in mixers_of(layer)]
    if not mixers:
        return "its decoder layers have no token mixers that are separate modules"
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return "its decoder layers are not transformers' GradientCheckpointingLayer"
    if any(isinstance(part, GradientCheckpointingLayer) for mixer in mixers for part in mixer.modules()):
        return "its decoder layers contain layers with activation checkpointing"
    return None


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, nn.Linear | Conv1D)
