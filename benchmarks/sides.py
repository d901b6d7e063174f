"""The two trainers of the benchmark, ready to step: TRL's `DPOTrainer` and this project's `PreferenceTrainer`.

Both get the same weights, the same LoRA adapter and equal settings. A step uses each trainer's own collator,
`get_batch_samples`, `training_step`, clipping and optimizer, without omissions.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
)

from benchmarks.work import Row, as_groups_of_pairs, as_pairs, padded_positions, shared_positions

# SmolLM2-135M's shape; "random:layers=4,vocab=1000" overrides some values.
_SHAPE = {"hidden": 576, "mlp": 1536, "layers": 30, "heads": 9, "key_heads": 3, "vocab": 49152}


def load_model(source: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model from a folder, or build a random model with SmolLM2's shape: "random:layers=4,vocab=1000"."""
    if not source.startswith("random:"):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    changes = dict(item.split("=") for item in source.removeprefix("random:").split(",") if item)
    shape = {name: int(changes.pop(name, size)) for name, size in _SHAPE.items()}
    if changes:
        raise ValueError(f"{source!r}: {', '.join(changes)} is not one of {', '.join(_SHAPE)}")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"],
        vocab_size=shape["vocab"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def vocabulary_of(source: str) -> int:
    """Return the number of token ids of the model at `source`."""
    if source.startswith("random:"):
        sizes = dict(item.split("=") for item in source.removeprefix("random:").split(",") if item)
        return int(sizes.get("vocab", _SHAPE["vocab"]))
    return AutoConfig.from_pretrained(source).vocab_size


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the model's folder; for a random model, return a tokenizer that knows three words."""
    if not source.startswith("random:"):
        return PreTrainedTokenizerFast.from_pretrained(source)
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<s>")


def lora(layers: Sequence[int] | None = None) -> LoraConfig:
    """Return the LoRA configuration: rank 16 on all linear modules, or on those of some decoder layers; no dropout."""
    target = "all-linear"
    if layers is not None:
        target = rf".*\.layers\.({'|'.join(map(str, layers))})\..*_proj"
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=target, task_type="CAUSAL_LM")


@dataclass
class Side:
    """A trainer, ready to step.

    Attributes:
        name: "trl" or "ours".
        trainer: the trainer, with `model` and `optimizer` prepared by its accelerator.
    """

    name: str
    trainer: Trainer
    model: nn.Module
    optimizer: Any

    @classmethod
    def of(cls, name: str, trainer: Trainer) -> "Side":
        """Prepare the trainer like the start of `train()`."""
        trainer.create_optimizer()
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped, trainer.optimizer = model, optimizer
        trainer.current_gradient_accumulation_steps = 1
        return cls(name, trainer, model, optimizer)

    def backward(self, rows: Sequence[Row]) -> Tensor:
        """Collate the rows, run forward and backward passes, and return the loss without waiting for its value."""
        features = as_pairs(rows) if self.name == "trl" else list(rows)
        trainer = self.trainer
        device = trainer.accelerator.device
        batches, count = trainer.get_batch_samples(iter(_Collated(trainer, features)), 1, device)
        return trainer.training_step(self.model, batches[0], count)

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Take a complete optimizer step and return the loss before it."""
        loss = self.backward(rows)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """Return the current gradients, keyed by parameter."""
        return {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def positions(self, rows: Sequence[Row]) -> int:
        """Return the number of positions that this side computes for these rows."""
        if self.name == "trl":
            return padded_positions(as_groups_of_pairs(rows))
        return padded_positions(rows) if self.trainer.layout == "padded" else shared_positions(rows)


class _Collated:
    """The single batch of a step. It is collated when it is needed, after our trainer has chosen its layout."""

    def __init__(self, trainer: Trainer, features: list[Row]):
        self.trainer, self.features = trainer, features

    def __iter__(self):
        yield self.trainer.data_collator(self.features)


def settings(bf16: bool = False, on_gpu: bool = False) -> dict[str, Any]:
    """Return the arguments of both trainers: no checkpointing, no saving, no reporting."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": bf16,
        "use_cpu": not on_gpu,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "beta": 0.1,
        "seed": 0,
    }


def trl_side(source: str, **changes: Any) -> Side:
    """Return TRL's trainer, with its defaults except for `settings`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    # The trainer requires a dataset, but its batches come from the benchmark.
    unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    arguments = DPOConfig(**(settings() | {"max_length": None} | changes))
    trainer = DPOTrainer(
        load_model(source),
        args=arguments,
        train_dataset=unused,
        processing_class=load_tokenizer(source),
        peft_config=lora(),
    )
    return Side.of("trl", trainer)


def our_side(source: str, **changes: Any) -> Side:
    """Return `PreferenceTrainer`, with its defaults except for `settings`."""
    from hf_prefopt import PreferenceConfig, PreferenceTrainer

    arguments = PreferenceConfig(**(settings() | {"max_length": None} | changes))
    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    trainer = PreferenceTrainer(load_model(source), args=arguments, processing_class=tokenizer, peft_config=lora())
    return Side.of("ours", trainer)


SIDES = {"trl": trl_side, "ours": our_side}


def perturb_adapters(first: Side, *others: Side, scale: float = 0.02) -> None:
    """Give all sides the same nonzero adapter, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in _trained(first).values():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    copy_adapter(first, *others)


def copy_adapter(first: Side, *others: Side) -> None:
    """Copy the first side's adapter to the others, because after some steps they differ by more than rounding.

    Raises:
        ValueError: the sides train different parameters.
    """
    source = {name: parameter.detach() for name, parameter in _trained(first).items()}
    for other in others:
        trained = _trained(other)
        if trained.keys() != source.keys():
            raise ValueError(f"the sides train different parameters: {sorted(trained.keys() ^ source.keys())}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(source[name])


def _trained(side: Side) -> dict[str, nn.Parameter]:
    return {name: p for name, p in side.model.named_parameters() if p.requires_grad}
