"""Find the policy's trained parameters, and raise an error if there are none or if the optimizer has others."""

import logging
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_prefopt.scoring.four_bits import refuse_packed

logger = logging.getLogger(__name__)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters, keyed by name. Those of disabled, inactive or merged adapters are not included."""
    idle = set(model.peft_config) - set(model.active_adapters) if isinstance(model, PeftModel) else set()
    merged = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and (module.merged or module.disable_adapters)
    )
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not idle & set(name.split(".")) and not name.startswith(merged)
    }


def check_trainable(model: nn.Module, optimizer: Optimizer | None, trains: bool = True) -> None:
    """Check that the policy has trained parameters (if `trains`) and that the optimizer has these parameters.

    Raises:
        ValueError: see `refuse_frozen` and `refuse_stale_optimizer`.
    """
    if trains:
        refuse_frozen(model)
    if not isinstance(optimizer, AcceleratedOptimizer):  # an accelerated optimizer is from an earlier train()
        refuse_stale_optimizer(model, optimizer)


def refuse_another_model(model: nn.Module, prepared: nn.Module) -> None:
    """Raise `ValueError` if `trainer.model` was replaced.

    Without this check, the old model would be scored and the new one trained.

    Args:
        prepared: The model with which the trainer was created.
    """
    if model is not prepared:
        raise ValueError("trainer.model was replaced after construction: create a new trainer with the new model")


def refuse_frozen(model: nn.Module) -> None:
    """Check that the policy can be trained.

    Raises:
        ValueError: no active parameter requires a gradient, or 4-bit weights are packed for inference.
    """
    if trained_parameters(model):
        refuse_packed(model)
        return
    cure = (
        "load the adapter with PeftModel.from_pretrained(base, folder, is_trainable=True), or pass its folder as "
        "model; activate an inactive adapter with model.set_adapter(name), and unmerge a merged adapter with "
        "model.unmerge_adapter()"
        if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
        else "pass a peft_config, or make parameters trainable: model.requires_grad_(True)"
    )
    raise ValueError(f"no parameter of the policy ({type(model).__name__}) is trained: {cure}")


def refuse_foreign_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise `ValueError` if the optimizer has none of the trained parameters, so that no step would change the model.

    Such an optimizer may come from an overridden `create_optimizer`. The Trainer's layer-wise optimizers, which keep
    one optimizer per parameter, are not checked.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    is_dummy = isinstance(getattr(optimizer, "optimizer", optimizer), LayerWiseDummyOptimizer)
    if not is_dummy and not any(id(parameter) in held for parameter in trained_parameters(model).values()):
        raise ValueError(
            "the optimizer has none of the trained parameters, so no step would change the model: create it with the "
            "parameters of trainer.model (create_optimizer), after adapters were added"
        )


def refuse_stale_optimizer(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Check that the optimizer was created for the trained parameters. It may have only some of them.

    Raises:
        ValueError: the optimizer has none of the trained parameters; or it lacks some of them and has parameters that
            are not trained.
    """
    if optimizer is None:
        return
    trained = trained_parameters(model)
    ids = {id(parameter) for parameter in trained.values()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if len(missing) == len(trained) or (missing and held - ids):
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} lacks {len(missing)} of the {len(trained)} trained parameters "
            f"({missing[0]}, …) and has {len(held - ids)} parameters that are not trained: remove the optimizer, or "
            "create it after the adapter (call get_peft_model(model, peft_config) yourself instead of passing "
            "peft_config)"
        )
    if missing:
        logger.warning("optimizers: %d of %d trained parameters are not in the optimizer", len(missing), len(trained))
