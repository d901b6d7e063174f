"""Correct the settings of accelerate that would make a training step wrong, or raise an error for them."""

import weakref
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel, PeftType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

# For each model, the mixed precision of the last `PreferenceTrainer` that prepared or used it. The keys are weak
# references.
_PRECISION: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def keep_output_precision(accelerator: Accelerator) -> None:
    """Stop FSDP2 from casting the model's outputs.

    The scoring forward pass returns log-probs in fp32. accelerate's mixed-precision policy would cast them to bf16,
    which rounds a log-prob of 5 nats to multiples of 1/32.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def refuse_first_fsdp(accelerator: Accelerator) -> None:
    """Raise `ValueError` under FSDP version 1, which is accelerate's default.

    FSDP 1 flattens the parameters of a layer into one, but the reference needs separate parameters.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 is not supported: it flattens the parameters of a layer into one, but the reference needs "
            "separate parameters. Set fsdp_version: 2 in accelerate's YAML file, or fsdp_config={'version': 2}"
        )


def check_quantized(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Raise `ValueError` if the engine cannot shard the model's bitsandbytes weights, or would corrupt them by casting.

    4-bit weights are packed bytes, stored as elements of the dtype `bnb_4bit_quant_storage`. FSDP2 shards and saves
    them only if this dtype is a float. DeepSpeed and FSDP2 cast float parameters to the dtype in which they compute;
    the cast corrupts packed weights that are stored in a different float dtype.

    Args:
        precision: Mixed precision of the trainer: "no", "bf16" or "fp16".
    """
    engine = _sharding_engine(accelerator)
    kinds = {type(parameter).__name__: parameter.dtype for parameter in model.parameters()} if engine else {}
    computes_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if engine == "FSDP2" and "Int8Params" in kinds:
        raise ValueError(
            "FSDP2 cannot shard 8-bit weights: load the model in 4 bits with bnb_4bit_quant_storage="
            f"{computes_in or torch.float32}, or use DDP or DeepSpeed"
        )
    storage = kinds.get("Params4bit")
    if storage is None or storage == computes_in or (storage.is_floating_point and computes_in is None):
        return
    if storage.is_floating_point or engine == "FSDP2":
        problem = "would corrupt (by casting)" if storage.is_floating_point else "cannot shard or resume"
        raise ValueError(
            f"{engine} {problem} 4-bit weights with bnb_4bit_quant_storage={storage}: load the model with "
            f"BitsAndBytesConfig(..., bnb_4bit_quant_storage={computes_in or torch.float32})"
        )


def check_adapter(accelerator: Accelerator, model: nn.Module) -> None:
    """Check that an engine that shards weights can save and load the adapters.

    Raises:
        ValueError: the adapter is a soft prompt; or, under FSDP2, layers of the adapter share a buffer, as in VeRA and
            RandLoRA. PEFT computes a soft prompt on one rank when it saves it, and this rank would wait forever for the
            other ranks. PyTorch saves shared buffers, but cannot load them when a run resumes or when the best
            checkpoint is loaded.
    """
    engine = _sharding_engine(accelerator)
    if not isinstance(model, PeftModel) or engine not in ("FSDP2", "ZeRO-3"):
        return
    configs = list(model.peft_config.values())
    soft = [cast(PeftType, config.peft_type).value for config in configs if config.is_prompt_learning]
    if soft:
        raise ValueError(f"{engine} cannot save soft prompts ({', '.join(soft)}): use DDP or ZeRO-2, or LoRA")
    once = dict(model.named_buffers())
    saved = dict(model.named_buffers(remove_duplicate=False)).keys() & model.state_dict().keys()
    if engine == "FSDP2" and (shared := sorted(saved - once.keys())):
        kinds = ", ".join(cast(PeftType, config.peft_type).value for config in configs)
        raise ValueError(
            f"FSDP2 cannot load checkpoints of this adapter ({kinds}), because its layers share buffers "
            f"({shared[0]}, …): use DDP or DeepSpeed, or LoRA"
        )


def make_room(precision: str) -> None:
    """Reset accelerate's shared state if its mixed precision is not `precision`.

    Call this function before creating an accelerator. accelerate keeps one mixed precision for all accelerators of a
    process.
    """
    state = AcceleratorState._shared_state
    if state and state["distributed_type"] != DistributedType.DEEPSPEED and state["_mixed_precision"] != precision:
        AcceleratorState._reset_state()


def forget_other_trainers(model: nn.Module) -> None:
    """Undo the preparation of a model by a trainer of another class. Call it before the model's forward is replaced.

    accelerate marks each model that it has prepared, and does not prepare a marked model again. With a replaced
    forward, such a model would run without autocast.
    """
    if model not in _PRECISION:
        _forget_preparation(model)


def take_over(accelerator: Accelerator, model: nn.Module, precision: str) -> bool:
    """Undo what another trainer has done to a model, so that accelerate can prepare it for this trainer.

    Args:
        precision: Mixed precision of this trainer: "no", "bf16" or "fp16".

    Returns:
        True if the model was prepared in a different precision and must be prepared again.

    Raises:
        ValueError: another trainer has sharded the model, or FSDP2 uses another trainer's precision.
    """
    engine = _sharding_engine(accelerator)
    is_new = model not in _PRECISION or model in map(accelerator.unwrap_model, accelerator._models)
    if engine in ("FSDP2", "ZeRO-3") and not is_new:
        raise ValueError(
            f"another trainer has sharded this model under {engine}: load the model again for each trainer; to "
            "continue training, call first_trainer.save_model(folder) and then from_pretrained(folder)"
        )
    return compute_in(precision, accelerator, model)


def compute_in(precision: str, accelerator: Accelerator, model: nn.Module) -> bool:
    """Set the mixed precision of accelerate and of the model again, because another trainer may have changed them.

    All accelerators of a process share one state. Its precision is that of the trainer that was created last.

    Returns:
        True if the model was prepared in a different precision and must be prepared again.

    Raises:
        ValueError: FSDP2 uses another trainer's precision.
    """
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.mixed_precision != precision:
        raise ValueError(
            f"this trainer has mixed_precision={precision!r}, but a trainer created later has "
            f"{accelerator.state.mixed_precision!r}, and FSDP2 has one precision for all trainers of a process: create "
            "this trainer after the other one has finished, or use the same precision for both"
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.state._mixed_precision = precision
    differs = _PRECISION.get(model, precision) != precision
    _PRECISION[model] = precision
    if differs:
        _forget_preparation(model)
        # The Trainer prepares a model for evaluation only if the accelerator has no prepared model.
        accelerator._models = [known for known in accelerator._models if known is not model]
    return differs


def refuse_other_precision(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Raise `RuntimeError` if another trainer has used the model in a different precision since training began."""
    if compute_in(precision, accelerator, model):
        raise RuntimeError(
            "since training began, another trainer has used this model in a precision other than "
            f"mixed_precision={precision!r}: set the same bf16 and fp16 in both trainers, or pass the other trainer a "
            "copy of the model"
        )


def refuse_early_evaluation(accelerator: Accelerator) -> None:
    """Raise `ValueError` if the model is evaluated before training under an engine that does not support this."""
    if accelerator._models:
        return
    engine = _sharding_engine(accelerator)
    if engine not in ("", "ZeRO-3"):
        raise ValueError(
            f"{engine} cannot evaluate or predict before training: set eval_on_start=True to evaluate first, "
            "or evaluate in one process or under DDP"
        )


def _sharding_engine(accelerator: Accelerator) -> str:
    """Return the name of the engine if it may shard the model; "" for a single process and for DDP."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else ""


def unwrapped_after_evaluation(accelerator: Accelerator, model: nn.Module, wrapped: nn.Module) -> nn.Module:
    """Return the module that training should wrap: the plain model if an evaluation under DDP has prepared it.

    For an evaluation, accelerate prepares a model without DDP's wrapper, and it does not prepare a model twice. Without
    this function, training would then run without the wrapper, which averages gradients, and each rank would train a
    different model.

    Args:
        wrapped: The module that accelerate returned when it last prepared the model.

    Raises:
        ValueError: the engine is DeepSpeed, and the model was already trained or evaluated. The model then still
            belongs to its first DeepSpeed engine, and the Trainer has closed this engine.
    """
    engine = accelerator.distributed_type
    if engine == DistributedType.DEEPSPEED and wrapped is not model:
        raise ValueError(
            "under DeepSpeed, a trainer can train only once, and can evaluate or predict only after training: set "
            "eval_on_start=True to evaluate first, or create a new model and trainer for another train()"
        )
    is_wrapped = any(isinstance(module, DistributedDataParallel) for module in wrapped.modules())
    if is_wrapped or engine in (DistributedType.NO, DistributedType.FSDP, DistributedType.DEEPSPEED):
        return wrapped
    _forget_preparation(model)
    return model


def _forget_preparation(model: nn.Module) -> None:
    vars(model).pop("_is_accelerate_prepared", None)
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")


def accept_model(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Check that the engine supports the model, and undo its preparation by a trainer of another class.

    Raises:
        ValueError: see `check_quantized` and `check_adapter`.
    """
    check_quantized(accelerator, model, precision)
    check_adapter(accelerator, model)
    forget_other_trainers(model)


def begin_training(accelerator: Accelerator, model: nn.Module, wrapped: nn.Module, precision: str) -> nn.Module:
    """Return the module that training should wrap, after another trainer or an evaluation may have used the model.

    Args:
        wrapped: The module that accelerate returned when it last prepared the model.

    Raises:
        ValueError: see `take_over` and `unwrapped_after_evaluation`.
    """
    if take_over(accelerator, model, precision):
        wrapped = model
    return unwrapped_after_evaluation(accelerator, model, wrapped)


def begin_evaluation(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Make a model ready for an evaluation, even before training or after another trainer has used the model.

    Raises:
        ValueError: the engine cannot evaluate before training; see also `take_over`.
    """
    refuse_early_evaluation(accelerator)
    take_over(accelerator, model, precision)
    keep_output_precision(accelerator)
