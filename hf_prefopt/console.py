"""Show short progress lines during a run, and write its results and print a report at its end."""

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
    """Show short progress lines instead of complete log records. Call this function before `trainer.train()`.

    Args:
        trainer: The trainer. If it shows no progress bars (`disable_tqdm`), its output does not change.
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgressCallback)


def finish_run(
    trainer: PreferenceTrainer,
    dataset: str | list[str] | None = None,
    next_steps: Mapping[str, str] | None = None,
) -> None:
    """Write the results of a run to `output_dir`, push them if `push_to_hub` is set, and print a summary.

    The files are the record of the run, the report (an HTML page), the model card and, if matplotlib is installed, the
    training curves. To include answers from before and after training, add `recording.BeforeAndAfter(trainer)` to the
    trainer's callbacks before training.

    Call `finish_run` on every rank, after `trainer.save_model()`.

    Example:
        ```python
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        finish_run(trainer, dataset="trl-lib/ultrafeedback_binarized")
        ```

    Args:
        trainer: The trainer, after training.
        dataset: Names of the datasets, for the model card.
        next_steps: Further commands that the summary suggests, keyed by purpose, such as
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
        # Report and record contain texts from the data. They are removed, so that they are not pushed with the folder.
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
