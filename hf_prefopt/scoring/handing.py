"""Pass the segment bounds to attention modules in models whose decoder layers drop keyword arguments."""

from transformers import PreTrainedModel

from hf_prefopt.scoring.attention import SEGMENT_INPUTS
from hf_prefopt.scoring.switched import STATE, Switched, decoder_layers, mixers_of, switch, unwrapped


class _Layer(Switched):
    """A decoder layer inside its activation checkpoint. It stores the segment bounds, which its token mixers read."""

    def forward(self, *args, **kwargs):
        segments = vars(self)[STATE]
        segments.update((name, kwargs[name]) for name in SEGMENT_INPUTS if name in kwargs)
        try:
            return super().forward(*args, **kwargs)
        finally:
            segments.clear()


class _Mixer(Switched):
    """A token mixer that receives the stored segment bounds as keyword arguments."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{**kwargs, **vars(self)[STATE]})


def hand_segments_on(model: PreTrainedModel) -> None:
    """Make each decoder layer pass the segment bounds on to its token mixers."""
    for layer in map(unwrapped, decoder_layers(model)):
        segments: dict = {}
        for mixer in mixers_of(layer):
            switch(mixer, (_Mixer,), segments)
        switch(layer, (_Layer,), segments)
