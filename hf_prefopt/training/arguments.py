"""Checks of a trainer's arguments before anything is loaded: their types, the data, and what contradicts itself."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from peft import PeftConfig
from transformers import TrainingArguments

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.config_names import refuse_foreign_arguments
from hf_prefopt.data.by_length import STRATEGIES
from hf_prefopt.data.mixtures import Mixture


def check_types(args: Any, ref_model: Any, peft_config: Any = None, processing_class: Any = None) -> None:
    """Raise `TypeError` where an argument is of another type than the trainer takes, such as another configuration."""
    if isinstance(ref_model, TrainingArguments):
        raise TypeError(f"ref_model is a {type(ref_model).__name__}, by its place: pass it by name, args=...")
    if not isinstance(args, PreferenceConfig | None):
        raise TypeError(
            f"args is a {_type(args)}: PreferenceTrainer takes a PreferenceConfig, which has all fields of "
            "TrainingArguments and most fields of TRL's DPOConfig"
        )
    if not isinstance(peft_config, PeftConfig | None):
        raise TypeError(f"peft_config is a {_type(peft_config)}: pass one PEFT configuration, as in LoraConfig(...)")
    if isinstance(processing_class, str | Path):
        raise TypeError(f"processing_class is a {_type(processing_class)}: load it, AutoTokenizer.from_pretrained(...)")


def check_loading(
    args: PreferenceConfig, names: tuple[Any, ...], quantization_config: Any, processing_class: Any
) -> None:
    """Raise `ValueError` if nothing is loaded with what says how to load a model.

    Args:
        names: the policy and the reference as they were passed.
    """
    if any(isinstance(name, str | Path) for name in names):
        return
    cure = "pass the model by its name, or load it so and leave this out"
    if quantization_config is not None:
        raise ValueError(f"quantization_config is only used when the model is given by name: {cure}")
    # The tokenizer of a model is looked for where the model came from.
    read = () if processing_class is not None else ("revision", "trust_remote_code")
    unread = {key: value for key, value in (args.model_init_kwargs or {}).items() if key not in read}
    if unread:
        raise ValueError(f"model_init_kwargs={unread} is only used when the model is given by name: {cure}")


def check_order(args: PreferenceConfig, train_dataset: Any) -> None:
    """Raise `ValueError` if the rows of a stream, which come as they come, are to be drawn by prompt or length."""
    is_stream = (
        train_dataset.is_stream if isinstance(train_dataset, Mixture) else isinstance(train_dataset, IterableDataset)
    )
    if is_stream and args.train_sampling_strategy in STRATEGIES:
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} draws rows by the lengths of the whole data "
            "set, and a stream gives them in its own order: leave it out, or load the data set without streaming"
        )
    if args.group_by_prompt and is_stream:
        raise ValueError(
            "group_by_prompt=True draws rows from the whole data set, and a stream gives them in its own order: set it "
            "to False, or load the data set without streaming"
        )


def _type(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def refuse_empty_epoch(dataset: Any, rows: int) -> None:
    """Raise `ValueError` where `dataloader_drop_last` leaves no batch of a data set of known length.

    Args:
        rows: of a batch of all ranks.
    """
    if isinstance(dataset, Sized) and len(dataset) < rows:
        raise ValueError(
            f"dataloader_drop_last=True drops all {len(dataset)} rows of the training data, because a batch of all "
            f"ranks has {rows}: leave it out, or make per_device_train_batch_size smaller"
        )


def refuse_data_parallel(gpus: int) -> None:
    """Raise `ValueError` if one process would share batches among several GPUs."""
    if gpus > 1:
        raise ValueError(
            f"{gpus} GPUs in one process (DataParallel) are not supported: start with `accelerate launch`, or show "
            "this process one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def check_arguments(
    args: PreferenceConfig, model: Any, ref_model: Any, data_collator: Any, trainer_arguments: dict[str, Any]
) -> None:
    """Refuse arguments of `PreferenceTrainer` that have no meaning together.

    Args:
        model: the model or a `model_init`.
        trainer_arguments: those that are `transformers.Trainer`'s.

    Raises:
        ValueError: it names the argument and what to do.
        TypeError: the same, of an argument that there is not.
    """
    refuse_foreign_arguments(trainer_arguments, type(args).__dataclass_fields__, type(args).__name__)
    if model is None:
        raise ValueError("no model: pass model, or model_init, a function that makes one")
    if args.sync_ref_model and ref_model is not None:
        raise ValueError("sync_ref_model=True moves a frozen copy of what trains, not a ref_model: leave it out")
    if args.precompute_ref_log_probs and data_collator is not None:
        raise ValueError("precompute_ref_log_probs=True finds responses by keys that a data_collator does not give")
    if args.layout != "auto" and data_collator is not None:
        raise ValueError(f"layout={args.layout!r} is not used: the data_collator lays out its batches; leave it out")
    if args.pad_to_multiple_of is not None and data_collator is not None:
        raise ValueError("pad_to_multiple_of is not used: the data_collator lays out its batches; leave it out")
    if args.max_tokens_per_batch is not None and data_collator is not None:
        raise ValueError(
            "max_tokens_per_batch cuts batches between rows, which a data_collator of your own does not allow: leave "
            "one of them out"
        )
    if trainer_arguments.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func is never called: decorate the loss with @register_loss and name it in loss_type"
        )
