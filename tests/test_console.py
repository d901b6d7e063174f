"""A user's own script prints and writes the same as the recipes."""

from transformers import ProgressCallback

from hf_prefopt.console import finish_run, use_short_progress
from hf_prefopt.reporting.progress import ShortProgressCallback
from tests.trainers import make_trainer, pairs


def test_a_run_is_finished_with_card_curves_and_report(tmp_path, capsys):
    """The evaluation on start is the column "before", and the last evaluation is the column "after"."""
    trainer = make_trainer(tmp_path, eval_dataset=pairs(3), eval_on_start=True, max_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    capsys.readouterr()
    finish_run(trainer, dataset="someone/pairs", next_steps={"another loss": "--loss_type simpo"})
    shown = capsys.readouterr().out
    assert "Evaluation on 3 held-out examples" in shown and "before" in shown and "0.6931" in shown
    assert f"{tmp_path}/curves.png" in shown and "another loss  --loss_type simpo" in shown
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "someone/pairs" in (tmp_path / "README.md").read_text()


def test_a_run_without_evaluation_has_no_table(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    capsys.readouterr()
    finish_run(trainer)
    shown = capsys.readouterr().out
    assert "curves.png" in shown and "Evaluation" not in shown and f"vllm serve {tmp_path}" in shown


def test_short_progress_replaces_the_trainers_bars_where_there_are_any(tmp_path):
    def kinds(trainer):
        return [type(callback) for callback in trainer.callback_handler.callbacks]

    trainer = make_trainer(tmp_path, disable_tqdm=False)
    use_short_progress(trainer)
    assert ShortProgressCallback in kinds(trainer) and ProgressCallback not in kinds(trainer)
    silent = make_trainer(tmp_path)
    before = kinds(silent)
    use_short_progress(silent)
    assert kinds(silent) == before
