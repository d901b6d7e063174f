"""From a trained run to a model that is served: adapters merged into their base, and answers beside the base's."""

from hf_prefopt.serving.merge import merge_adapter

__all__ = ["merge_adapter"]
