"""Offline preference optimization for Hugging Face causal language models: one Trainer, the whole DPO family."""

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.losses import LossOutput, get_loss, list_losses, register_loss
from hf_prefopt.trainer import PreferenceTrainer

__all__ = ["LossOutput", "PreferenceConfig", "PreferenceTrainer", "get_loss", "list_losses", "register_loss"]
__version__ = "0.1.0"
