"""Budgets for a training step on a GPU, counted on fake tensors: waits of the host, launches, and casts that are kept.

The tests run the step of `benchmarks.roofline` at a tiny shape in a separate process. They need a C++ compiler.
"""

import json
import subprocess
import sys

import pytest

from benchmarks.roofline.fake_device import compiler
from benchmarks.roofline.stepping import Case
from benchmarks.roofline.table import measured, with_more_layers
from benchmarks.work import ROOT, prepared

pytestmark = pytest.mark.slow

HALVES = ("bf16", "fp32-autocast")
# Parameters of the linear modules in a layer of the tiny model, and those of q, k and v.
QKV = 64 * (4 + 2 + 2) * 64
LAYER = QKV + 4 * 64 * 64 + 3 * 64 * 96


@pytest.fixture(scope="module")
def counts():
    if compiler() is None:
        pytest.skip("needs a C++ compiler, for a CUDA device that does nothing")
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.counted"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("COUNTS ")), None)
    assert line, run.stderr[-3000:]
    return json.loads(line.removeprefix("COUNTS "))


def test_operators_counted_by_hand(counts):
    """The operators: a [64, 32] · [32, 64] product in bf16, its cast, its sum, and adding an expanded [64] bias."""
    found = counts["by hand"]
    product = 64 * 64 * 2
    assert found["work"] == [
        ["mm", 1, 2 * 64 * 32 * 64, 2 * 64 * 32 * 2 + product],
        ["_to_copy", 1, 0, product + 2 * product],
        ["sum", 1, 0, 2 * product + 4],
        ["add", 1, 0, 64 * 2 + 2 * product],
    ]
    # In use are the product, its sum (one block of the allocator) and the sum with the bias, not the cast; then only
    # the sum.
    assert (found["in use"], found["after"]) == (2 * product + 512, 512)


def test_waits_by_hand(counts):
    """The host waits for `item`, `bool`, `nonzero`, a mask as index, and copies to
    the CPU, from a list, and from the CPU.

    A non-blocking copy and filling a tensor with a number do not wait.
    """
    assert counts["by hand"]["waits"] == {"read": 2, "copy": 3, "nonzero": 1, "mask as index": 1}
    assert counts["by hand"]["selected"] == 0.25 * 64  # the share that `Batch.scored` gives
    assert counts["by hand"]["kept"] == {"fp32 copy: counted.py:by_hand": 8 * 4}


@pytest.mark.parametrize("layers", [1, 2])
def test_products_by_closed_form(counts, layers):
    """A weight has 2 FLOP per position in policy, reference and input gradients (the first q, k, v need none)."""
    found = counts["ours"]["bf16"][layers - 1]
    assert found["positions"] == 12 + 5 + 7 + 9 + 4 + 6
    assert found["product flop"] == 2 * found["positions"] * (3 * layers * LAYER - QKV)


def test_attention_by_closed_form(counts):
    """Prompts and responses are causal triangles with a rectangle between them; 2, 2 and 5 products of 2 · 64 FLOP."""
    pairs = 12 * 13 // 2 + (5 * 6 + 7 * 8) // 2 + (5 + 7) * 12 + 9 * 10 // 2 + (4 * 5 + 6 * 7) // 2 + (4 + 6) * 9
    assert counts["ours"]["bf16"][1]["attention flop"] == 2 * 9 * 2 * 4 * 64 * pairs


def all_of_ours(counts):
    return [*counts["ours"]["bf16"], *counts["ours"]["fp32-autocast"], counts["fp16"], counts["checkpointed"]]


def test_no_wait_from_forward_to_record(counts):
    assert [found["waits"] for found in all_of_ours(counts)] == [{}] * 6
    theirs = counts["command"][0]["waits"]["trl"]
    assert theirs["read: dpo_trainer.py:_compute_loss"] == 15  # the counter counts these, too


def test_a_log_waits_once(counts):
    for found in all_of_ours(counts):
        reads = {"copy: metrics.py:copied": 1}
        assert found["waits of a log"] == reads


@pytest.mark.parametrize("dtype", HALVES)
def test_launches_of_a_layer(counts, dtype):
    """The launches are within 10 % of those of the model's own padded forward and backward, by phase and in total."""

    def of_a_layer(found):
        return {phase: found[1][phase] - found[0][phase] for phase in ("policy", "reference", "backward")}

    ours = of_a_layer([found["launches"] for found in counts["ours"][dtype]])
    plain = of_a_layer(counts["plain"][dtype])
    assert all(ours[phase] <= 1.1 * plain[phase] for phase in plain), (ours, plain)
    assert sum(ours.values()) <= 1.05 * sum(plain.values())


def test_no_needless_cast_is_kept(counts):
    """Only the casts of the model's own norms are kept. PEFT casts an adapter's
    input there and back, which TRL keeps.
    """
    assert {site for found in all_of_ours(counts) for site in found["kept"]} == {"fp32 copy: modeling_qwen3.py:forward"}
    assert "cast there and back: layer.py:forward" in counts["command"][0]["kept"]["trl"]


def test_every_layer_takes_the_kernel(counts):
    """Policy, reference and backward pass use it; with checkpointing, the backward pass runs the forward again."""
    for layers, found in [(1, counts["fp16"]), *((n, counts["ours"][d][n - 1]) for d in HALVES for n in (1, 2))]:
        assert found["layout"] == "shared"
        assert (found["varlen"]["policy"], found["varlen"]["reference"], found["varlen backward"]) == (layers,) * 3
    assert counts["checkpointed"]["varlen"]["backward"] == 1


def test_every_dtype_takes_the_kernel(counts):
    """Attention runs in half precision if the weights, autocast, or the values (next
    to fp32 norms) are in half precision.
    """
    assert {name for name, taken in counts["paths"].items() if not taken} == {"fp32"}


def test_the_command_counts_both_sides(counts):
    """With 64 + 16 tokens, a pair has 160 positions in TRL and 96 positions here."""
    (found,) = counts["command"]
    assert (found["trl"]["positions"], found["ours"]["positions"]) == (2 * 160, 2 * 96)
    assert found["ours"]["waits of the host"] == 0 < found["trl"]["waits of the host"]
    assert 0 < found["ours"]["estimated ms"] < found["trl"]["estimated ms"]
    parts = sum(value for name, value in found["ours"].items() if name.startswith("  "))
    assert parts == pytest.approx(found["ours"]["estimated ms"])


def test_layers_are_alike(counts):
    """Three layers are extrapolated from one and two, as `--by-layer` does from two
    and three: the products are exact.
    """
    one, two = ({"product flop": found["product flop"]} for found in counts["ours"]["bf16"])
    expected = 2 * counts["ours"]["bf16"][0]["positions"] * (3 * 3 * LAYER - QKV)
    assert with_more_layers(one, two, 2) == {"product flop": expected}


def test_what_was_measured_stands_beside():
    rows = [prepared([1], [[2], [3]])] * 8
    assert measured(Case("qwen2.5-0.5b", "4:1", rows, "lora", "fp32-autocast"))["peak GiB ours"] == "23.9"
    assert measured(Case("qwen2.5-0.5b", "4:1", rows[:3], "lora", "fp32-autocast")) == {}
