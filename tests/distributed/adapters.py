"""PEFT methods under the engines: one function per method and engine, which trains, evaluates, saves and resumes.

The policies have moved away from their base model, so that losses have margins. The
optimizer is the smooth Adam of `habits`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.distributed.engines import ENGINES
from tests.distributed.habits import Place, resumable
from tests.reference.test_adapters import ATTENTION, KINDS
from tests.tiny_models import perturbed, random_rows, tiny_model

ALL_BIASES = "LoRA with all biases"
BIASES = (peft.LoraConfig, {"r": 4, "bias": "all", **ATTENTION})
ROWS = random_rows(3, seed=2, longest=10)


def base(kind: str) -> PreTrainedModel:
    """Return the model below the adapter."""
    return tiny_model(**({"attention_bias": True, "mlp_bias": True} if kind == ALL_BIASES else {}))


def adapted(kind: str) -> PeftModel:
    """Return a policy with a trained adapter."""
    config, settings = BIASES if kind == ALL_BIASES else KINDS[kind]
    torch.manual_seed(0)
    model = get_peft_model(base(kind), config(task_type="CAUSAL_LM", **settings))
    return perturbed(model, scale=0.1, seed=5)


def run(place: Place, kind: str, reference: str) -> dict[str, Any]:
    """Train, evaluate, save, and resume.

    Returns:
        The result of `Place.outcome`, and reference: the reference's log-probs of `ROWS` after training, `[6]`.
        resumed: the weights of a run that was resumed in the second epoch. saved: the folder of the adapter.
    """

    def trainer():
        place.policy()  # resets the engine's configuration, which would shard the next model during its construction
        return place.trainer(adapted(kind), reference=reference, **resumable())

    whole = trainer()
    whole.train()
    whole.evaluate()
    whole.save_model(str(place.folder / "saved"))
    (batch,) = whole.data_collator(ROWS)["pieces"]
    scores = whole.reference.score(batch)
    outcome = place.outcome(whole, reference=scores.logps.clone(), saved=str(place.folder / "saved"))
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(place.folder / "out" / "checkpoint-3"))
    return {**outcome, "resumed": place.outcome(resumed)["weights"]}


def scene(engine: str, kind: str, reference: str) -> Callable[[Path], dict[str, Any]]:
    """Return a run under an engine as a scene."""

    def play(folder: Path) -> dict[str, Any]:
        return run(Place(ENGINES[engine], bf16=False, folder=folder), kind, reference)

    play.__name__, play.__module__ = scene_name(engine, kind, reference), __name__
    return play


def scene_name(engine: str, kind: str, reference: str) -> str:
    """Return the name of the scene."""
    return f"{engine}_{kind}_{reference}".replace(" ", "_")


for _engine in ("ddp", "zero2", "zero3", "fsdp2"):
    for _kind in (*KINDS, ALL_BIASES):
        for _reference in ("auto", "adapter_off"):
            globals()[scene_name(_engine, _kind, _reference)] = scene(_engine, _kind, _reference)
