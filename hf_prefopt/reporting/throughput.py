"""How fast a run is, how many positions its layout saves, how much memory it takes, and its share of the GPU's peak.

Counted on the host as batches are drawn; the device is not waited for. The clock runs from one training log to the
next, without evaluations and checkpoints.
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

# Dense bf16 peak, in 10¹² FLOPs per second, by a part of the device's name; the first that fits. Source: data sheets.
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
    """Counts tokens and positions between two training logs.

    Args:
        flops_per_position: gives the model FLOPs of a position, see `flops_per_position`; asked on a GPU.
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
        """The clock starts."""
        self._start_again()

    def on_step_end(self, args, state, control, **_):
        """What follows until the next step may be an evaluation or a checkpoint."""
        self._paused_at = perf_counter()

    def on_step_begin(self, args, state, control, **_):
        """The time since the last step ended is left out."""
        if self._paused_at is not None:
            self._since += perf_counter() - self._paused_at
            self._paused_at = None

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics since the last call, over all ranks; call it on each of them, when training logs.

        `tokens_per_second`: of the sequences [prompt | response], padding left out. `positions_saved`: the share of
        the positions of right-padded batches that was not computed. `peak_memory_gib`: of the rank that takes most;
        on a GPU what PyTorch has allocated, otherwise what the process has. `mfu`: model FLOPs per second as a share
        of the GPU's peak, where this is known and the run computes in 16 bits.
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
    """Model FLOPs of a position: 2 per parameter in the forward, 2 for gradients of activations, 2 for those of
    trained weights, and 2 per parameter of a reference that is run; attention is left out, and so is recomputation.

    Args:
        parameters: of the body, without embeddings. trained: those of them that train.
        reference_parameters: of the reference's body; 0 where it is not run.
    """
    return 4.0 * parameters + 2.0 * trained + 2.0 * reference_parameters


def peak_flops(accelerator: Accelerator) -> float:
    """The dense 16-bit peak of this device, FLOPs per second; 0 where it is unknown or the run computes in fp32."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision not in ("bf16", "fp16"):
        return 0.0
    name = torch.cuda.get_device_name(accelerator.device)
    return next((1e12 * peak for part, peak in PEAK_TERAFLOPS.items() if part in name), 0.0)


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: allocated on this GPU by PyTorch, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
