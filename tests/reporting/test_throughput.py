"""Tokens per second, positions saved, memory and MFU, with a fake clock and a fake device."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from hf_prefopt.data.collator import sequence_sizes
from hf_prefopt.reporting import throughput
from hf_prefopt.reporting.throughput import Throughput, flops_per_position
from tests.trainers import logged, make_trainer, pairs


def drawn(positions, tokens, padded):
    return {"input_ids": torch.zeros(1, positions), "sequence_tokens": tokens, "padded_positions": padded}


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that the test sets."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "perf_counter", lambda: time.now)
    return time


def test_the_clock_stands_still_between_steps(clock):
    """Steps of 2 and 3 seconds, with an evaluation of 50 seconds between them: 1,000 tokens in 5 seconds."""
    counter = Throughput()
    counter.on_train_begin(None, None, None)
    for seconds in (2, 3):
        counter.on_step_begin(None, None, None)
        counter.drew([drawn(100, 300, 400), drawn(50, 200, 200)])
        clock.now += seconds
        counter.on_step_end(None, None, None)
        clock.now += 50 * (seconds == 2)
    found = counter.pop(Accelerator(cpu=True))
    assert found["tokens_per_second"] == 1000 / 5 and found["positions_saved"] == 1 - 300 / 1200
    assert found["peak_memory_gib"] > 0.05 and "mfu" not in found
    assert "tokens_per_second" not in counter.pop(Accelerator(cpu=True))


def test_mfu_is_model_flops_over_the_peak_of_the_device(clock, monkeypatch):
    """150 positions of 4·10¹² FLOPs in 2 seconds on an A100 (312·10¹²)."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**31)
    device = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16", num_processes=1)
    counter = Throughput(lambda: 4e12)
    counter.drew([drawn(150, 300, 400)])
    clock.now += 2
    found = counter.pop(device)
    assert found["mfu"] == pytest.approx(150 * 4 / 2 / 312) and found["peak_memory_gib"] == 2
    counter.drew([drawn(150, 300, 400)])
    assert "mfu" not in counter.pop(SimpleNamespace(**{**vars(device), "mixed_precision": "no"}))


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("X1", 0)],
)
def test_the_peak_goes_by_the_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = SimpleNamespace(device=torch.device("cuda"), mixed_precision="fp16")
    assert throughput.peak_flops(device) == peak * 1e12


def test_flops_of_a_run_under_lora_and_of_one_that_trains_all():
    """Forward 2N, backward 2N + 2·trained, reference 2N: 6N for LoRA with its reference, 8N where all weights train."""
    assert flops_per_position(100, 0, 100) == 600 and flops_per_position(100, 100, 100) == 800
    assert flops_per_position(100, 100, 0) == 600


def test_a_run_counts_its_tokens(tmp_path):
    """A step has 8 rows; the packed layout computes each prompt once and no padding."""
    rows = pairs(8)
    trainer = make_trainer(tmp_path, train_dataset=rows, per_device_train_batch_size=8, layout="shared")
    trainer.train()
    lengths = [(len(r["prompt_ids"]), [len(ids) for ids in r["response_ids"]]) for r in rows]
    computed = sum(p + sum(ids) for p, ids in lengths)
    padded = 16 * max(p + max(ids) for p, ids in lengths)
    assert logged(trainer, "positions_saved") == [pytest.approx(1 - computed / padded)]
    assert sequence_sizes(list(rows))["sequence_tokens"] == sum(2 * p + sum(ids) for p, ids in lengths)
    assert logged(trainer, "tokens_per_second")[0] > 0


def test_of_a_users_collator_no_saving_is_claimed():
    """The rows of a custom collator are unknown, so tokens and padding are unknown
    unless the rows are prepared rows.
    """
    assert sequence_sizes([{"input_ids": [1]}]) == {}
