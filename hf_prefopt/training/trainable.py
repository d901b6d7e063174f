"""Which parameters of the policy train: a run in which none would, or an optimizer that holds others, is refused."""

import logging

from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import Optimizer

from hf_prefopt.scoring.four_bits import refuse_packed

logger = logging.getLogger(__name__)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train and act, by name: those of an adapter that is switched off or merged do not act."""
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
    """Refuse a policy of which nothing trains, if it is to train, and an optimizer of other parameters.

    Raises:
        ValueError: see `refuse_frozen` and `refuse_stale_optimizer`.
    """
    if trains:
        refuse_frozen(model)
    if not isinstance(optimizer, AcceleratedOptimizer):  # that of an earlier train()
        refuse_stale_optimizer(model, optimizer)


def refuse_another_model(model: nn.Module, prepared: nn.Module) -> None:
    """Raise `ValueError` if `trainer.model` was replaced: the model that was prepared would be scored, and not train.

    Args:
        prepared: what the trainer was made with.
    """
    if model is not prepared:
        raise ValueError("trainer.model was replaced after the trainer was made: make a new trainer of the new model")


def refuse_frozen(model: nn.Module) -> None:
    """Refuse to train a policy of which nothing trains, or whose weights let no gradient through.

    Raises:
        ValueError: no parameter that acts requires a gradient, or 4-bit weights are packed for inference.
    """
    if trained_parameters(model):
        refuse_packed(model)
        return
    cure = (
        "an adapter is loaded to be trained by PeftModel.from_pretrained(base, folder, is_trainable=True), or by its "
        "folder's name as model; one that is not active or merged by model.set_adapter(name), model.unmerge_adapter()"
        if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
        else "pass a peft_config, or let parameters train: model.requires_grad_(True)"
    )
    raise ValueError(f"no parameter of the policy ({type(model).__name__}) trains: {cure}")


def refuse_stale_optimizer(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Refuse an optimizer that was made for other parameters than those that train; one over a part of them is fine.

    Raises:
        ValueError: it holds none of them, or misses some and holds parameters that do not train or are not the model's.
    """
    if optimizer is None:
        return
    trained = trained_parameters(model)
    ids = {id(parameter) for parameter in trained.values()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if len(missing) == len(trained) or (missing and held - ids):
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} misses {len(missing)} of the {len(trained)} parameters that "
            f"train ({missing[0]}, …) and holds {len(held - ids)} that do not train: make it of the policy as it is "
            "trained, get_peft_model(model, peft_config) in place of peft_config, or leave it out"
        )
    if missing:
        logger.warning(
            "optimizers: %d of %d parameters that train are not in the optimizer", len(missing), len(trained)
        )
