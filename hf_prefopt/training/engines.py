"""What accelerate would get wrong for a preference step is refused, or put right before it prepares the model."""

from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel


def keep_output_precision(accelerator: Accelerator) -> None:
    """Make FSDP2 return what a model returns.

    The output of a scoring forward is log-probs in fp32. accelerate's policy for mixed precision casts outputs to bf16,
    which rounds a log-prob of 5 nats to steps of 1/32.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def release_from_evaluation(trainer: Any) -> None:
    """Undo what an evaluation before training has done to the model of a `Trainer`, under DDP.

    accelerate prepares a model for evaluation without the wrapper that averages gradients, and does not prepare a model
    twice. Training would then run without the wrapper, and each rank would train a model of its own.

    Raises:
        ValueError: under DeepSpeed, where a model stays in the engine of its first training or evaluation, which the
            Trainer closes.
    """
    accelerator, model, prepared = trainer.accelerator, trainer.model, trainer.model_wrapped
    engine = accelerator.distributed_type
    if prepared is None:  # a search, whose trials make their models later
        return
    if engine == DistributedType.DEEPSPEED and prepared is not model and trainer.model_init is None:
        raise ValueError(
            "under DeepSpeed a trainer trains once, and evaluates or predicts only after that: set eval_on_start=True "
            "to evaluate first, or make a new model and trainer for another train()"
        )
    is_wrapped = any(isinstance(module, DistributedDataParallel) for module in prepared.modules())
    if is_wrapped or engine in (DistributedType.NO, DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    vars(model).pop("_is_accelerate_prepared", None)
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")
    trainer.model_wrapped = model
