"""Use of trained models: merging adapters into their base model, and comparing answers with the base model."""

from hf_prefopt.serving.merge import merge_adapter

__all__ = ["merge_adapter"]
