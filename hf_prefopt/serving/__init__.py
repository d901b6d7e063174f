"""Use trained models: merge adapters into their base model, and compare a model's answers with its base model's."""

from hf_prefopt.serving.merge import merge_adapter

__all__ = ["merge_adapter"]
