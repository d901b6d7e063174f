"""Split a stream across ranks by its shards (usually files): each rank reads and tokenizes only its own shards.

Shards may have different numbers of rows, so a rank may reach the end of its shards before other ranks do. It then adds
batches without examples until no rank has enough batches for another step. Each row is used once per epoch, and the
loss of a step remains the exact mean over its examples.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets import IterableDataset
from transformers import TrainingArguments

from hf_prefopt.batch import LoaderBatch
from hf_prefopt.data.collator import keep_examples, loader_batch


def is_split_by_shards(dataset: Any, args: TrainingArguments, ranks: int | None = None) -> bool:
    """Return True if each rank reads only its own shards of a training stream.

    With `dataloader_drop_last`, all ranks read the whole stream, because the last batch is dropped on all ranks or on
    none.

    Args:
        ranks: Number of ranks. Default: the ranks of this run.
    """
    ranks = args.world_size if ranks is None else ranks
    is_stream = isinstance(dataset, IterableDataset) and not args.dataloader_drop_last
    return is_stream and 1 < ranks <= dataset.num_shards


def refuse_split_stream(dataset: Any, ranks: int) -> None:
    """Raise `ValueError` for a stream that the user has split across ranks, because it would be split again."""
    if ranks > 1 and getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            "the stream is already split by split_dataset_by_node, and the trainer would split it again: pass the "
            "whole stream to the trainer"
        )


def too_few_shards(shards: int, ranks: int) -> str:
    """Return the message for a stream with fewer shards than ranks."""
    return (
        f"the training stream has {shards} {'shard' if shards == 1 else 'shards'} for {ranks} ranks, so each rank "
        f"reads and tokenizes the whole stream: split it into a multiple of {ranks} files"
    )


class ShardedRanks:
    """The ranks of a run whose training stream is split by shards."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._known: LoaderBatch | None = None  # idle batches are made from this batch

    def even(self, batches: list[LoaderBatch], count: int) -> tuple[list[LoaderBatch], int]:
        """Add batches without examples (idle batches) until there are `count`, if any rank has drawn `count` batches.

        The ranks communicate through the CPU, so the host does not wait for the device.

        Args:
            batches: The batches that this rank has drawn for a step. There are at most `count`.

        Returns:
            The batches including idle ones, and the largest number of batches that any rank has drawn.
        """
        self._known = batches[0] if self._known is None and batches else self._known
        numbers = torch.tensor([len(batches), self._known is None], dtype=torch.int64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_cpu_group(dist.group.WORLD))
        most, some_have_none = numbers.tolist()
        if most < count:
            return batches, most
        if some_have_none:  # at most once per run: a rank has no rows, or resumes after its last row
            self._known = self._first_known()
        return [*batches, *(_idle(self._known) for _ in range(count - len(batches)))], most  # type: ignore[arg-type]

    def _first_known(self) -> LoaderBatch:
        own = None if self._known is None else _idle(self._known)
        known = next(batch for batch in gather_object([send_to_device(own, "cpu")]) if batch is not None)
        return send_to_device(known, self._accelerator.device)


def _idle(batch: LoaderBatch) -> LoaderBatch:
    """Return a batch without examples. A rank computes it so that all ranks make the same collective calls."""
    smallest = min(batch["pieces"], key=lambda piece: piece["input_ids"].numel())
    return loader_batch([keep_examples(smallest, slice(0))])


@cache
def _cpu_group(world: Any) -> Any:
    """Return a process group that communicates through the CPU; `world` is the default group."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
