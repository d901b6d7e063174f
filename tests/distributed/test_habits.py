"""Common uses of a trainer under each engine, in fp32 and bf16: the results of one process, or a clear error.

In fp32, only the order of sums differs, as in `test_engines`. The log-probs of a
loss are about 50 nats, with a unit in the last place of 4e-6. Times β = 0.1, a loss
differs by at most 1e-5, and a weight by 1e-4 of the largest change of a weight.

In bf16, every operand has a relative rounding error of up to u = 2^-8, or u/√3 in the mean square. Between token and
logit, the two layers round about D = 22 results one after the other, so a logit has a relative error of u·√(D/3) = 1.1
%. With logits of 1.7, a token's log-prob, a difference of two logits, has an error of √2·1.7·1.1 % = 0.025 nats. A
response of 6 tokens has an error of √6·0.025 = 0.06 nats, the margin of a pair (two responses, policy and reference)
0.12, and the mean of the four pairs of a step 0.06. The difference of two runs is √2 times as large, and NATS = 0.34 is
four times that. A loss with slope β = 0.1 has an error of β·NATS.

The gradient is a product of 2·D such results, with an error of u·√(2D/3) = 1.5 %, and a difference between the chosen
and the rejected response, which share the prompt: √2 times that. The difference of two runs is √2 times as large again,
and GRADIENT = 12 % is four times that; it applies to the norm of the gradient and to the largest change of a weight.
Adam divides one such number by another, which doubles the error. DeepSpeed keeps weights in bf16, which adds an error
of u·|w| to a weight. The change of an evaluation has the error of the change of the weights, too. An accuracy counts
signs of margins, some of which are 0, so it is not compared in bf16.
"""

import functools
import math
import os
import re
from pathlib import Path

import pytest

from tests.distributed import habits
from tests.distributed.engines import Engine
from tests.distributed.habits import HABITS, Place, policy, scene, scene_name
from tests.distributed.scenes import play

ROUNDING, NATS, GRADIENT, BETA = 2.0**-8, 0.34, 0.12, 0.1
ENGINES = ("fsdp2", "ddp", "zero2", "zero3")  # DeepSpeed leaves settings that exclude FSDP, so FSDP2 comes first
PRECISIONS = ("fp32", "bf16")
# These habits use Adam, because they need an optimizer state.
ADAPTIVE = ("resumes", "resumes_weights_alone", "resumes_all_weights_alone", "resumes_with_fewer")
FEWER = "resumes_with_fewer"
ONCE = "under DeepSpeed, a trainer can train only once.* set eval_on_start=True"
NOT_BEFORE = "cannot evaluate or predict before training: set eval_on_start=True"
ANEW = "another trainer has sharded this model.* load the model again"
WEIGHTS = "only weights.* start a new run from its weights"
# The habits that raise an error, and a pattern for the error.
REFUSED = {
    **{(engine, "splits_batches"): "divide per_device_train_batch_size .* by the 2 ranks" for engine in ENGINES},
    ("zero2", "evaluates_first"): NOT_BEFORE,
    ("fsdp2", "evaluates_first"): NOT_BEFORE,
    ("zero3", "evaluates_first"): ONCE,
    ("zero2", "trains_twice"): ONCE,
    ("zero3", "trains_twice"): ONCE,
    ("zero3", "runs_the_cell_again"): ANEW,
    ("fsdp2", "runs_the_cell_again"): ANEW,
    **{(f"zero{n}", "resumes_weights_alone"): WEIGHTS for n in (2, 3)},
    **{(engine, "resumes_all_weights_alone"): WEIGHTS for engine in ("zero2", "zero3", "fsdp2")},
    **{(f"zero{n}", FEWER): "written by 2 ranks, but this run has 1.* start the same number of ranks" for n in (2, 3)},
}
# Habits that no other test of two processes covers; make nightly runs the others.
IN_SUITE = [
    *(
        (engine, "fp32", name)
        for engine in ENGINES
        for name in ("runs_the_cell_again", "loads_the_best_of_all_weights")
    ),
    *((engine, "fp32", name) for engine in ("fsdp2", "zero2") for name in ("own_callback", "evaluates_first")),
    ("ddp", "fp32", "two_trainers"),
    ("ddp", "bf16", "runs_the_cell_again"),
    ("zero3", "fp32", "streams"),
    ("zero3", "fp32", "keeps_a_reference_adapter"),
    ("zero2", "fp32", "resumes_weights_alone"),
]


def cells():
    for engine in ENGINES:
        for precision in PRECISIONS:
            for name in (*HABITS, FEWER):
                cell = (engine, precision, name)
                mark = pytest.mark.in_table if cell in IN_SUITE else pytest.mark.nightly
                yield pytest.param(*cell, marks=mark, id=", ".join(cell))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("habits")


@pytest.fixture(scope="module")
def outcomes(request, folder):
    """Return the outcomes of the habits; two processes are started once for all of them."""
    params = [item.callspec.params for item in request.session.items if item.module is request.module]
    wanted = [(p["engine"], p["precision"], p["habit"]) for p in params if "habit" in p]
    fewer = [scene(engine, dtype == "bf16", name) for engine, dtype, name in wanted if name == FEWER]
    scenes = [scene(engine, dtype == "bf16", name) for engine, dtype, name in wanted if name != FEWER]
    found = play(scenes, folder, timeout=3600)
    return found if not fewer else {**found, **play(fewer, folder, ranks=1, timeout=3600)}


