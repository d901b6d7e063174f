"""Runs that push to a stand-in for the Hub during training, and a run that resumes from a pushed checkpoint.

The script, run by test_pushed.py, prints whether the resumed run has the weights of an uninterrupted run, bit for bit.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from transformers import set_seed

from hf_prefopt import PreferenceTrainer
from tests.trainers import make_config, pairs

STRATEGIES = ("every_save", "checkpoint", "all_checkpoints")
BASE = "an-organization/base"


def train(folder: Path, output: str, resume: str | None = None, **settings):
    set_seed(0)
    args = make_config(folder / output, save_strategy="steps", save_steps=2, learning_rate=1e-2, **settings)
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PreferenceTrainer(str(folder / "base"), args=args, train_dataset=pairs(16), peft_config=peft_config)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: Path) -> None:
    gc.freeze()  # each training begins with a collection, which would look through all modules
    for strategy in STRATEGIES:
        pushed = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": f"an-organization/{strategy}"}
        # A run that stopped after four of its eight steps.
        stopped = {"hub_always_push": True, "hub_private_repo": True, "hub_base_model": BASE, "num_train_epochs": 0.5}
        train(folder, strategy, lr_scheduler_type="constant", **pushed, **stopped)
    checkpoint = Path(snapshot_download("an-organization/checkpoint", cache_dir=folder / "cache")) / "last-checkpoint"
    resumed = train(folder, "resumed", str(checkpoint), lr_scheduler_type="constant")
    whole = train(folder, "whole", lr_scheduler_type="constant")
    ours, theirs = (trainer.model.state_dict() for trainer in (resumed, whole))
    steps = (resumed.state.global_step, whole.state.global_step)
    print(json.dumps({"equal": all(torch.equal(ours[name], theirs[name]) for name in ours), "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
