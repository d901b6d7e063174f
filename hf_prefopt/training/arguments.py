"""Check the trainer's arguments before anything is loaded: their types, and whether they contradict each other."""

from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any, cast

from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import TrainingArguments

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.config_names import refuse_foreign_arguments
from hf_prefopt.data.by_length import STRATEGIES
from hf_prefopt.data.mixtures import Mixture
from hf_prefopt.folders import check_folder, refuse_same_folder


def check_types(args: Any, ref_model: Any, peft_config: Any = None, processing_class: Any = None) -> None:
    """Raise `TypeError` if an argument has a type that the trainer does not accept, such as TRL's `DPOConfig`."""
    if isinstance(ref_model, TrainingArguments):
        raise TypeError(f"ref_model is a {type(ref_model).__name__}: pass the configuration by name, args=...")
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
    """Raise `ValueError` if loading options are set but no model is loaded by name.

    Args:
        names: The `model` and `ref_model` arguments.
    """
    if any(isinstance(name, str | Path) for name in names):
        return
    cure = "pass the model by name, or use this option when you load the model and remove it here"
    if quantization_config is not None:
        raise ValueError(f"quantization_config is only used when the model is passed by name: {cure}")
    # The tokenizer is loaded from the folder or repository of the model, with these options.
    read = () if processing_class is not None else ("revision", "trust_remote_code")
    unread = {key: value for key, value in cast(dict, args.model_init_kwargs or {}).items() if key not in read}
    if unread:
        raise ValueError(f"model_init_kwargs={unread} is only used when the model is passed by name: {cure}")


def _check_order(args: PreferenceConfig, train_dataset: Any) -> None:
    """Raise `ValueError` if the settings sort rows by prompt or length but the dataset is a stream."""
    is_stream = (
        train_dataset.is_stream if isinstance(train_dataset, Mixture) else isinstance(train_dataset, IterableDataset)
    )
    if is_stream and args.train_sampling_strategy in STRATEGIES:
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} needs the lengths of all rows, but a stream is "
            "read in its own order: remove the setting, or load the dataset without streaming"
        )
    if args.group_by_prompt and is_stream:
        raise ValueError(
            "group_by_prompt=True needs the prompts of all rows, but a stream is read in its own order: set "
            "group_by_prompt=False, or load the dataset without streaming"
        )


def _type(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def refuse_empty_epoch(dataset: Any, rows: int) -> None:
    """Raise `ValueError` if `dataloader_drop_last` drops all rows of a dataset of known length.

    Args:
        rows: Number of rows in a batch, over all ranks.
    """
    if isinstance(dataset, Sized) and len(dataset) < rows:
        raise ValueError(
            f"dataloader_drop_last=True drops all {len(dataset)} rows of the training data, because a batch over all "
            f"ranks has {rows} rows: set dataloader_drop_last=False, or lower per_device_train_batch_size"
        )


def refuse_missing(needed: Iterable[Any], callbacks: Iterable[Any]) -> None:
    """Raise `ValueError` if the user removed a callback that training needs, such as the one that updates a moving
    reference.

    Args:
        needed: The callbacks that the trainer has added.
        callbacks: The callbacks that the trainer has now.
    """
    present = set(map(id, callbacks))
    missing = [type(callback).__name__ for callback in needed if id(callback) not in present]
    if missing:
        raise ValueError(
            f"the trainer's callbacks {', '.join(missing)} were removed, but training needs them: remove callbacks one "
            "by one with trainer.remove_callback(...)"
        )


def _refuse_data_parallel(gpus: int) -> None:
    """Raise `ValueError` if one process has several GPUs, because the Trainer would use `DataParallel`."""
    if gpus > 1:
        raise ValueError(
            f"{gpus} GPUs in one process (DataParallel) are not supported: start with `accelerate launch`, or make "
            "only one GPU visible (CUDA_VISIBLE_DEVICES=0)"
        )


def check_arguments(
    args: PreferenceConfig,
    model: Any,
    ref_model: Any,
    data_collator: Any,
    train_dataset: Any,
    trainer_arguments: dict[str, Any],
) -> None:
    """Check that the arguments of `PreferenceTrainer` do not contradict each other.

    Args:
        model: The model, or a `model_init` function.
        trainer_arguments: Keyword arguments for `transformers.Trainer`.

    Raises:
        ValueError: an argument is missing or contradicts another one; one process has several GPUs; a model is compiled
            or wrapped for data parallelism; a folder cannot be written; or `output_dir` is the folder of a model.
        TypeError: an argument does not exist.
    """
    refuse_foreign_arguments(trainer_arguments, type(args).__dataclass_fields__, type(args).__name__)
    if model is None:
        raise ValueError("no model: pass model, or model_init, a function that returns a model")
    for name, given in (("model", model), ("ref_model", ref_model)):
        _refuse_wrapped(name, given)
        refuse_same_folder("output_dir", args.output_dir, given, f"the {name}")
    check_folders(args)
    if args.sync_ref_model and ref_model is not None:
        raise ValueError(
            "sync_ref_model=True updates a frozen copy of the trained weights, not a ref_model: remove ref_model"
        )
    if data_collator is not None:
        _check_custom_collator(args)
    if trainer_arguments.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func is never called: decorate the loss with @register_loss and name it in loss_type"
        )
    _check_order(args, train_dataset)
    _refuse_data_parallel(args.n_gpu)


def check_folders(args: PreferenceConfig) -> None:
    """Raise `ValueError` if this rank cannot write to the folders of the run."""
    if args.should_save:
        check_folder("output_dir", args.output_dir)
        if args.reference_cache_dir is not None:
            check_folder("reference_cache_dir", args.reference_cache_dir)


def _check_custom_collator(args: PreferenceConfig) -> None:
    """Raise `ValueError` if a setting is used that a custom `data_collator` does not support."""
    conflicts = (
        (
            args.precompute_ref_log_probs,
            "precompute_ref_log_probs=True needs cache keys, which a custom data_collator does not compute",
        ),
        (
            args.layout != "auto",
            f"layout={args.layout!r} has no effect, because the data_collator chooses its own layout",
        ),
        (
            args.pad_to_multiple_of is not None,
            "pad_to_multiple_of has no effect, because the data_collator does its own padding",
        ),
        (
            args.max_tokens_per_batch is not None,
            "max_tokens_per_batch splits batches between rows, which a custom data_collator does not support",
        ),
    )
    for is_set, problem in conflicts:
        if is_set:
            raise ValueError(f"{problem}: remove one of the two")


def _refuse_wrapped(name: str, model: Any) -> None:
    """Raise `ValueError` if a model is already compiled, or wrapped for data parallelism."""
    if isinstance(model, OptimizedModule):
        raise ValueError(
            f"{name} is wrapped by torch.compile: pass the model itself ({name}._orig_mod), and set torch_compile=True "
            "to compile it"
        )
    for each in (model, model.get_base_model() if isinstance(model, PeftModel) else None):
        # Evaluations, checks and the reference would also call the compiled forward, and each would compile it again.
        if getattr(each, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name} was compiled in place by compile(): pass a model that is not compiled, and set "
                "torch_compile=True to compile it"
            )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{name} is wrapped by {type(model).__name__}: pass the model itself ({name}.module); `accelerate launch` "
            "trains it in several processes"
        )
