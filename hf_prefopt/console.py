"""What a run shows in the terminal and leaves beside the model: short progress lines, and a report at its end."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset
from transformers import ProgressCallback

from hf_prefopt.reporting.closing import closing_report
from hf_prefopt.reporting.plots import plot_training
from hf_prefopt.reporting.progress import ShortProgressCallback
from hf_prefopt.reporting.run_facts import first_evaluation, last_evaluation
from hf_prefopt.serving.steps import keep_rows_of, serving_steps
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

    The curves need matplotlib, and are left out without it.

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
        next_steps: what the report suggests beside talking to the model and serving it, a command by purpose, as in
            `{"another loss": "--loss_type simpo"}`.
    """
    keep_rows_of(trainer)
    next_steps = {**serving_steps(trainer), **(next_steps or {})}
    args, history = trainer.args, trainer.state.log_history
    folder, is_first = Path(args.output_dir), trainer.is_world_process_zero()
    trainer.create_model_card(dataset=dataset)
    results = {"trained model": folder, "model card": folder / "README.md"}
    if is_first and find_spec("matplotlib"):
        title = f"{' + '.join(args.loss_type)} → {folder}"
        results["training curves"] = plot_training(history, folder / "curves.png", title=title)
    if args.push_to_hub:
        trainer.push_to_hub(dataset=dataset)
    if is_first:
        evaluated = trainer.eval_dataset
        closing_report(
            before=first_evaluation(history),
            after=last_evaluation(history) or None,
            examples=len(evaluated) if isinstance(evaluated, Dataset) else None,
            results=results,
            next_steps=next_steps,
        )
