"""Profile one step of each trainer with PyTorch: kernel launches, waits of the host, and the slowest kernels."""

import cProfile
import pstats
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_speed import Case, both_trainers
from benchmarks.work import Row

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def profiles(case: Case, rows: Sequence[Row], device: str, out: Path | None) -> dict[str, dict[str, Any]]:
    """Return the counts of a step of both trainers, and write tables of the slowest kernels to `out`."""
    results = {}
    for name, side in zip(("trl", "ours"), both_trainers(case, device), strict=True):
        for _ in range(2):
            side.step(rows)

        def step(side: Any = side) -> None:
            side.step(rows)

        results[name] = {"host ms": _host_milliseconds(step, device), "waits": _waits(step, device)}
        results[name] |= _counts(step, device, None if out is None else out / f"profile_{name}.txt")
        if out is not None:
            (out / f"python_{name}.txt").write_text(_python_profile(step))
    return results


def _host_milliseconds(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return the time until the step's Python code returns, and the time until the device has finished."""
    start = time.perf_counter()
    step()
    returned = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"returned": 1000 * (returned - start), "finished": 1000 * (time.perf_counter() - start)}


def _python_profile(step: Callable[[], None]) -> str:
    """Return Python's time in three steps, by function."""
    profiler = cProfile.Profile()
    for _ in range(3):
        profiler.runcall(step)
    text = StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(60)
    return text.getvalue()


def _waits(step: Callable[[], None], device: str) -> dict[str, int]:
    """Count how often the host waited for the device, by call site."""
    if device != "cuda":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sites = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return dict(sites.most_common())


def _counts(step: Callable[[], None], device: str, path: Path | None) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(averages.table(sort_by=by, row_limit=60, max_name_column_width=90))
    launches = sum(event.count for event in averages if event.key in LAUNCHES)
    # Only the device's events, because the host's events repeat the same time.
    kernels = sum(e.self_device_time_total for e in averages if e.device_type == DeviceType.CUDA)
    return {"launches": launches, "kernel ms": kernels / 1000}
