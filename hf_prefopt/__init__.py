"""Offline preference optimization for Hugging Face causal language models: one Trainer, the whole DPO family."""

from hf_prefopt.noise import leave_out_noise

leave_out_noise()  # before the libraries are imported

from hf_prefopt.config import PreferenceConfig  # noqa: E402
from hf_prefopt.data.held_out import split_by_prompt  # noqa: E402
from hf_prefopt.data.mixtures import Mixture, Source  # noqa: E402
from hf_prefopt.inspection import inspect_dataset  # noqa: E402
from hf_prefopt.losses import LossOutput, get_loss, list_losses, register_loss  # noqa: E402
from hf_prefopt.trainer import PreferenceTrainer  # noqa: E402
from hf_prefopt.version import __version__  # noqa: E402

__all__ = [
    "LossOutput",
    "Mixture",
    "PreferenceConfig",
    "PreferenceTrainer",
    "Source",
    "__version__",
    "get_loss",
    "inspect_dataset",
    "list_losses",
    "register_loss",
    "split_by_prompt",
]
