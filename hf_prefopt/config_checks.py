"""Settings of the Trainer, accelerate and Liger that a preference step cannot honor: rejected, or put right."""

from typing import Any


def refuse_uneven_batches(settings: Any, world_size: int) -> None:
    """Refuse what would give ranks other rows than the ones that are counted, where there are several.

    Args:
        settings: `TrainingArguments.accelerator_config`.

    Raises:
        ValueError: names the setting and what to do.
    """
    if world_size > 1 and settings.split_batches:
        raise ValueError(
            "accelerator_config.split_batches=True shares a batch out over the ranks, and rows that "
            "repeat at the end of the data would count again: leave it out, and divide per_device_train_batch_size and "
            f"per_device_eval_batch_size by the {world_size} ranks"
        )
    if world_size > 1 and not settings.even_batches:
        raise ValueError(
            "accelerator_config.even_batches=False gives ranks different numbers of batches, and those with more would "
            "wait for the others forever: leave it out; rows that are repeated to even them out do not count"
        )


def without_fused_head(liger_kernel_config: dict[str, bool]) -> dict[str, bool]:
    """Liger's kernels but the one that replaces the model's forward, in which log-probs are computed here.

    Raises:
        ValueError: it is asked for.
    """
    if liger_kernel_config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config={'fused_linear_cross_entropy': True} replaces the model's forward, and the trainer "
            "needs its own, which never holds all logits either: leave it out"
        )
    return {**liger_kernel_config, "fused_linear_cross_entropy": False}
