"""Offline preference optimization for Hugging Face causal language models: one Trainer for the whole DPO family.

The names in `__all__` are imported when they are first used (PEP 562), because torch and transformers take seconds to
import.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_prefopt.noise import leave_out_noise
from hf_prefopt.version import __version__

if TYPE_CHECKING:
    from hf_prefopt.config import PreferenceConfig
    from hf_prefopt.data.held_out import split_by_prompt
    from hf_prefopt.data.mixtures import Mixture, Source
    from hf_prefopt.inspection import inspect_dataset
    from hf_prefopt.losses import LossOutput, get_loss, list_losses, register_loss
    from hf_prefopt.trainer import PreferenceTrainer

leave_out_noise()  # before the libraries are imported

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
_MODULES = {
    "LossOutput": "losses",
    "Mixture": "data.mixtures",
    "PreferenceConfig": "config",
    "PreferenceTrainer": "trainer",
    "Source": "data.mixtures",
    "get_loss": "losses",
    "inspect_dataset": "inspection",
    "list_losses": "losses",
    "register_loss": "losses",
    "split_by_prompt": "data.held_out",
}


def __getattr__(name: str) -> Any:
    """Import and return the object with a public name, or else the module of this package with this name."""
    if name in _MODULES:
        globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
