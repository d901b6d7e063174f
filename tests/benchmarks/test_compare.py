"""The benchmark runs on a tiny model, compares equal work, and raises an error if the two trainers do not agree."""

import json

import pytest
import torch

from benchmarks import compare, gpu_check, lower_layers, profile_step
from benchmarks.ablation import ALL_OFF, LEVERS, without
from benchmarks.paired import Agreement, agreement
from benchmarks.sides import our_side, perturb_adapters, trl_side
from benchmarks.work import (
    as_groups_of_pairs,
    as_pairs,
    count_pairs,
    padded_positions,
    prepared,
    real_tokens,
    shared_positions,
    shuffled_batches,
    synthetic,
)

TINY = "random:layers=2,vocab=500,hidden=64,mlp=128,heads=4,key_heads=2"


@pytest.fixture
def sides():
    torch.set_num_threads(1)
    peer, ours = trl_side(TINY), our_side(TINY)
    perturb_adapters(peer, ours)
    return peer, ours


def test_counts_of_a_list_by_hand():
    """A prompt of 5 tokens, responses of 2, 3, 4: shared 5 + 9; as pairs of the
    first with each other, 2·(2·5) + (2+3) + (2+4).
    """
    row = prepared([7] * 5, [[1] * 2, [1] * 3, [1] * 4])
    assert shared_positions([row]) == 14
    assert real_tokens([row]) == 31
    assert count_pairs([row]) == len(as_pairs([row])) == 2
    assert padded_positions([row]) == 3 * 9
    assert padded_positions(as_groups_of_pairs([row])) == 4 * 9


def test_batches_too_large_for_the_peer_are_drawn_again():
    rows = [prepared([3] * length, [[4], [5]], length) for length in (5, 6, 7, 90)]
    batches = shuffled_batches(rows, 2, 20, largest=4 * 8)
    assert all(row["row"] != 90 for batch in batches for row in batch)
    with pytest.raises(ValueError, match="random batches of 2 rows"):
        shuffled_batches(rows, 2, 20, largest=4 * 2)


@pytest.mark.parametrize("responses", [2, 4])
def test_both_sides_compute_the_same(sides, responses):
    """Both trainers get a pair, and a list of four responses: one group for ours, three pairs for TRL."""
    apart = agreement(*sides, synthetic(500, 2, 24, 12, responses)[0])
    apart.check()
    assert 0 < apart.worst_parameter < 1e-4


def test_what_differs_is_refused():
    with pytest.raises(AssertionError, match="do not compute the same"):
        Agreement(loss=0.0, gradient=2e-4, worst_parameter=1.0).check()


@pytest.mark.parametrize("lever", [*LEVERS, " + ".join(ALL_OFF)])
def test_a_lever_off_changes_the_time_and_nothing_else(sides, lever):
    ours = sides[1]
    rows = synthetic(500, 2, 24, 12, 3)[0]
    ours.backward(rows)
    agreement(without(ours, lever), ours, rows).check()
    if lever == "layout: padded":
        assert without(ours, lever).positions(rows) == 2 * 3 * 36
    if lever == "each pair a group":
        assert without(ours, lever).positions(rows) == 2 * 2 * 48
    assert ours.positions(rows) == 2 * 60


@pytest.mark.slow
def test_compare_in_one_command(tmp_path):
    path = tmp_path / "results.json"
    command = ["--model", TINY, "--cases", "equal-1:1", "--rounds", "1", "--memory", "--json", str(path)]
    results = compare.main(command)
    case = json.loads(path.read_text())["cases"]["equal-1:1"]
    assert case == results["cases"]["equal-1:1"]
    assert case["ratio"] == case["peer"][0] / case["ours"][0]
    assert case["positions"] == {"peer": 2 * 2 * 256, "ours": 2 * 384}
    assert all(0 <= case["system"][role] <= sum(case[role]) + 0.1 for role in ("peer", "ours"))  # in ticks of 10 ms
    assert all(case["memory"][side]["peak"] > case["memory"][side]["before"] for side in ("trl", "ours"))
    assert "| equal lengths 1:1 |" in compare.report.as_markdown(results)
    compare.report.draw(results, tmp_path / "plot.png")


@pytest.mark.slow
def test_profile_adds_up():
    results = profile_step.main(["--model", TINY, "--case", "equal-1:1", "--steps", "1"])
    seconds = results["seconds"]
    assert sum(seconds[part] for part in profile_step.PARTS) == pytest.approx(seconds["step"])
    assert all(seconds[part] >= 0 for part in profile_step.PARTS)


@pytest.mark.slow
def test_gpu_check_runs_its_code_on_a_cpu(tmp_path):
    options = ["--device", "cpu", "--tiny", "--rounds", "1", "--layouts-only"]
    results = gpu_check.main([*options, "--out", str(tmp_path)])
    checks = [check for group in results["correctness"].values() for check in group.values()]
    checks += results["losses"].values()
    assert checks and all(check["ok"] for check in checks)
    assert all(case["loss_apart"] < 1e-4 for case in results["speed"])


def test_upper_layers_are_measured_against_all_layers_and_trl(capsys):
    """Losses and gradients are compared first. Then the output has a line per step,
    and a ratio for the three variants.
    """
    lower_layers.measure(TINY, pairs=1, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("round 1 of 1:") for line in lines) == 4
    ratios = [line for line in lines if f"/ {lower_layers.ONCE}:" in line]
    assert [line.split(" / ")[0] for line in ratios] == [lower_layers.TRL, lower_layers.ALL, lower_layers.TWICE]


def test_the_quick_comparison_is_of_two_cases():
    options = compare._options(["--quick"])
    assert (options.cases, options.rounds) == (["equal-4:1", "chat"], 2)
