"""The code of each of two processes: three cached runs in one folder. The results of the rank are written as JSON.

python -m torch.distributed.run --nproc_per_node 2 tests/reference/two_ranks.py FOLDER
"""

import gc
import json
import os
import sys
from pathlib import Path

from hf_prefopt.reference.live import LiveReference
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs, unpaired

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
responses: list[int] = []
live_score = LiveReference.score


def counted(self, batch, *token_stats):
    if "rows" in batch:
        responses.append(len(batch["response_lengths"]))
    return live_score(self, batch, *token_stats)


LiveReference.score = counted
RUNS = {
    "live": {"precompute_ref_log_probs": False, "reference_cache_dir": None, "train_dataset": pairs(7)},
    "cached": {"train_dataset": pairs(7)},
    "again": {"train_dataset": pairs(7)},
    "apart": {"train_dataset": pairs(7), "reference_cache_dir": str(folder / f"cache{rank}")},
    "one is new": {"train_dataset": pairs(7), "reference_cache_dir": str(folder / f"cache{2 * rank}")},
    "kto": {"train_dataset": unpaired(8), "loss_type": "kto"},
    "stream": {"train_dataset": pairs(8, seed=4).to_iterable_dataset(), "max_steps": 2},
}
seen = {}
gc.freeze()  # each training begins with a collection, which would look through all modules
for name, settings in RUNS.items():
    shared = {"precompute_ref_log_probs": True, "reference_cache_dir": str(folder / "cache"), "layout": "padded"}
    shared |= {"reference": "adapter_off", "optim": "sgd", "eval_dataset": pairs(3, seed=3), "max_tokens_per_batch": 60}
    shared["eval_dataset"] = None if name == "kto" else shared["eval_dataset"]
    trainer = make_trainer(folder / name, perturbed(with_lora(tiny_model())), **{**shared, **settings})
    responses.clear()
    trainer.train()
    seen[name] = {"loss": logged(trainer, "loss"), "responses": sum(responses)}
    if name != "kto":
        seen[name]["eval_loss"] = trainer.evaluate()["eval_loss"]
(folder / f"rank{rank}.json").write_text(json.dumps(seen))
trainer.accelerator.end_training()
