"""`Evaluation` and `TrainingRecord` alone: metrics are means over examples and not over batches."""

import math

import pytest
import torch
from accelerate import Accelerator

from hf_prefopt.kinds import LISTS
from hf_prefopt.objective.build import build_objective
from hf_prefopt.reporting.metrics import Evaluation, TrainingRecord


def batches(objective, sizes, seed=0):
    """Return batches with these numbers of pairs and random log-probs, as (batch, loss inputs)."""
    generator, rows = torch.Generator().manual_seed(seed), iter(range(100))
    names = dict.fromkeys((*objective.inputs, *objective.kind.metric_inputs))
    for size in sizes:
        values = {name: torch.randn(size, generator=generator, dtype=torch.float64) - 10 for name in names}
        yield {"rows": torch.tensor([next(rows) for _ in range(size)])}, values


def expected(inputs):
    """Return DPO's loss and margin at β = 0.1 in closed form: the means of log(1 + e^−z) and of z = 0.1·h."""
    pairs = [
        [values[name][i].item() for name in ("policy_chosen_logps", "ref_chosen_logps")]
        + [values[name][i].item() for name in ("policy_rejected_logps", "ref_rejected_logps")]
        for values in inputs
        for i in range(len(values["policy_chosen_logps"]))
    ]
    margins = [0.1 * ((a - b) - (c - d)) for a, b, c, d in pairs]
    return sum(math.log1p(math.exp(-m)) for m in margins) / len(margins), sum(margins) / len(margins)


def test_the_mean_is_over_the_rows_and_not_over_the_batches():
    """Batches of 3 and 1 pairs: the mean of two batch means would give the last row
    three times the weight of another row.
    """
    objective = build_objective(["dpo"])
    evaluation, seen = Evaluation(objective), list(batches(objective, (3, 1)))
    for batch, inputs in seen:
        evaluation.add(batch, inputs)
    metrics = evaluation.metrics()
    assert (metrics["loss"], metrics["rewards/margins"]) == pytest.approx(expected([i for _, i in seen]), rel=1e-12)


def test_examples_that_do_not_count_are_left_out():
    objective = build_objective(["dpo"])
    (batch, inputs), *_ = batches(objective, (3,))
    evaluation = Evaluation(objective)
    output = evaluation.add({**batch, "counted": torch.tensor([True, False, True])}, inputs)
    kept = {name: values[[0, 2]] for name, values in inputs.items()}
    assert evaluation.metrics()["loss"] == pytest.approx(expected([kept])[0], rel=1e-12)
    assert len(output.losses) == 3  # computed from the batch's own output


def test_an_evaluation_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="evaluation dataset is empty"):
        Evaluation(build_objective(["dpo"])).metrics()


def test_a_row_that_is_not_finite_is_named():
    objective = build_objective(["dpo"])
    (batch, inputs), *_ = batches(objective, (3,))
    inputs["ref_chosen_logps"][1] = math.nan
    evaluation = Evaluation(objective)
    evaluation.add(batch, inputs)
    with pytest.raises(FloatingPointError, match=r"evaluation at step 7: .* row 1 of the dataset.*ref_chosen_logps"):
        evaluation.metrics("evaluation at step 7")


def test_a_training_log_is_of_the_examples_since_the_last_one():
    objective, accelerator = build_objective(["dpo"]), Accelerator(cpu=True)
    record, seen = TrainingRecord(objective), list(batches(objective, (3, 1, 2)))
    for step, (batch, inputs) in enumerate(seen[:2]):
        record.add(step, batch["rows"], inputs, objective(inputs))
    found = record.pop_means(accelerator)["rewards/margins"]
    assert found == pytest.approx(expected([inputs for _, inputs in seen[:2]])[1], rel=1e-6)  # added in fp32
    batch, inputs = seen[2]
    record.add(2, batch["rows"], inputs, objective(inputs))
    assert record.pop_means(accelerator)["rewards/margins"] == pytest.approx(expected([inputs])[1], rel=1e-6)
    assert record.pop_means(accelerator) == {}


def test_a_loss_that_is_not_finite_stops_the_run_at_the_next_check():
    objective, accelerator = build_objective(["dpo"]), Accelerator(cpu=True)
    record = TrainingRecord(objective)
    for step, (batch, inputs) in enumerate(batches(objective, (2, 2))):
        inputs["policy_rejected_logps"][0] += math.inf if step else 0
        record.add(step + 1, batch["rows"], inputs, objective(inputs))
    with pytest.raises(FloatingPointError, match=r"step 2: .* row 2"):
        record.check(accelerator)
    record.check(accelerator)  # logged once


def test_equally_good_responses_are_averaged_in_the_metrics_of_lists():
    """Ranks (1, 1, 3), rewards (1, 3, 2): the mean of the best is 2, the other reward is 2, and a best response is
    first. If all have one rank, with rewards (1, 1, 0), two are tied for the first place, and none is worse.
    """
    inputs = {
        "list_mask": torch.tensor([[True] * 3] * 2),
        "list_ranks": torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 1.0]]),
        "policy_list_logps": torch.tensor([[-4.0, -2.0, -9.0], [-1.0, -2.0, -3.0]]),
    }
    found = LISTS.metrics(torch.tensor([[1.0, 3.0, 2.0], [1.0, 1.0, 0.0]]), inputs)
    assert {name: metric.values.tolist() for name, metric in found.items()} == {
        "logps/best": [-3.0, -2.0],
        "rewards/best": [2.0, pytest.approx(2 / 3)],
        "rewards/accuracies": [1.0, 1.0],
        "rewards/margins": [0.0, pytest.approx(2 / 3)],
    }
    assert found["rewards/margins"].counted.tolist() == [True, False]
    assert LISTS.preferred(torch.zeros(2, 4), inputs).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
