"""Callbacks for any `transformers.Trainer` that generate answers of the policy and the reference during training."""

from hf_prefopt.generation.pictures import PictureCallback
from hf_prefopt.generation.samples import SampleGenerationsCallback
from hf_prefopt.generation.win_rate import WinRateCallback

__all__ = ["PictureCallback", "SampleGenerationsCallback", "WinRateCallback"]
