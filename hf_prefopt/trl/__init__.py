"""TRL's offline preference trainers under their names: change the import, and keep the script.

    from hf_prefopt.trl import DPOConfig, DPOTrainer

Field names, defaults, the order of arguments and the names of metrics are those of TRL 1.16. What is computed is this
package's: docs/from_trl.md lists each field and each metric, and where the numbers differ.
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
