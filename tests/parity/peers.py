"""TRL's trainers and ours on the same tiny model and the same token ids, one batch at a time."""

from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor, nn

from tests.tiny_models import perturbed, random_rows, tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_trainer

QUIET = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
# One raw row for the constructors of TRL's trainers; the batches consist of token ids.
RAW = Dataset.from_list([{"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome."}])


@dataclass
class Step:
    """The result of a trainer for one batch: its loss, the gradient of every parameter, its metrics."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def policy() -> nn.Module:
    """Return a policy that differs by some nats from `reference()`, without dropout."""
    return perturbed(tiny_model("qwen2", vocab_size=600), scale=0.05)


def reference() -> nn.Module:
    return tiny_model("qwen2", vocab_size=600)


def rows(count: int = 3) -> list[dict]:
    return random_rows(count, seed=5, longest=12)


def step_of(loss: Tensor, model: nn.Module, metrics: dict[str, float]) -> Step:
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.item(), gradients, metrics)


def our_step(folder, data: list[dict] | None = None, model: nn.Module | None = None, **settings) -> Step:
    """Return the result of our trainer, with the `compute_loss` that `train()` calls."""
    model = model or policy()
    trainer = make_trainer(folder, model, layout="padded", **settings)
    (batch,) = trainer.data_collator(data or rows())["pieces"]
    model.train()
    step = step_of(trainer.compute_loss(model, batch), model, {})
    step.metrics = trainer.record.pop_means(trainer.accelerator)
    return step


def dpo_trainer(folder, model: nn.Module | None = None, ref_model: nn.Module | None = None, **settings):
    """Return TRL's DPOTrainer, in fp32 on the CPU. Without `ref_model`, TRL chooses the reference."""
    from trl import DPOConfig, DPOTrainer

    raw = {name: settings.pop(name) for name in ("train_dataset", "eval_dataset", "peft_config") if name in settings}
    args = DPOConfig(output_dir=str(folder), **{**QUIET, **settings})
    data = {"train_dataset": RAW, **raw}
    return DPOTrainer(model or policy(), ref_model, args=args, processing_class=tiny_tokenizer(), **data)


def trl_rows(data: list[dict]) -> list[dict]:
    """Return prepared pairs with the column names of TRL's DPO collator."""
    return [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": row["response_ids"][0], "rejected_ids": row["response_ids"][1]}
        for row in data
    ]


def dpo_step(folder, data: list[dict] | None = None, **settings) -> Step:
    """Return the result of TRL's DPOTrainer."""
    trainer = dpo_trainer(folder, ref_model=reference(), **settings)
    batch = trainer.data_collator(trl_rows(data or rows()))
    trainer.model.train()
    step = step_of(trainer.compute_loss(trainer.model, batch), trainer.model, {})
    step.metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return step


def concatenated_step(kind: str, folder, data: list[dict] | None = None, **settings) -> Step:
    """Return the result of TRL's CPOTrainer ("cpo") or ORPOTrainer ("orpo")."""
    if kind == "cpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    args = Config(output_dir=str(folder), max_length=256, remove_unused_columns=False, **{**QUIET, **settings})
    trainer = Trainer(policy(), args=args, train_dataset=RAW, processing_class=tiny_tokenizer())
    batch = trainer.data_collator([_labeled(row) for row in data or rows()])
    trainer.model.train()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="train")
    return step_of(loss, trainer.model, metrics)


def _labeled(row: dict) -> dict:
    """Return a prepared pair for the collator of CPO and ORPO: whole sequences, and labels that mask the prompt."""
    labeled = {"prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
    for side, response in zip(("chosen", "rejected"), row["response_ids"], strict=True):
        ids = row["prompt_ids"] + response
        labeled[f"{side}_input_ids"] = ids
        labeled[f"{side}_attention_mask"] = [1] * len(ids)
        labeled[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + response
    return labeled


def tpo_step(folder, data: list[dict], **settings) -> Step:
    """Return the result of TRL's TPOTrainer on prepared triples."""
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    raw = Dataset.from_list([{**RAW[0], "reference": " Paris, of course."}])
    args = TPOConfig(output_dir=str(folder), **{**QUIET, **settings})
    trainer = TPOTrainer(policy(), args=args, train_dataset=raw, processing_class=tiny_tokenizer())
    golds = [{"reference_ids": row["response_ids"][2]} for row in data]
    batch = trainer.data_collator([pair | gold for pair, gold in zip(trl_rows(data), golds, strict=True)])
    trainer.model.train()
    step = step_of(trainer.compute_loss(trainer.model, batch), trainer.model, {})
    step.metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return step


def kto_trainer(folder, **settings):
    """Return TRL's KTOTrainer, in fp32 on the CPU, on raw rows. It needs two rows per batch, in a fixed order."""
    from trl import KTOConfig, KTOTrainer

    raw = Dataset.from_list(
        [
            {"prompt": "The capital of France is", "completion": c, "label": c == " Paris."}
            for c in (" Paris.", " Rome.")
        ]
    )
    order = {"train_sampling_strategy": "sequential"}
    args = KTOConfig(output_dir=str(folder), max_length=256, **{**QUIET, **order, **settings})
    return KTOTrainer(policy(), reference(), args=args, train_dataset=raw, processing_class=tiny_tokenizer())


def kto_step(folder, data: list[dict], **settings) -> Step:
    """Return the result of TRL's KTOTrainer on prepared unpaired rows with their mismatched responses."""
    trainer = kto_trainer(folder, **settings)
    batch = trainer.data_collator(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": row["response_ids"][0],
                "label": row["labels"][0],
                **({"KL_completion_ids": row["mismatched_ids"][0]} if "mismatched_ids" in row else {}),
            }
            for row in data
        ]
    )
    trainer.model.train()
    step = step_of(trainer.compute_loss(trainer.model, batch), trainer.model, {})
    step.metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return step


def labeled_rows(labels: tuple[bool, ...], mismatched: bool = True) -> list[dict]:
    """Return unpaired rows with these labels; the mismatched response of a row is the response of the next row."""
    data = rows(len(labels))
    first = [row["response_ids"][0] for row in data]
    unpaired = [
        {
            "prompt_ids": row["prompt_ids"],
            "response_ids": [row["response_ids"][0]],
            "scored_masks": [row["scored_masks"][0]],
            "labels": [label],
            "row": row["row"],
        }
        for row, label in zip(data, labels, strict=True)
    ]
    for row, other in zip(unpaired, first[1:] + first[:1], strict=True):
        if mismatched:
            row |= {"mismatched_ids": [other], "mismatched_masks": [[1] * len(other)]}
    return unpaired
