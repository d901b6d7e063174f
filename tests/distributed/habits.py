"""Common uses of a trainer ("habits"), one function each: run in one process, and in two processes under each engine.

Every run has a global batch of four examples, in two micro-batches, over seven rows,
with plain gradient descent, as in `cases`. Models start from weights that bf16 can
represent, so that an engine with bf16 weights starts from the same model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_prefopt import PreferenceTrainer
from hf_prefopt.losses import register_loss
from hf_prefopt.reference.shards import release_gathered
from hf_prefopt.scoring.modes import ModuleTree
from tests.distributed.cases import DESCENT, GLOBAL_BATCH
from tests.distributed.engines import ENGINES, Engine
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

TIMING = ("runtime", "per_second", "epoch", "preparation_time")
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
# With an epsilon as large as the gradients, Adam is as smooth as plain descent. It has a state to resume.
WITH_STATE = {"optim": "adamw_torch", "adam_epsilon": 0.01, "learning_rate": 0.01, "lr_scheduler_type": "linear"}


@dataclass(frozen=True)
class Place:
    """The place in which a habit runs: an engine, a precision, and a folder."""

    engine: Engine
    bf16: bool
    folder: Path

    def trainer(self, model: nn.Module | None = None, folder: str = "out", **settings: Any) -> PreferenceTrainer:
        """Return a trainer of the engine, with the rank's share of the global batch."""
        share = GLOBAL_BATCH // (2 * (dist.get_world_size() if dist.is_initialized() else 1))
        settings = {
            "train_dataset": pairs(7),
            "eval_dataset": pairs(5, seed=1),
            "per_device_train_batch_size": share,
            "per_device_eval_batch_size": share,
            "log_level": "error",
            **DESCENT,
            **self.engine.in_precision(self.bf16),
            **settings,
        }
        trainer = make_trainer(self.folder / folder, self.policy() if model is None else model, **settings)
        self.engine.adapt(trainer)
        return trainer

    def policy(self, seed: int = 1, lora: bool = True) -> nn.Module:
        """Return a model with weights that bf16 can represent; it is not sharded,
        whatever the engine of earlier trainers.
        """
        unset_hf_deepspeed_config()
        return policy(seed, lora)

    def wait(self) -> None:
        """Wait until every rank is here."""
        if dist.is_initialized():
            dist.barrier()

    def outcome(self, *trainers: PreferenceTrainer, **more: Any) -> dict[str, Any]:
        """Return the losses, gradient norms and evaluations of the trainers, and the weights of the last one."""
        logs = [entry for trainer in trainers for entry in trainer.state.log_history]
        model = trainers[-1].model
        release_gathered(ModuleTree(model))  # FSDP2 would keep them gathered until the next forward
        return {
            "losses": [entry["loss"] for entry in logs if "loss" in entry],
            "norms": [float(entry["grad_norm"]) for entry in logs if "grad_norm" in entry],
            "metrics": [metrics(entry) for entry in logs if any(name.startswith("eval_") for name in entry)],
            "weights": {n: self.engine.whole(p).float() for n, p in model.named_parameters() if p.requires_grad},
            **more,
        }


def policy(seed: int = 1, lora: bool = True) -> nn.Module:
    """Return a model with weights that bf16 can represent; either a trained adapter trains, or all weights."""
    model = perturbed(with_lora(tiny_model()) if lora else tiny_model(), 0.1, seed)
    return model.to(torch.bfloat16).float()


