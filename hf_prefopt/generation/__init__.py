"""Answers of the policy and of the reference while a model trains, for any `transformers.Trainer`."""

from hf_prefopt.generation.pictures import PictureCallback
from hf_prefopt.generation.samples import SampleGenerationsCallback
from hf_prefopt.generation.win_rate import WinRateCallback

__all__ = ["PictureCallback", "SampleGenerationsCallback", "WinRateCallback"]
