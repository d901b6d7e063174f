"""Runs of two ranks under DeepSpeed configurations that define an optimizer and a scheduler.

Started by torchrun: `python -m tests.distributed.own_json FOLDER`.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.distributed.engines import ENGINES, compile_no_sums, zero
from tests.tiny_models import tiny_model
from tests.trainers import logged, make_trainer, pairs

OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": 0,
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}
CONFIGURATIONS = {
    f"{name}, stage {stage}": (stage, parts)
    for stage in (2, 3)
    for name, parts in {
        "an optimizer": {"optimizer": OPTIMIZER},
        "an optimizer and a scheduler": {"optimizer": OPTIMIZER, "scheduler": SCHEDULER},
    }.items()
}
STEPS, WARM_UP, RATE = 6, 3, 1e-2


def settings(ranks: int) -> dict[str, Any]:
    """Return the settings: eight rows per step, in two micro-batches."""
    return {
        "max_steps": STEPS,
        "warmup_steps": WARM_UP,
        "learning_rate": RATE,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "train_dataset": pairs(16),
    }


def main(folder: Path) -> None:
    """Train under each configuration; the first rank writes losses and weights."""
    outcomes = {}
    compile_no_sums()
    gc.freeze()  # each training begins with a collection, which would look through all modules
    for name, (stage, parts) in CONFIGURATIONS.items():
        unset_hf_deepspeed_config()
        gathers = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
        trainer = make_trainer(
            folder / name.replace(" ", "_"), tiny_model(), deepspeed={**zero(stage, **gathers), **parts}, **settings(2)
        )
        trainer.train()
        whole = ENGINES[f"zero{stage}"].whole
        outcomes[name] = {
            "losses": logged(trainer, "loss"),
            "weights": {name: whole(parameter) for name, parameter in trainer.model.named_parameters()},
        }
    if PartialState().is_main_process:
        torch.save(outcomes, folder / "outcomes.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
