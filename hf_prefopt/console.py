"""What a run shows in the terminal and leaves beside the model: short progress lines, and a report at its end."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from transformers import ProgressCallback

from hf_prefopt.recording import record_run
from hf_prefopt.reporting.closing import closing_report
from hf_prefopt.reporting.plots import plot_training
from hf_prefopt.reporting.progress import ShortProgressCallback
from hf_prefopt.reporting.record import FILE as RECORD
from hf_prefopt.reporting.record import write_record
from hf_prefopt.reporting.report_page import write_report
from hf_prefopt.reporting.results import evaluated_sets, results_of
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
    """Write what is known of a run into `output_dir`, push if `push_to_hub` is set, and print a summary.

    Written are the record of the run, the report made of it (a page for the browser), the model card, and the training
    curves, which need matplotlib and are left out without it. Add `recording.BeforeAndAfter(trainer)` to the trainer's
    callbacks before training to have answers from before and after it in all of them.

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
    args = trainer.args
    folder, is_first = Path(args.output_dir), trainer.is_world_process_zero()
    record = record_run(trainer, trainer.card_facts(dataset=dataset))
    trainer.run_record = record
    results = {"trained model": folder, "model card": folder / "README.md"}
    page = folder / "report.html"
    if is_first:
        # Both have texts of the data, which are not pushed: those of an earlier run go, and new ones come afterwards.
        for path in (page, folder / RECORD):
            path.unlink(missing_ok=True)
        if find_spec("matplotlib"):
            results["training curves"] = plot_training(record, folder / "curves.png")
    trainer.create_model_card(dataset=dataset)
    if args.push_to_hub:
        trainer.push_to_hub(dataset=dataset)
    if is_first:
        write_record(record, folder)
        results["report"] = write_report(record, page)
        evaluated = results_of(record, evaluated_sets(record)[0])
        steps = {**serving_steps(trainer), **(next_steps or {})}
        closing_report(evaluated, results, steps, answers=record.answers)
