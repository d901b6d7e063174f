"""Sharing around the token mixers: the layout of models whose layers need whole sequences.

Everything else in a layer (norms, MLPs, experts) computes each token by itself, and so do the projections inside a
mixer. In this layout the model is called with ordinary right-padded sequences `[R, L]`, so
that rotary embeddings, masks and position biases are those of padded sequences. The first decoder layer picks a row
`[1, T]` out of them, in which each prompt is once and nothing is padding, and the last layer puts the sequences back.
In between, a mixer gets the padded sequences, its linear projections compute the row, and of its output the row is
taken. A token at the end of a sequence is seen by none before it, so what stands in the padding does not matter.

The modules that pick and spread tokens are switched (see `scoring.switched`). The indices reach a layer as a keyword
argument of its call, so a checkpoint that runs its forward again during the backward has them, too.
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
    """A layer computes in another way than the layout "around" can be put into."""


@dataclass(frozen=True)
class Rows:
    """The indices of a batch.

    Attributes:
        places: `[T]` int64, the place of each token of the row in the padded sequences, flattened.
        tokens: `[R, L]` int64, the position in the row of the token at each place of the padded sequences.
    """

    places: Tensor
    tokens: Tensor

    def collapsed(self, padded: Tensor) -> Tensor:
        """`[1, T, ...]` out of `[R, L, ...]`: of a prompt's copies the first."""
        return padded.flatten(0, 1).index_select(0, self.places.to(padded.device))[None]

    def padded(self, row: Tensor) -> Tensor:
        """`[R, L, ...]` out of `[1, T, ...]`."""
        tokens = self.tokens.to(row.device)
        return row[0].index_select(0, tokens.flatten()).unflatten(0, tokens.shape)

    def is_row(self, value: Any) -> bool:
        """Whether a value is a tensor `[1, T, H]`. T is above L, because the other sequences have tokens, too."""
        return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (1, len(self.places))

    def is_padded(self, value: Any) -> bool:
        """Whether a value is a tensor `[R, L, H]`."""
        return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == self.tokens.shape


@dataclass
class _OfBody:
    """What a model's layers share: the batch that its forward is computing, `None` outside one."""

    rows: Rows | None = None


@dataclass
class _OfLayer:
    """What the modules of a layer share while its forward runs.

    Attributes:
        body: see `_OfBody`. hidden: the name of the layer's first parameter. is_last: whether no layer follows.
        rows: what this run of the forward computes.
        pairs: padded sequences with the row that they were made of, which need not be picked out of them again: those
            that a mixer got, and those that a projection gave last.
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
    """The model beneath the head: takes the indices of a batch; right-padded sequences need no mask."""

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
    """A decoder layer as it is called, outside its checkpoint: hands the indices on."""

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
    """A decoder layer as it runs, inside its checkpoint: takes the indices for its mixers."""

    def forward(self, *args, around_rows=None, **kwargs):
        state: _OfLayer = vars(self)[STATE]
        state.rows = around_rows
        try:
            return super().forward(*args, **kwargs)
        finally:
            state.rows = None


class _Mixer(Switched):
    """A token mixer: gets the padded sequences, and gives the row."""

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
    """A linear layer inside a mixer: computes the row."""

    def __call__(self, hidden, *args, **kwargs):
        state: _OfLayer = vars(self)[STATE]
        rows = state.rows
        if rows is None or not rows.is_padded(hidden):
            return super().__call__(hidden, *args, **kwargs)
        return state.padded_of(rows, super().__call__(state.row_of(rows, hidden), *args, **kwargs))


def _row(rows: Rows, hidden: Tensor) -> Tensor:
    """What a layer gets, as the row."""
    return rows.collapsed(hidden) if rows.is_padded(hidden) else hidden


def _first(output: Any, is_it: Callable[[Any], bool], change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its hidden states, the first or only part, changed."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not is_it(hidden):
        raise UnsupportedLayer(f"a layer gives hidden states of the shape {tuple(getattr(hidden, 'shape', ()))}")
    return (change(hidden), *output[1:]) if isinstance(output, tuple) else change(hidden)


def install_around(model: PreTrainedModel, body: nn.Module) -> None:
    """Switch the classes of a model's body, layers, mixers and projections; doing it again changes nothing.

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
    """Why the layout "around" cannot be put into the layers of a model, as far as their classes say."""
    layers = [unwrapped(layer) for layer in decoder_layers(model)]
    mixers = [mixer for layer in layers for mixer in mixers_of(layer)]
    if not mixers:
        return "its decoder layers have no token mixers as modules of their own"
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return "its decoder layers are not those of transformers, which know activation checkpointing"
    if any(isinstance(part, GradientCheckpointingLayer) for mixer in mixers for part in mixer.modules()):
        return "its decoder layers have layers with activation checkpointing in them"
    return None


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, nn.Linear | Conv1D)
