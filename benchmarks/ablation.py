"""The ablation study: time steps without one optimization (a "lever"), alternating with complete steps.

Patches switch the levers off, because users of the library have no reason to switch them off.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.paired import agreement, measure
from benchmarks.sides import Side, our_side, perturb_adapters
from benchmarks.work import Row, Work, as_groups_of_pairs
from hf_prefopt.batch import LoaderBatch, PreferenceBatch
from hf_prefopt.data.collator import loader_batch
from hf_prefopt.scoring import forward


@contextmanager
def _padded(side: Side) -> Iterator[None]:
    """Use the layout "padded": each response has its own copy of the prompt, and sequences have the same length."""
    with (
        patch.object(side.trainer.data_collator, "layout", "padded"),
        patch.object(side.trainer.scorer, "layout", "padded"),
    ):
        yield


@contextmanager
def _no_unit_gradient(_: Side) -> Iterator[None]:
    """Compute the frozen head like a trained one: the backward pass recomputes the logits of each chunk."""
    with patch.object(forward, "is_plain_linear", lambda head: False):
        yield


@contextmanager
def _every_position(side: Side) -> Iterator[None]:
    """Compute the head on all positions, including prompts and padding, instead of only scored positions."""
    collate = side.trainer.data_collator

    def all_scored(rows: Sequence[Row]) -> LoaderBatch:
        return loader_batch([_scoring_everything(piece) for piece in collate(rows)["pieces"]])

    with patch.object(side.trainer, "data_collator", all_scored):
        yield


@contextmanager
def _one_chunk(_: Side) -> Iterator[None]:
    """Compute all logits at once instead of in chunks."""
    with patch.dict(forward.CHUNK_ROWS, dict.fromkeys(forward.CHUNK_ROWS, 1 << 40)):
        yield


@contextmanager
def _apart(side: Side) -> Iterator[None]:
    """Put each pair into its own group, even if pairs share their prompt."""
    collate = side.trainer.data_collator
    with patch.object(side.trainer, "data_collator", lambda rows: collate(as_groups_of_pairs(rows))):
        yield


@contextmanager
def _entropy(side: Side) -> Iterator[None]:
    """Add the cost of TRL's entropy metric, the entropy of every token. (This is not an optimization of ours.)"""
    with patch.object(type(side.trainer.criterion), "token_stats", ("entropy",)):
        yield


LEVERS: dict[str, Callable[[Side], Any]] = {
    "layout: padded": _padded,
    "head: no unit gradient": _no_unit_gradient,
    "head: every position": _every_position,
    "head: one chunk": _one_chunk,
    "each pair a group": _apart,
    "with token entropy": _entropy,
}
ALL_OFF = ("layout: padded", "head: no unit gradient", "head: every position")


@contextmanager
def lever_off(side: Side, name: str) -> Iterator[None]:
    """Switch a lever off inside the context; "a + b" switches off both levers."""
    with ExitStack() as stack:
        for one in name.split(" + "):
            stack.enter_context(LEVERS[one](side))
        yield


class WithoutLever(Side):
    """A side that switches levers off in each of its steps."""

    lever: str

    def backward(self, rows: Sequence[Row]) -> Tensor:
        """Same as `Side.backward`, with the levers off."""
        with lever_off(self, self.lever):
            return super().backward(rows)

    def positions(self, rows: Sequence[Row]) -> int:
        """Same as `Side.positions`, with the levers off."""
        with lever_off(self, self.lever):
            return super().positions(as_groups_of_pairs(rows) if "each pair a group" in self.lever else rows)


def without(side: Side, lever: str) -> WithoutLever:
    """Return the same trainer as a side with levers off."""
    variant = WithoutLever(lever, side.trainer, side.model, side.optimizer)
    variant.lever = lever
    return variant


def ladder(source: str, work: Work, rounds: int, levers: Sequence[str] | None = None) -> dict[str, Mapping[str, Any]]:
    """Measure each lever. `ratio` is the time of a step without it divided by the time of a complete step."""
    side = our_side(source)
    perturb_adapters(side)
    side.backward(work.batch(0))  # chooses the layout
    side.model.zero_grad()
    results: dict[str, Mapping[str, Any]] = {}
    for lever in levers or [*list(LEVERS)[:4], "with token entropy", " + ".join(ALL_OFF)]:
        variant = without(side, lever)
        apart = agreement(variant, side, work.batch(0))
        apart.check()
        results[lever] = measure(variant, side, work, rounds).summary() | {"gradients_apart": apart.gradient}
    return results


def _scoring_everything(batch: PreferenceBatch) -> PreferenceBatch:
    """Return the batch with all other positions scored too, as an additional response that belongs to no pair."""
    batch = {**batch}
    asked = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    asked[batch["scored_rows"]] = True
    extra = (~asked).nonzero().squeeze(1)
    last = torch.full_like(extra, len(batch["response_lengths"]))
    for name, more in (("scored_rows", extra), ("targets", torch.zeros_like(extra)), ("response_index", last)):
        batch[name] = torch.cat([batch[name], more])
    batch["response_lengths"] = torch.cat([batch["response_lengths"], torch.tensor([len(extra)])])
    return batch