def metrics(entry: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation, without its timing."""
    return {name: value for name, value in entry.items() if not name.endswith((*TIMING, "step"))}


HABITS: dict[str, Callable[[Place], dict[str, Any]]] = {}


def habit(function: Callable[[Place], dict[str, Any]]) -> Callable[[Place], dict[str, Any]]:
    """Register a habit under its name."""
    HABITS[function.__name__] = function
    return function


@habit
def trains(place):
    trainer = place.trainer()
    trainer.train()
    trainer.evaluate()
    return place.outcome(trainer)


@habit
def evaluates_first(place):
    trainer = place.trainer()
    trainer.evaluate()
    trainer.train()
    return place.outcome(trainer)


@habit
def evaluates_on_start(place):
    trainer = place.trainer(eval_on_start=True)
    trainer.train()
    return place.outcome(trainer)


@habit
def trains_twice(place):
    trainer = place.trainer()
    trainer.train()
    first = list(trainer.state.log_history)
    trainer.train()
    trainer.state.log_history = [*first, *trainer.state.log_history]
    return place.outcome(trainer)


@habit
def predicts_after(place):
    trainer = place.trainer()
    trainer.train()
    prediction = trainer.predict(pairs(5, seed=2))
    trainer.state.log_history.append({f"eval_{n}": v for n, v in metrics(prediction.metrics).items()})
    return place.outcome(trainer, predictions=torch.as_tensor(prediction.predictions))


def resumable(**more: Any) -> dict[str, Any]:
    """Return the settings of a run of two epochs and four steps, which is resumed in the middle of the second epoch."""
    return {**WITH_STATE, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, **more}


@habit
def resumes(place):
    whole = place.trainer(**resumable())
    whole.train()
    expected = place.outcome(whole)["weights"]
    resumed = place.trainer(**resumable())
    resumed.train(resume_from_checkpoint=str(place.folder / "out" / "checkpoint-3"))
    outcome = place.outcome(resumed)
    gap = max((outcome["weights"][name] - values).abs().max().item() for name, values in expected.items())
    return {**outcome, "gap_to_the_whole_run": gap}


def resumes_with_fewer(place):
    """One rank resumes from the checkpoint of two ranks; the steps have the same rows."""
    two = place.folder.parent / place.folder.name.replace("_with_fewer", "")
    resumed = place.trainer(**resumable())
    resumed.train(resume_from_checkpoint=str(two / "out" / "checkpoint-3"))
    return place.outcome(resumed)


@habit
def resumes_weights_alone(place, lora=True):
    settings = resumable(save_only_model=True)
    place.trainer(place.policy(lora=lora), **settings).train()
    resumed = place.trainer(place.policy(lora=lora), **settings)
    resumed.train(resume_from_checkpoint=str(place.folder / "out" / "checkpoint-3"))
    return place.outcome(resumed)


@habit
def resumes_all_weights_alone(place):
    return resumes_weights_alone(place, lora=False)


@habit
def two_trainers(place):
    """The second trainer is created before the first one trains; both evaluate after both have trained."""
    first = place.trainer(folder="first")
    second = place.trainer(place.policy(seed=5), folder="second", loss_type="hinge", train_dataset=pairs(6))
    first.train()
    second.train()
    first.evaluate()
    second.evaluate()
    return place.outcome(first, second)


@habit
def one_after_the_other(place):
    """The second trainer is created after the first one has finished."""
    outcomes = [trains(Place(place.engine, place.bf16, place.folder / str(number))) for number in range(2)]
    joined = {name: outcomes[0][name] + outcomes[1][name] for name in ("losses", "norms", "metrics")}
    return {**outcomes[1], **joined}


@habit
def runs_the_cell_again(place):
    """The loss is registered again, and a new trainer trains the same model object in the same folder."""
    model = place.policy()

    def cell():
        trainer = place.trainer(model, loss_type="of_a_cell", save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.evaluate()
        return trainer

    register_loss("of_a_cell")(of_a_cell)
    first = cell()
    register_loss("of_a_cell")(of_a_cell)
    return place.outcome(first, cell())


def of_a_cell(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    return torch.relu(1 - beta * (chosen - rejected))


@habit
def streams(place):
    """A stream with two loader workers and accumulation. The order of the rows in a
    step may differ, so there is one step.
    """
    rows = pairs(10).to_iterable_dataset(num_shards=2)
    settings = {"dataloader_num_workers": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = place.trainer(train_dataset=rows, eval_dataset=pairs(5, seed=1).to_iterable_dataset(), **settings)
    assert isinstance(trainer.train_dataset, IterableDataset)
    trainer.train()
    trainer.evaluate()
    return place.outcome(trainer)


@habit
def splits_batches(place):
    trainer = place.trainer(accelerator_config={"split_batches": True})
    trainer.train()
    return place.outcome(trainer)


@habit
def several_evaluation_sets(place):
    sets = {"one": pairs(5, seed=1), "other": pairs(3, seed=2)}
    trainer = place.trainer(eval_dataset=sets, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.evaluate()
    return place.outcome(trainer)


@habit
def loads_the_best(place, lora=True):
    """The second of two steps makes the model worse, so the first checkpoint is the
    best; then the trainer evaluates.
    """
    settings = {"load_best_model_at_end": True, "learning_rate": 1.0, **EVERY_STEP}
    trainer = place.trainer(place.policy(lora=lora), **settings)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    again = trainer.evaluate()["eval_loss"]
    assert losses[0] < losses[1]
    return place.outcome(trainer, best=torch.tensor([losses[0], again]))


@habit
def loads_the_best_of_all_weights(place):
    return loads_the_best(place, lora=False)


@habit
def keeps_a_reference_adapter(place):
    """The reference is a frozen adapter with its own head; checkpoints and `save_model` contain its full tensors."""
    model = place.policy()
    model.add_adapter("before", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".before." in name:
            moved = parameter.data + torch.randn(parameter.shape, generator=generator).mul(0.1)
            parameter.data = moved.to(torch.bfloat16).float()
    given = {
        name: values.cpu().clone() for name, values in get_peft_model_state_dict(model, adapter_name="before").items()
    }
    trainer = place.trainer(model, reference="adapter:before", save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(place.folder / "final"))
    place.wait()
    for folder in (place.folder / "final", place.folder / "out" / "checkpoint-1"):
        saved = load_file(folder / "before" / "adapter_model.safetensors")
        assert saved.keys() == given.keys()
        assert all(torch.equal(saved[name].float(), values) for name, values in given.items())
    return place.outcome(trainer)


@habit
def saves_weights_alone(place):
    trainer = place.trainer(save_only_model=True, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.evaluate()
    return place.outcome(trainer)


class Impatient(TrainerCallback):
    """A callback that evaluates after step 1, saves after step 2, stops after step 3 of 4, and records what it gets."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.seen.append(("step", state.global_step, model is not None))
        control.should_evaluate |= state.global_step == 1
        control.should_save |= state.global_step == 2
        control.should_training_stop |= state.global_step == 3

    def on_evaluate(self, args, state, control, metrics=None, **_):
        self.seen.append(("evaluate", state.global_step, sorted(metrics)))

    def on_save(self, args, state, control, **_):
        self.seen.append(("save", state.global_step, Path(args.output_dir, f"checkpoint-{state.global_step}").is_dir()))


@habit
def own_callback(place):
    impatient = Impatient()
    trainer = place.trainer(callbacks=[impatient], num_train_epochs=2)
    trainer.train()
    return place.outcome(trainer, seen=impatient.seen)


def scene(engine: str, bf16: bool, name: str) -> Callable[[Path], dict[str, Any]]:
    """Return a habit under an engine as a scene, with a name that contains engine, precision, and habit."""

    def play(folder: Path) -> dict[str, Any]:
        follow = HABITS.get(name, resumes_with_fewer)
        return follow(Place(ENGINES[engine], bf16, folder))

    play.__name__, play.__module__ = scene_name(engine, bf16, name), __name__
    return play


def scene_name(engine: str, bf16: bool, name: str) -> str:
    """Return the name of this scene."""
    return f"{engine}_{'bf16' if bf16 else 'fp32'}_{name}"


for _engine in ("ddp", "zero2", "zero3", "fsdp2"):
    for _bf16 in (False, True):
        for _name in (*HABITS, resumes_with_fewer.__name__):
            globals()[scene_name(_engine, _bf16, _name)] = scene(_engine, _bf16, _name)
