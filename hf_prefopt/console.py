"""What a run shows in the terminal and leaves beside the model: short progress lines, and a report at its end."""

from collections.abc import Mapping
from pathlib import Path

from transformers import ProgressCallback

from hf_prefopt.reporting.closing import closing_report
from hf_prefopt.reporting.plots import plot_training
from hf_prefopt.reporting.progress import ShortProgressCallback
from hf_prefopt.reporting.run_facts import first_evaluation, last_evaluation
from hf_prefopt.trainer import PreferenceTrainer


def use_short_progress(trainer: PreferenceTrainer) -> None:
    """Show five numbers a line in place of whole log records; nothing changes where progress bars are switched off."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgressCallback)


def finish_run(
    trainer: PreferenceTrainer,
    dataset: str | list[str] | None = None,
    next_steps: Mapping[str, str] | None = None,
) -> None:
    """Write the model card and the training curves into `output_dir`, push if `push_to_hub` is set, and print a report.

    Call it on every rank, after `trainer.save_model()`.

    Example:
        ```python
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        finish_run(trainer, dataset="trl-lib/ultrafeedback_binarized")
        ```

    Args:
        dataset: the name or names of the data, for the card.
        next_steps: what the report suggests, a command by purpose, as in `{"another loss": "--loss_type simpo"}`.
    """
    args, history = trainer.args, trainer.state.log_history
    folder, is_first = Path(args.output_dir), trainer.is_world_process_zero()
    trainer.create_model_card(dataset=dataset)
    if is_first:
        curves = plot_training(history, folder / "curves.png", title=f"{' + '.join(args.loss_type)} → {folder}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset=dataset)
    if is_first:
        evaluated = trainer.eval_dataset
        closing_report(
            before=first_evaluation(history),
            after=last_evaluation(history) or None,
            pairs=len(evaluated) if hasattr(evaluated, "__len__") and not isinstance(evaluated, dict) else 0,
            results={"trained model": folder, "model card": folder / "README.md", "training curves": curves},
            next_steps=next_steps or {},
        )
