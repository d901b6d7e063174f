"""What accelerate would get wrong for a preference step: corrected before it prepares the model, or an error."""

from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
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
    vars(model).pop("_is_accelerate_prepared", None)
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")
    return model
