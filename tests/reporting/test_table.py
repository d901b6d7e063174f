"""The results before and after training, as a table in the terminal."""

import io

import pytest
from rich.console import Console

from hf_prefopt.reporting.intervals import Accuracy
from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.results import LONGER, UNTRAINED, Results, baselines, evaluated_sets, results_of
from hf_prefopt.reporting.table import evaluation_table
from tests.reporting.history import made_up_run


def render(results: Results) -> str:
    out = io.StringIO()
    Console(width=120, file=out).print(evaluation_table(results))
    return out.getvalue()


def test_both_evaluations_intervals_and_baselines_are_shown():
    text = render(results_of(made_up_run()))
    assert "0.6930" in text and "0.5930" in text and "Evaluation on 6 held-out examples" in text
    assert "0.500 [0.200, 0.800]" in text and "0.833 [0.400, 0.970]" in text
    assert LONGER in text and UNTRAINED in text and "3 prompts count, not 6 examples" in text


def test_baselines_are_counted_by_hand():
    """Lengths 10 … 15 compared with 12.5: right from row 3 on. The reference is right in even rows."""
    found = baselines(made_up_run().examples)
    assert (found[LONGER].value, found[UNTRAINED].value) == (0.5, 0.5)
    assert (found[LONGER].examples, found[LONGER].prompts) == (6, 3)


def test_the_model_is_compared_with_a_rule_where_they_disagree():
    """Length is right in rows 3, 4, 5, and the model in all rows but row 5, so the
    model is right in 3 of 4 disagreements: rows 0, 1, 2 and 5, of three prompts. The
    reference is right in the even rows, so they disagree in rows 1 and 3.
    """
    results = results_of(made_up_run())
    found = results.disagreements
    assert (found[LONGER].value, found[LONGER].examples, found[LONGER].prompts) == (0.75, 4, 3)
    assert (found[UNTRAINED].value, found[UNTRAINED].examples) == (1.0, 2)
    for verdict in results.verdicts():
        assert verdict.startswith("Not clearly better than") and verdict in " ".join(render(results).split())


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [(40, 10, "Better than"), (10, 40, "Worse than"), (25, 25, "Not clearly better than"), (0, 0, "they agree on")],
)
def test_a_verdict_needs_an_interval_on_one_side_of_one_half(right, wrong, said):
    """Wilson's interval of 40 in 50 is [0.67, 0.89]. In ten more examples, both are right."""
    margins = [1.0] * right + [-1.0] * wrong + [1.0] * 10
    longer = [-1.0] * right + [1.0] * wrong + [1.0] * 10
    base = {"set": "eval", "reference_margin": None}
    examples = [
        {**base, "prompt": at, "margin": margin, "lengths": [10.0 + by, 10.0]}
        for at, (margin, by) in enumerate(zip(margins, longer, strict=True))
    ]
    (verdict,) = results_of(RunRecord(examples=examples)).verdicts()
    assert said in verdict and (right == 0 or f"the {right + wrong} examples" in verdict)


def test_an_evaluation_before_training_is_not_one_of_the_trained_model():
    record = made_up_run()
    record.logs = [log for log in record.logs if "eval_loss" not in log or log["step"] == 0]
    results = results_of(record)
    assert results.after is None and results.before is not None and not results.accuracies


def test_an_evaluation_before_the_last_step_is_named_by_its_step():
    results = results_of(made_up_run(steps=30))
    assert [name for name, _ in results.columns] == ["before", "step 20"]
    assert dict(results.rows())["reward accuracy"][-1] == "0.833 [0.400, 0.970]"


def test_without_a_reference_there_is_no_baseline_of_it():
    examples = [{**entry, "reference_margin": None} for entry in made_up_run().examples]
    assert list(baselines(examples)) == [LONGER]


def test_an_unknown_number_of_examples_leaves_the_interval_out():
    after = {"rewards/accuracies": 0.69, "gsm8k/exact_match": 0.05, "gsm8k/problems": 200}
    text = render(Results(None, after))
    assert "Evaluation on held-out examples" in text and "0.690 " in text and "0.690 [" not in text
    assert "0.050 [0.027, 0.090]" in text and "before" not in text


def test_a_metric_that_only_the_later_evaluation_has_is_shown_with_its_own_sample_size():
    text = render(Results({}, {"gsm8k/exact_match": 0.05, "gsm8k/problems": 200}, examples=96))
    assert "–" in text and "0.050 [0.027, 0.090]" in text


def test_the_log_ratio_accuracy_is_left_out_where_it_is_that_of_the_rewards():
    both = {"rewards/accuracies": 0.6, "log_ratios/accuracies": 0.6}
    assert [label for label, _ in Results(None, both).rows()] == ["reward accuracy"]
    differs = Results(None, {**both, "log_ratios/accuracies": 0.7}, {"after": Accuracy(0.6, 0.5, 0.7, 9, 9)})
    rows = dict(differs.rows())
    assert rows["reward accuracy"] == ["0.600 [0.500, 0.700]"] and rows["log-ratio accuracy"] == ["0.700"]


def test_several_evaluation_sets_have_their_own_results():
    logs = [{"step": 3, "eval_a_loss": 0.5}, {"step": 3, "eval_b_loss": 0.25, "eval_b_runtime": 3.0}]
    record = RunRecord({"sets": ["eval_a", "eval_b"]}, logs)
    assert [results_of(record, name).after for name in evaluated_sets(record)] == [{"loss": 0.5}, {"loss": 0.25}]


@pytest.mark.parametrize("value", [-0.0, 0.0])
def test_a_zero_has_no_minus(value):
    assert dict(Results(None, {"rewards/margins": value}).rows())["reward margin"] == ["+0.0000"]
