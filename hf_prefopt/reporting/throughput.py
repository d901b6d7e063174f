"""Measure throughput: tokens per second, positions saved by the layout, peak memory, and share of the GPU's peak FLOPs.

Tokens and positions are counted on the host when batches are drawn, so the host does not wait for the device. The time
between two training logs is measured without the time of evaluations and checkpoints.
"""

import resource
import sys
from collections.abc import Callable, Iterable
from time import perf_counter

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerCallback

from hf_prefopt.batch import LoaderBatch

# Peak for dense bf16 matrices, in 10¹² FLOPs per second, from data sheets. The keys are parts of device names, and the
# first key that matches is used.
PEAK_TERAFLOPS = {
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "MI300X": 1307,
}


class Throughput(TrainerCallback):
    """A callback that counts tokens and positions between two training logs.

    Args:
        flops_per_position: Function that returns the model FLOPs per position (see the function `flops_per_position`).
            It is called only on a GPU with a known peak.
    """

    def __init__(self, flops_per_position: Callable[[], float] = lambda: 0.0):
        self._flops_per_position = flops_per_position
        self._start_again()

    def _start_again(self) -> None:
        self._tokens, self._computed, self._padded = 0, 0, 0
        self._since, self._paused_at = perf_counter(), None

    def drew(self, batches: Iterable[LoaderBatch]) -> None:
        """Count the batches of a step."""
        for batch in batches:
            self._computed += batch["input_ids"].numel()
            self._tokens += batch.get("sequence_tokens", 0)
            self._padded += batch.get("padded_positions", 0)

    def on_train_begin(self, args, state, control, **_):
        """Start the clock."""
        self._start_again()

    def on_step_end(self, args, state, control, **_):
        """Pause the clock, because an evaluation or a checkpoint may follow."""
        self._paused_at = perf_counter()

    def on_step_begin(self, args, state, control, **_):
        """Resume the clock."""
        if self._paused_at is not None:
            self._since += perf_counter() - self._paused_at
            self._paused_at = None

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all ranks since the last call. Call this method on every rank, at every training log.

        - `tokens_per_second`: Tokens of the sequences [prompt | response] per second, without padding.
        - `positions_saved`: 1 − (computed positions) / (positions of right-padded batches of the same rows).
        - `peak_memory_gib`: Largest peak memory of any rank. On a GPU, this is the memory that PyTorch has allocated;
          otherwise, it is the resident memory of the process.
        - `mfu`: Model FLOPs per second as a share of the GPU's peak. It is present only if the peak is known and
          the run uses bf16 or fp16.
        """
        seconds = perf_counter() - self._since
        own = [(self._tokens, self._computed, self._padded, peak_memory(accelerator.device))]
        ranks = own if accelerator.num_processes == 1 else gather_object(own)
        tokens, computed, padded = (sum(rank[n] for rank in ranks) for n in range(3))
        found = {"peak_memory_gib": max(rank[3] for rank in ranks) / 2**30}
        if tokens and seconds > 0:
            found |= {"tokens_per_second": tokens / seconds, "positions_saved": 1 - computed / padded}
        peak = peak_flops(accelerator) * accelerator.num_processes
        if peak and computed and (flops := self._flops_per_position()):
            found["mfu"] = computed * flops / seconds / peak
        self._start_again()
        return found


def flops_per_position(parameters: int, trained: int, reference_parameters: int) -> float:
    """Compute the model FLOPs per position. Attention scores and recomputed activations are not counted.

    Each parameter takes 2 FLOPs in the forward pass, and 2 for the gradients of activations. Each trained parameter
    takes 2 more for its own gradient. Each parameter of the reference takes 2 for the reference's forward pass.

    Args:
        parameters: Number of parameters of the policy, without embeddings.
        trained: Number of these parameters that are trained.
        reference_parameters: Number of parameters of the reference, without embeddings; 0 if the reference is not run.
    """
    return 4.0 * parameters + 2.0 * trained + 2.0 * reference_parameters


def peak_flops(accelerator: Accelerator) -> float:
    """Return the GPU's peak for dense 16-bit matrices, in FLOPs per second; 0 if it is unknown or the run uses fp32."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision not in ("bf16", "fp16"):
        return 0.0
    name = torch.cuda.get_device_name(accelerator.device)
    return next((1e12 * peak for part, peak in PEAK_TERAFLOPS.items() if part in name), 0.0)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes.

    On a GPU, this is the memory that PyTorch has allocated; otherwise, it is the resident memory of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
