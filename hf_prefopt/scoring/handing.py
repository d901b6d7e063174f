"""Hands the bounds of segments to attention modules, in models whose decoder layers drop keyword arguments."""

from transformers import PreTrainedModel

from hf_prefopt.scoring.attention import SEGMENT_INPUTS
from hf_prefopt.scoring.switched import STATE, Switched, decoder_layers, mixers_of, switch, unwrapped


class _Layer(Switched):
    """A decoder layer as it runs, inside its checkpoint: keeps the bounds for its mixers."""

    def forward(self, *args, **kwargs):
        segments = vars(self)[STATE]
        segments.update((name, kwargs[name]) for name in SEGMENT_INPUTS if name in kwargs)
        try:
            return super().forward(*args, **kwargs)
        finally:
            segments.clear()


class _Mixer(Switched):
    """A token mixer: gets the bounds as keyword arguments."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{**kwargs, **vars(self)[STATE]})


def hand_segments_on(model: PreTrainedModel) -> None:
    """Make each decoder layer of a model hand the bounds of segments that it gets to its token mixers."""
    for layer in map(unwrapped, decoder_layers(model)):
        segments: dict = {}
        for mixer in mixers_of(layer):
            switch(mixer, (_Mixer,), segments)
        switch(layer, (_Layer,), segments)
