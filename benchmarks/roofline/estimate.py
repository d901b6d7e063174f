"""Estimate the time of counted work on an H100.

The time of an operator is that of its products or that of its bytes, whichever is longer, plus a constant for each
launch. Caches, the inefficiency of small products, and overlapping kernels are not modeled.
"""

from collections import Counter
from collections.abc import Iterable

import torch

from benchmarks.gpu_speed import REACHED_FLOP_PER_SECOND
from benchmarks.roofline.counting import Work

# fp32 products run on CUDA cores: 67 TFLOP/s by the data sheet, of which about three quarters are achieved.
FLOP_PER_SECOND = {torch.float32: 50e12}
BYTES_PER_SECOND = 3.35e12
SECONDS_PER_LAUNCH = 4e-6
PARTS = ("products", "attention", "head", "elementwise", "adapter", "optimizer", "reference")


def seconds(work: Work) -> float:
    """Return the estimated time of one operator."""
    speed = FLOP_PER_SECOND.get(work.dtype, REACHED_FLOP_PER_SECOND["H100"])
    return max(work.flop / speed, work.bytes / BYTES_PER_SECOND) + work.launches * SECONDS_PER_LAUNCH


def parts(work: Iterable[Work]) -> dict[str, float]:
    """Return the estimated seconds by part; all parts except reference and optimizer belong to the policy."""
    found: Counter[str] = Counter()
    for each in work:
        found[each.phase if each.phase in ("reference", "optimizer") else each.part] += seconds(each)
    return {part: found[part] for part in PARTS}
