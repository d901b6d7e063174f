"""What accelerate would get wrong for a preference step: corrected before it prepares the model, or an error."""

import weakref
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

# The mixed precision in which a trainer of ours has prepared or used a model last. It keeps no model alive.
_PRECISION: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def keep_output_precision(accelerator: Accelerator) -> None:
    """Make FSDP2 return what a model returns.

    The output of a scoring forward is log-probs in fp32. accelerate's policy for mixed precision casts outputs to bf16,
    which rounds a log-prob of 5 nats to steps of 1/32.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def refuse_first_fsdp(accelerator: Accelerator) -> None:
    """Raise `ValueError` under FSDP of the first version, accelerate's default, whose shards are flat parameters."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP of version 1 joins the parameters of a layer into one, and a frozen copy of what trains, or a model "
            "of its own as reference, needs them apart: set fsdp_version: 2 in accelerate's YAML file, or "
            "fsdp_config={'version': 2}"
        )


def check_quantized(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Raise `ValueError` for bitsandbytes' weights that an engine cannot share out, or would round as numbers.

    4-bit weights are bytes that `bnb_4bit_quant_storage` shows as elements of a dtype. FSDP2 shards and saves them only
    as floats. What casts floats to the dtype that it computes in, as DeepSpeed and FSDP2 do, destroys them in another.

    Args:
        precision: the trainer's, "no", "bf16" or "fp16".
    """
    engine = _sharding_engine(accelerator)
    kinds = {type(parameter).__name__: parameter.dtype for parameter in model.parameters()} if engine else {}
    computes_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if engine == "FSDP2" and "Int8Params" in kinds:
        raise ValueError(
            "FSDP2 cannot share out weights in 8 bits: load the model in 4 bits with bnb_4bit_quant_storage="
            f"{computes_in or torch.float32}, or take DDP or DeepSpeed"
        )
    storage = kinds.get("Params4bit")
    if storage is None or storage == computes_in or (storage.is_floating_point and computes_in is None):
        return
    if storage.is_floating_point or engine == "FSDP2":
        problem = "would round the bytes of" if storage.is_floating_point else "does not share out or resume"
        raise ValueError(
            f"{engine} {problem} 4-bit weights with bnb_4bit_quant_storage={storage}: load the model with "
            f"BitsAndBytesConfig(..., bnb_4bit_quant_storage={computes_in or torch.float32})"
        )


def check_adapter(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise `ValueError` for soft prompts under FSDP2: PEFT reads them on one rank, which waits for the others."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    soft = [config.peft_type.value for config in configs if config.is_prompt_learning]
    if soft and _sharding_engine(accelerator) == "FSDP2":
        raise ValueError(f"FSDP2 cannot save soft prompts ({', '.join(soft)}): use DDP, or LoRA")


def make_room(precision: str) -> None:
    """Let the next accelerator have this precision; call it before the accelerator is made.

    accelerate keeps one for all accelerators of a process, and takes it over from the configuration that was made last.
    """
    state = AcceleratorState._shared_state
    if state and state["distributed_type"] != DistributedType.DEEPSPEED and state["_mixed_precision"] != precision:
        AcceleratorState._reset_state()


def forget_other_trainers(model: nn.Module) -> None:
    """Undo what the accelerator of a trainer that is none of ours has done to a model, before its forward is replaced.

    accelerate marks a model that it has prepared and does not prepare it again: it would run without autocast.
    """
    if model not in _PRECISION:
        _forget_preparation(model)


def take_over(accelerator: Accelerator, model: nn.Module, precision: str) -> bool:
    """Have a model, which another trainer may have used, ready to be prepared for this one.

    Args:
        precision: the trainer's, "no", "bf16" or "fp16".

    Returns:
        Whether the model was prepared in another precision, and has to be prepared again.

    Raises:
        ValueError: the model is in the shards of another trainer, or FSDP2 has another trainer's precision.
    """
    engine = _sharding_engine(accelerator)
    is_new = model not in _PRECISION or model in map(accelerator.unwrap_model, accelerator._models)
    if engine in ("FSDP2", "ZeRO-3") and not is_new:
        raise ValueError(
            f"another trainer has used this model under {engine}, and it is in that trainer's shards: load the model "
            "anew for each trainer, from_pretrained(folder) after first_trainer.save_model(folder) to go on with it"
        )
    return compute_in(precision, accelerator, model)


def compute_in(precision: str, accelerator: Accelerator, model: nn.Module) -> bool:
    """Have accelerate compute in a precision, and the model, which otherwise keeps the autocast of another trainer.

    accelerate's state, which all accelerators of a process share, has the precision of the trainer that was made last.

    Returns:
        Whether the model was prepared in another precision, and has to be prepared again.

    Raises:
        ValueError: FSDP2 has another trainer's precision.
    """
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.mixed_precision != precision:
        raise ValueError(
            f"this trainer has mixed_precision={precision!r} and one that was made after it has "
            f"{accelerator.state.mixed_precision!r}, and FSDP2 has one precision for all trainers of a process: make "
            "this trainer after the other has done its work, or give both the same"
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.state._mixed_precision = precision
    differs = _PRECISION.get(model, precision) != precision
    _PRECISION[model] = precision
    if differs:
        _forget_preparation(model)
        # An evaluation prepares the model only if the accelerator has none.
        accelerator._models = [known for known in accelerator._models if known is not model]
    return differs


def refuse_other_precision(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Raise `RuntimeError` if another trainer has used the model in another precision since training began."""
    if compute_in(precision, accelerator, model):
        raise RuntimeError(
            f"another trainer has used this model in another precision than mixed_precision={precision!r} since "
            "training began: give both trainers the same bf16 and fp16, or the other one a copy of the model"
        )


def refuse_early_evaluation(accelerator: Accelerator) -> None:
    """Raise `ValueError` if an evaluation would come before training under an engine that cannot evaluate then."""
    if accelerator._models:
        return
    engine = _sharding_engine(accelerator)
    if engine not in ("", "ZeRO-3"):
        raise ValueError(
            f"{engine} does not evaluate or predict before it has trained: set eval_on_start=True to evaluate first, "
            "or evaluate without it, in one process or under DDP"
        )


def _sharding_engine(accelerator: Accelerator) -> str:
    """The name of an engine that shares anything out; "" for one process and DDP."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else ""


def unwrapped_after_evaluation(accelerator: Accelerator, model: nn.Module, wrapped: nn.Module) -> nn.Module:
    """The module that training should wrap: the model itself, where an evaluation under DDP has prepared it.

    accelerate prepares a model for evaluation without the wrapper that averages gradients, and does not prepare a model
    twice. Training would then run without the wrapper, and each rank would train a model of its own.

    Args:
        wrapped: the model as it was prepared last.

    Raises:
        ValueError: under DeepSpeed, where a model stays in the engine of its first training or evaluation, which the
            Trainer closes.
    """
    engine = accelerator.distributed_type
    if engine == DistributedType.DEEPSPEED and wrapped is not model:
        raise ValueError(
            "under DeepSpeed a trainer trains once, and evaluates or predicts only after that: set eval_on_start=True "
            "to evaluate first, or make a new model and trainer for another train()"
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