@pytest.fixture(scope="module")
def table():
    """Collect the largest differences by habit, engine and precision, and write them to the file in NIGHTLY_TABLE."""
    rows = {}
    yield rows
    if os.environ.get("NIGHTLY_TABLE"):
        Path(os.environ["NIGHTLY_TABLE"]).write_text(markdown(rows))


@functools.cache
def by_one_process(name, precision, folder):
    """Return the outcome of a habit in one process."""
    name = "resumes" if name == FEWER else name
    return HABITS[name](Place(Engine(), precision == "bf16", folder / "one" / precision / name))


@functools.cache
def start(lora, precision, folder):
    """Return the weights and the evaluation of a policy before training."""
    trainer = Place(Engine(), precision == "bf16", folder / "start" / precision).trainer(policy(lora=lora))
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return weights, habits.metrics(trainer.evaluate())


@pytest.mark.parametrize(("engine", "precision", "habit"), list(cells()))
def test_a_habit_gives_the_numbers_of_one_process(outcomes, table, folder, engine, precision, habit):
    ranks = outcomes[scene_name(engine, precision == "bf16", habit)]
    row = table.setdefault(habit, {})
    row[engine, precision] = "fails"
    if (engine, habit) in REFUSED:
        for error in ranks:
            assert isinstance(error, str)
            last = error.strip().splitlines()[-1]
            assert re.match(f"ValueError: .*{REFUSED[engine, habit]}", last), last
        row[engine, precision] = "error"
        return
    expected = by_one_process(habit, precision, folder)
    found = [shares(outcome, expected, engine, precision, habit, folder) for outcome in ranks]
    over = {name: value for of_rank in found for name, (value, bound) in of_rank.items() if not value <= bound}
    assert over == {}
    row[engine, precision] = {name: max(of_rank[name][0] for of_rank in found) for name in found[0]}


def shares(outcome, expected, engine, precision, habit, folder):
    """Return the largest difference of each kind of number, relative to its bound."""
    assert isinstance(outcome, dict), outcome
    before, evaluated = start("of_all" not in habit and "resumes_all" not in habit, precision, folder)
    exact = precision == "fp32"
    gradient = 1e-4 if exact else GRADIENT * (2 if habit in ADAPTIVE else 1)
    nats = 1e-5 / BETA if exact else NATS
    scale = max((values - before[name]).abs().max().item() for name, values in expected["weights"].items())
    assert scale > 1e-2
    kept = (
        0.0
        if exact or engine[:4] != "zero"
        else ROUNDING * max(before[n].abs().max().item() for n in expected["weights"])
    )
    weights = max((outcome["weights"][n] - v).abs().max().item() for n, v in expected["weights"].items())
    share = gradient + kept / scale
    changes = [abs(loss - expected["losses"][0]) for loss in expected["losses"]]
    found = {
        "losses": (apart(outcome["losses"], expected["losses"]), BETA * nats + gradient * max(changes)),
        "norms": (apart(outcome["norms"], expected["norms"], relative=True), 1e-5 if exact else gradient),
        "weights": (weights / scale, share),
        "metrics": (of_evaluations(outcome["metrics"], expected["metrics"], evaluated, exact, nats, share), 1.0),
    }
    assert outcome["weights"].keys() == expected["weights"].keys()
    for name in ("predictions", "best"):
        if name in expected:
            difference = (outcome[name] - expected[name]).abs().max().item()
            found[name] = (difference, BETA * 2 * nats + gradient * max(changes))
    if "seen" in expected:
        assert outcome["seen"] == expected["seen"]
    if "gap_to_the_whole_run" in outcome:
        found["resumed"] = (outcome["gap_to_the_whole_run"] / scale, 1e-6)
    assert not math.isclose(max(changes), 0, abs_tol=1e-4) or len(changes) == 1
    return found


def apart(found, expected, relative=False):
    """Return the largest difference of two lists of numbers."""
    pairs = zip(found, expected, strict=True)
    return max((abs(a - b) / (abs(b) if relative else 1.0) for a, b in pairs), default=0.0)


def of_evaluations(found, expected, before, exact, nats, gradient):
    """Return the largest difference of a metric relative to its bound, which grows
    with the metric's change in each step.
    """
    largest, path, last = 0.0, {}, dict(before)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if not exact and name.endswith("accuracies"):
                continue
            path[name] = path.get(name, 0.0) + abs(value - last.get(name, value))
            last[name] = value
            # Log-probs, summed or per token, are in nats. Losses and rewards are β times such numbers.
            in_rewards = "rewards/" in name or "loss" in name
            bound = (BETA * nats if in_rewards else nats) + gradient * path[name]
            largest = max(largest, abs(mine[name] - value) / (bound + (1e-5 * abs(value) if exact else 0.0)))
    return largest


def markdown(rows):
    """Return the table: the largest difference of a loss, and of a weight relative
    to the largest change, or "error".
    """
    columns = [(engine, precision) for engine in ("ddp", "zero2", "zero3", "fsdp2") for precision in PRECISIONS]
    lines = [f"| habit | {' | '.join(map(' '.join, columns))} |", "|---" * (len(columns) + 1) + "|"]
    for habit, row in rows.items():
        texts = [_cell(row.get(column, "not run")) for column in columns]
        lines.append(f"| {habit.replace('_', ' ')} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _cell(found):
    return found if isinstance(found, str) else f"{found['losses']:.0e}, {found['weights']:.0e}"
