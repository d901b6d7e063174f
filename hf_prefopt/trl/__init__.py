"""TRL's offline preference trainers under TRL's names: change the import, and keep the script.

    from hf_prefopt.trl import DPOConfig, DPOTrainer

Field names, defaults, the order of arguments and metric names are those of TRL 1.16; the computation is this package's.
docs/from_trl.md lists every field and metric, and the cases in which the numbers differ.
"""

from hf_prefopt.trl.configs import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, TPOConfig
from hf_prefopt.trl.trainers import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer, TPOTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "TPOConfig",
    "TPOTrainer",
]
