"""What is passed to the trainer, looked at first: what contradicts itself or would be ignored is refused."""

from typing import Any

from hf_prefopt.config import PreferenceConfig


def check_arguments(
    args: PreferenceConfig, model: Any, ref_model: Any, data_collator: Any, of_the_trainer: dict[str, Any]
) -> None:
    """Refuse arguments of `PreferenceTrainer` that have no meaning together.

    Args:
        of_the_trainer: those that are `transformers.Trainer`'s.

    Raises:
        ValueError: it names the argument and what to do.
    """
    if model is None and of_the_trainer.get("model_init") is None:
        raise ValueError("PreferenceTrainer wants a model, or a model_init that makes one")
    if args.sync_ref_model and ref_model is not None:
        raise ValueError("sync_ref_model=True moves a frozen copy of what trains, not a ref_model: leave it out")
    if args.precompute_ref_log_probs and data_collator is not None:
        raise ValueError("precompute_ref_log_probs=True finds responses by keys that a data_collator does not give")
    if of_the_trainer.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func is never called: decorate the loss with @register_loss and name it in loss_type"
        )
