"""The closing lines and the short progress lines, as they appear in the terminal."""

import io

from rich.console import Console

from hf_prefopt.reporting.closing import closing_report
from hf_prefopt.reporting.progress import short_line
from hf_prefopt.reporting.results import Results, results_of
from tests.reporting.history import made_up_run


def test_closing_report_keeps_paths_and_commands_whole():
    """A path that is longer than the terminal is not wrapped, because people copy it."""
    long_path = "runs/" + "a" * 120
    out = io.StringIO()
    results, next_steps = {"adapter": long_path}, {"a dataset": "--dataset_name x"}
    closing_report(results_of(made_up_run()), results, next_steps, Console(width=80, file=out))
    text = out.getvalue()
    assert long_path in text and "--dataset_name x" in text and "Next steps" in text
    assert text.index("reward accuracy") < text.index(long_path)


def test_answers_are_side_by_side_and_steer_no_terminal():
    out = io.StringIO()
    answers = [{"prompt": "[bold]What?", "before": "\x1b[31mred", "after": "long " * 200}]
    closing_report(Results(), {}, {}, Console(width=80, file=out), answers)
    text = out.getvalue()
    assert "[bold]What?" in text and "␛[31mred" in text and "\x1b" not in text and " … " in text


def test_closing_report_without_an_evaluation_has_no_table():
    out = io.StringIO()
    closing_report(Results(), {"model": "runs/x"}, {}, Console(file=out))
    assert "Evaluation" not in out.getvalue() and "runs/x" in out.getvalue()
    assert "Next steps" not in out.getvalue()


def test_short_line_of_a_training_record():
    logs = {
        "loss": 0.65124,
        "rewards/accuracies": 0.6,
        "rewards/margins": 0.05,
        "learning_rate": 2e-4,
        "logps/chosen": -9,
        "log_ratios/chosen": -0.0125,
        "tokens_per_second": 1234.5,
    }
    expected = (
        "step 10/40 · loss 0.6512 · accuracy 0.600 · margin +0.0500 · Δ log p -0.013 · lr 2.0e-04 · 1,234 tokens/s"
    )
    assert short_line(logs, 10, 40) == expected


def test_short_line_of_an_evaluation_says_so():
    assert short_line({"eval_loss": 0.6931512}, 0, 40) == "evaluation at step 0/40 · loss 0.6932"


def test_short_line_of_a_record_without_known_numbers_is_empty():
    assert short_line({"train_runtime": 12.0}, 40, 40) == ""
