"""Trainers and configurations with TRL's names. To run a script that uses TRL, change its import:

    from hf_prefopt.trl import DPOConfig, DPOTrainer

The names and defaults of fields, the order of arguments, and the names of metrics are those of TRL 1.16. The
computation is that of this package. docs/from_trl.md lists every field and metric, and the cases in which the numbers
differ.
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
