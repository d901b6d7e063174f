"""The start summary: about fourteen lines that describe a run before its first step, so that users see mistakes early.

The parts of the trainer add the lines, for example about the losses and their hyperparameters, the reference, and the
layout.
"""

import logging
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerState

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.collator import LoaderCollator
from hf_prefopt.data.notes import plural
from hf_prefopt.objective.objective import Objective

logger = logging.getLogger(__name__)

TOPICS = ("model", "loss", "reference", "layout", "attention", "data", "batch", "optimizer")
MOST_LINES = 14
# Number of training rows whose positions are counted.
_ROWS = 64


class StartSummary(TrainerCallback):
    """A callback that logs the start summary on the first rank. The model card contains the same facts."""

    def __init__(self):
        self._texts: dict[str, tuple[str, ...]] = {}
        self._positions = ""

    def say(self, topic: str, *texts: str) -> None:
        """Set the texts of a topic, one line per text.

        Raises:
            KeyError: If the topic is not one of `TOPICS`.
        """
        if topic not in TOPICS:
            raise KeyError(f"{topic!r} is not one of {', '.join(TOPICS)}")
        self._texts[topic] = texts

    def lines(self) -> list[str]:
        """Return all lines, in the order of `TOPICS`. If a topic has too many lines, the last one is "and N more"."""
        said = self._said()
        found, total = [], sum(map(len, said.values()))
        for topic in TOPICS:
            texts = said.get(topic, ())
            room = max(2, MOST_LINES - (total - len(texts)))
            if len(texts) > room:
                total -= len(texts) - room
                texts = (*texts[: room - 1], f"and {len(texts) - room + 1} more")
            found += [f"{topic}: {text}" for text in texts]
        return found

    def as_dict(self) -> dict[str, str]:
        """Return the texts keyed by topic, for the model card."""
        said = self._said()
        return {topic: "; ".join(said[topic]) for topic in TOPICS if topic in said}

    def _said(self) -> dict[str, tuple[str, ...]]:
        """Return the texts, keyed by topic. The text about the layout ends with the result of `positions_text`."""
        if not self._positions or "layout" not in self._texts:
            return self._texts
        return self._texts | {"layout": tuple(f"{text}; {self._positions}" for text in self._texts["layout"])}

    def show(self, *topics: str) -> None:
        """Log the lines of these topics. Without topics, log all lines."""
        for line in self.lines():
            if not topics or line.split(":")[0] in topics:
                logger.warning(line)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **_):
        """Add lines about the batch and the optimizer of this run or trial, and log all lines."""
        self._positions = positions_text(train_dataloader, args.train_batch_size)
        self.say("batch", batch_text(args, state))
        self.say("optimizer", optimizer_text(args))
        if state.is_world_process_zero:
            self.show()


def positions_text(loader: Any, rows_at_once: int) -> str:
    """Compare the number of positions that the layout computes with that of right-padded batches, for the first rows.

    Args:
        loader: Data loader of the training rows.
        rows_at_once: Number of rows of a micro-batch.

    Returns:
        Text with both numbers. "" if the layout saves no positions, if the data are a stream, or if the user passed a
        collator.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    ours = getattr(collate, "data_collator", collate)  # the Trainer may wrap it
    if isinstance(dataset, IterableDataset) or not isinstance(ours, LoaderCollator) or ours.is_custom:
        return ""
    rows = [dataset[place] for place in range(min(len(dataset), _ROWS))]
    batches = [ours(rows[start : start + rows_at_once]) for start in range(0, len(rows), rows_at_once)]
    pieces = [piece for batch in batches for piece in batch["pieces"]]
    computed = sum(piece.get("around_places", piece["input_ids"]).numel() for piece in pieces)
    padded = sum(batch["padded_positions"] for batch in batches)
    if computed >= padded:
        return ""
    return (
        f"{computed:,} of {padded:,} padded positions computed ({padded / computed:.1f}× fewer) in the first "
        f"{plural(len(rows), 'row')}"
    )


def loss_texts(objective: Objective) -> list[str]:
    """Describe each loss by weight, name, hyperparameters and modifiers, as in `0.5 × simpo, beta=2.0, gamma=None`."""
    texts = []
    for term in objective.terms:
        settings = [f"{name}={value!r}" for name, value in term.hyperparameters.items()]
        settings += ["reference_free=True"] * term.reference_free
        is_soft = "chosen_win_rates" in set(term.spec.optional_inputs).difference(term.absent)
        settings += ["win_rate as soft labels"] * is_soft
        settings += [modifier.setting for modifier in term.modifiers]
        texts.append(", ".join([f"{term.weight:g} × {term.spec.name}", *settings]))
    return texts


def model_text(model: nn.Module, args: PreferenceConfig) -> str:
    """Describe the model: its class, number of trainable parameters, adapter, dtypes, and autocast dtype."""
    name = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    autocast = " under bf16 autocast" if args.bf16 else " under fp16 autocast" if args.fp16 else ""
    return f"{name}, {trained:,} of {total:,} parameters train{_adapter(model)}, {' and '.join(dtypes)}{autocast}"


def _adapter(model: nn.Module) -> str:
    if not isinstance(model, PeftModel):
        return ""
    config = model.active_peft_config
    rank = f" r={config.r}" if hasattr(config, "r") else ""
    return f" ({config.peft_type.value}{rank})"


def batch_text(args: PreferenceConfig, state: TrainerState) -> str:
    """Describe the number of rows per step and the number of steps."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    factors = f"{args.train_batch_size} per device"
    if args.gradient_accumulation_steps > 1:
        factors += f" × {args.gradient_accumulation_steps} accumulated"
    if args.world_size > 1:
        factors += f" × {args.world_size} processes"
    budget = f", pieces of at most {args.max_tokens_per_batch:,} tokens" if args.max_tokens_per_batch else ""
    return f"{per_step} rows a step ({factors}){budget}, {state.max_steps:,} steps"


def optimizer_text(args: PreferenceConfig) -> str:
    """Describe the optimizer, its learning rate and its schedule."""
    name, schedule = (getattr(value, "value", value) for value in (args.optim, args.lr_scheduler_type))
    warmup = f", warm-up {args.warmup_steps:g}" if args.warmup_steps else ""
    return (
        f"{name}, learning rate {args.learning_rate:g} ({schedule}{warmup}), weight decay {args.weight_decay:g}, "
        f"gradients clipped at {args.max_grad_norm:g}"
    )
