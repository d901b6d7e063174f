"""Run one case under one engine, and return its outcome as plain tensors and numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_prefopt import PreferenceTrainer
from hf_prefopt.reference.shards import release_gathered
from hf_prefopt.scoring.forward import CHUNK_ROWS, base_causal_lm
from hf_prefopt.scoring.modes import ModuleTree
from tests.distributed.cases import Case
from tests.distributed.engines import Engine
from tests.tiny_models import perturbed
from tests.trainers import ROWS, logged, make_trainer

RESUMED_FROM = 3


@mock.patch.dict(CHUNK_ROWS, cpu=16)  # a micro-batch has several chunks, and their number differs between ranks
def run_case(case: Case, engine: Engine, folder: Path) -> dict[str, Any]:
    """Train, evaluate and save.

    Returns:
        losses: the loss of each step. metrics: those of an evaluation of seven rows. weights: all trainable weights.
        baselines: KTO's baselines in each step and in the evaluation. checkpoint: the last one, if there is any.
        moved: the weights of a moving reference after the last step.
        resumed: the weights of a new trainer that resumed in the middle of the second epoch, if the case resumes.
        lower_layers: the number of layers that run once for policy and reference.
        head_is_whole: see `watch_head`. pieces: see `count_pieces`.
        whole_parameters: the names of parameters of policy and explicit reference
            that are not sharded on this rank after training.
        saved: the folder of the saved model. scale: the largest change of a weight.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    trainer = _trainer(case, engine, folder, world_size)
    heads = watch_head(trainer, engine)
    pieces = count_pieces(trainer)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    outcome = {"losses": logged(trainer, "loss"), "head_is_whole": heads, "pieces": pieces}
    outcome["lower_layers"] = getattr(getattr(trainer.reference, "lower", None), "count", 0)
    outcome["whole_parameters"] = _whole_parameters(trainer.model, engine)
    if case.ref_model:
        outcome["whole_parameters"] += _whole_parameters(trainer.reference.model, engine)
    outcome["metrics"] = _metrics(trainer)
    outcome["baselines"] = [*logged(trainer, "loss/kto_kl"), *logged(trainer, "eval_loss/kto_kl")]
    # Saved in the state in which the evaluation left the model.
    outcome["saved"] = str(folder / "saved")
    trainer.save_model(outcome["saved"])
    outcome["weights"] = _trained(trainer, engine)
    outcome["scale"] = max((outcome["weights"][name] - before[name]).abs().max().item() for name in before)
    if trainer.args.sync_ref_model:
        outcome["moved"] = {name: tensor.clone() for name, tensor in trainer.reference.copies.gathered()}
    if case.resumes:
        outcome["checkpoint"] = str(folder / f"checkpoint-{trainer.state.global_step}")
        resumed = _trainer(case, engine, folder, world_size)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{RESUMED_FROM}"))
        outcome["resumed"] = _trained(resumed, engine)
    return outcome


class Hooks(TrainerCallback):
    """A callback that registers hooks when training begins, so that they run inside the hooks of the engine."""

    def __init__(self, register: Callable[[], None]):
        self.register = register

    def on_train_begin(self, *_, **__):
        self.register()


def watch_head(trainer: PreferenceTrainer, engine: Engine) -> dict[str, set[bool]]:
    """Record whether the head's weight is gathered before, inside and after the
    head's forward; training fills the list.
    """
    seen: dict[str, set[bool]] = {"before": set(), "inside": set(), "after": set()}

    def register() -> None:
        causal_lm = base_causal_lm(trainer.model)
        head = causal_lm.get_output_embeddings()
        head = getattr(head, "base_layer", head)  # the head below an adapter
        weight = head.weight  # accessing the module inside a forward would make ZeRO-3 gather its parameter

        def note(place: str) -> Callable[..., None]:
            return lambda *_: seen[place].add(not engine.is_sharded(weight))

        causal_lm.model.layers[-1].register_forward_hook(note("before"))
        head.register_forward_pre_hook(note("inside"))
        head.register_forward_hook(note("after"))

    trainer.add_callback(Hooks(register))
    return seen


def count_pieces(trainer: PreferenceTrainer) -> list[int]:
    """Record the number of pieces of each batch of this rank; training fills the list."""
    counts: list[int] = []
    idle = trainer.global_batch.idle
    trainer.global_batch.idle = lambda batches: (counts.extend(len(b["pieces"]) for b in batches), idle(batches))[1]
    return counts


def _whole_parameters(model: nn.Module, engine: Engine) -> list[str]:
    return [name for name, p in model.named_parameters() if not engine.is_sharded(p)]


def _trained(trainer: PreferenceTrainer, engine: Engine) -> dict[str, Any]:
    # FSDP2 keeps the parameters of the last forward gathered until the next one.
    release_gathered(ModuleTree(trainer.model))
    return {name: engine.whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}


def _trainer(case: Case, engine: Engine, folder: Path, world_size: int) -> PreferenceTrainer:
    settings = {**case.merged_settings(world_size), **engine.settings, "log_level": "error"}
    if settings.get("precompute_ref_log_probs"):
        settings["reference_cache_dir"] = str(folder / "cache")
    if case.resumes:
        settings |= {"save_strategy": "steps", "save_steps": 1}
    # With the configuration of the last case, models would be created in shards, with different random numbers on each
    # rank.
    unset_hf_deepspeed_config()
    model = case.build_model()
    if case.ref_model:
        settings["ref_model"] = case.build_reference(folder / "reference")
        if world_size > 1:
            dist.barrier()  # the first rank saves it
    trainer = make_trainer(folder, model, train_dataset=None, **settings)
    engine.adapt(trainer)
    if not case.lora:
        # The reference is a copy of the earlier weights, so the first loss has margins, and KTO's baseline is above 0.
        perturbed(trainer.model, 0.1, case.seed)
    rows = ROWS[trainer.criterion.kind]
    datasets = rows(case.rows), rows(7, seed=1)
    if case.streams:
        datasets = (dataset.to_iterable_dataset() for dataset in datasets)
    trainer.train_dataset, trainer.eval_dataset = datasets
    return trainer


def _metrics(trainer: PreferenceTrainer) -> dict[str, float]:
    timing = ("runtime", "per_second", "epoch")
    return {name: value for name, value in trainer.evaluate().items() if not name.endswith(timing)}
