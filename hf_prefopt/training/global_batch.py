"""Compute the loss of an optimizer step as the exact mean over the global batch: all micro-batches on all ranks.

A *piece* is a micro-batch or, with `max_tokens_per_batch`, one of the parts into which a micro-batch is split. It has
its own forward and backward pass. Losses that compare examples with each other need the inputs of the whole step. When
the first piece needs these inputs, they are computed for all pieces, without gradients. Each piece then evaluates the
loss of the global batch, in which only the piece's own inputs have gradients. The gradients of all pieces add up to the
gradient of the global loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import has_length

from hf_prefopt.batch import LoaderBatch, PreferenceBatch, join_examples
from hf_prefopt.data.collator import examples_of_first_rows, keep_examples, rows_that_count
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.objective.objective import Objective

Inputs = dict[str, Tensor]


class GlobalBatch:
    """An object that counts the examples of a step, gives all ranks equally many pieces, and evaluates the objective.

    Args:
        accelerator: Accelerator used for communication between ranks.
        objective: The losses.
        drops_last: True if training drops an incomplete last batch, so that no row is repeated.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, drops_last: bool = False):
        self.accelerator, self.objective, self.drops_last = accelerator, objective, drops_last
        self._step: StepInputs | None = None

    def counted(self, pieces: list[PreferenceBatch], rows_per_rank: int) -> list[Tensor | None]:
        """Return a `[B]` bool mask for each piece: True for the examples that count in the loss.

        Rows that the data loader repeats at its end, so that all ranks have full batches, do not count. The mask is
        `None` if all examples of the piece count.

        Args:
            pieces: Pieces (see `LoaderBatch`) of the most recent batch.
            rows_per_rank: Number of rows that each rank draws for a batch.
        """
        state, world_size = self.accelerator.gradient_state, self.accelerator.num_processes
        known = [piece.get("counted") for piece in pieces]
        if world_size == 1 or not state.end_of_dataloader or any(k is not None for k in known):
            return known
        rows = _rows_drawn(state.active_dataloader)
        if rows is None:
            return known
        count = rows_that_count(rows, rows_per_rank, self.accelerator.process_index, world_size)
        return list(examples_of_first_rows(pieces, count))

    def without_repeats(self, batches: list[LoaderBatch], rows_per_rank: int) -> None:
        """Remove the examples that do not count (see `counted`) from the batches of a step.

        The batches of a stream already have a mask, the entry `counted`. For other datasets, only the last batch of the
        data loader has repeated rows. The number of rows that the sampler draws tells which rows these are.
        """
        for batch in batches:
            pieces = batch["pieces"]
            is_last = batch is batches[-1] and not self.drops_last
            counted = self.counted(pieces, rows_per_rank) if is_last else [piece.get("counted") for piece in pieces]
            batch["pieces"] = [
                piece if kept is None else keep_examples(piece, kept)
                for piece, kept in zip(pieces, counted, strict=True)
            ]

    def idle(self, batches: list[LoaderBatch]) -> list[list[PreferenceBatch]]:
        """Return, for each batch, pieces without examples, with which this rank has as many pieces as the other ranks.

        Args:
            batches: Batches of this rank. All ranks have the same number of batches.
        """
        if self.accelerator.num_processes == 1:
            return [[] for _ in batches]
        own = torch.tensor([[len(batch["pieces"]) for batch in batches]], device=self.accelerator.device)
        most = self.accelerator.gather(own).amax(0).tolist()
        return [
            [keep_examples(batch["pieces"][-1], slice(0)) for _ in range(count - len(batch["pieces"]))]
            for batch, count in zip(batches, most, strict=True)
        ]

    def begin_step(
        self,
        batches: list[LoaderBatch],
        rows_per_rank: int,
        collect: Callable[[PreferenceBatch], Inputs],
        pieces_differ: bool = False,
    ) -> Tensor | int:
        """Begin a step: remove repeated examples and give every rank the same number of pieces.

        Args:
            batches: Batches of the step, in the order in which they were drawn. They are changed in place.
            rows_per_rank: Number of rows that each rank draws for a batch.
            collect: Function that computes the loss inputs of a piece without gradients.
            pieces_differ: True if batches are split into pieces, so that ranks may have different numbers of pieces.

        Returns:
            The number of examples in the step, summed over ranks.
        """
        self.without_repeats(batches, rows_per_rank)
        if pieces_differ:
            for batch, idle in zip(batches, self.idle(batches), strict=True):
                batch["pieces"] = [*idle, *batch["pieces"]]
        pieces = [piece for batch in batches for piece in batch["pieces"]]
        self.begin(pieces, collect)
        count = self.count(pieces)
        for piece in pieces:
            cast(dict[str, Any], piece)["examples_of_step"] = count
        return count

    def begin_evaluation(
        self, batch: LoaderBatch, rows_per_rank: int, pieces_differ: bool = False
    ) -> list[PreferenceBatch]:
        """Store in each piece of an evaluation batch, as the entry `counted`, which of its examples count.

        The arguments have the same meaning as in `begin_step`.

        Returns:
            Pieces without examples, which this rank must also run to have as many pieces as all others; see `idle`.
        """
        pieces = batch["pieces"]
        for piece, counted in zip(pieces, self.counted(pieces, rows_per_rank), strict=True):
            if counted is not None:
                piece["counted"] = counted
        return self.idle([batch])[0] if pieces_differ else []

    def count(self, pieces: list[PreferenceBatch]) -> Tensor | int:
        """Return the number of examples in these pieces, summed over ranks."""
        count = sum(len(piece["rows"]) for piece in pieces)
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(torch.full((), count, device=self.accelerator.device), reduction="sum")

    def begin(self, pieces: list[PreferenceBatch], collect: Callable[[PreferenceBatch], Inputs]) -> None:
        """Begin a step that consists of these pieces on this rank.

        Args:
            collect: Function that computes the loss inputs of a piece without gradients.
        """
        self._step = None
        if self.objective.needs_global_batch and len(pieces) > 1:
            self._step = StepInputs(self.accelerator, lambda: [collect(piece) for piece in pieces])
            for number, piece in enumerate(pieces):
                piece["place_in_step"] = number

    def loss(self, piece: PreferenceBatch, own: Inputs, num_examples: Tensor | int | None) -> tuple[LossOutput, Tensor]:
        """Return the loss output for the examples of a piece, and the piece's share of the step's loss.

        Args:
            own: Loss inputs of the piece.
            num_examples: Number of examples in the whole step; `None` if it was not passed on, for example by an
                overridden `training_step`. Then the number that `begin_step` has stored in the piece is used or, if
                there is none, the number of examples in the piece.
        """
        everything, place = self._inputs(piece, own)
        output = self.objective(everything)
        own_output = output.rows(place)
        known = cast(dict[str, Any], piece).get("examples_of_step", len(piece["rows"]))
        examples = known if num_examples is None else num_examples
        scale = self.accelerator.num_processes / examples
        total, share = output.losses.sum() * scale, own_output.losses.detach().sum() * scale
        # The value is the piece's share of the loss. The gradient is that of the loss of the whole batch.
        return own_output, total + (share - total.detach())

    def _inputs(self, piece: PreferenceBatch, own: Inputs) -> tuple[Inputs, slice]:
        """Return the inputs for the objective, and the slice of this piece's examples in them."""
        if not self.objective.needs_global_batch:
            return own, slice(None)
        number = piece.get("place_in_step", 0)
        step = self._step if "place_in_step" in piece and self._step else StepInputs(self.accelerator, lambda: [own])
        if number == 0:
            self.objective.update_state(step.everything)
        return step.splice(number, own)


def _rows_drawn(loader: Any) -> int | None:
    """Return the number of rows that a data loader draws over all ranks; `None` for a stream.

    A user's sampler may draw fewer or more rows than the dataset has.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # accelerate's samplers, which distribute batches to ranks or skip batches
        batches = batches.batch_sampler
    sized = (rows for rows in (getattr(batches, "sampler", None), loader.dataset) if has_length(rows))
    return next((len(rows) for rows in sized), None)


class StepInputs:
    """The loss inputs of one optimizer step, computed and gathered at first use.

    Args:
        accelerator: Accelerator used for communication between ranks.
        collect: Function that computes the inputs of this rank's pieces, without gradients.
    """

    def __init__(self, accelerator: Accelerator, collect: Callable[[], list[Inputs]]):
        self._accelerator, self._collect = accelerator, collect
        self._everything: Inputs = {}
        self._starts: list[int] = []

    @property
    def everything(self) -> Inputs:
        """The inputs of the global batch, the same on every rank and without gradients."""
        if not self._everything:
            parts = self._collect()
            local = {name: join_examples([part[name] for part in parts]) for name in parts[0]}
            self._everything, start = gather_inputs(self._accelerator, local)
            for part in parts:
                self._starts.append(start)
                start += len(next(iter(part.values())))
        return self._everything

    def splice(self, number: int, own: Inputs) -> tuple[Inputs, slice]:
        """Replace the entries of piece `number` in the global inputs with `own`, which has gradients.

        Returns:
            The inputs, and the slice of the piece in them.
        """
        everything = self.everything
        start = self._starts[number]
        place = slice(start, start + len(next(iter(own.values()))))
        spliced = {
            name: join_examples([values[: place.start], own[name], values[place.stop :]])
            for name, values in everything.items()
        }
        return spliced, place


def gather_examples(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Gather a tensor `[B_r]` or `[B_r, K]` from all ranks, where rank r has B_r examples."""
    return gather_inputs(accelerator, {"": values})[0][""]


def join_outputs(pieces: list[PreferenceBatch], outputs: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the predictions of a batch's pieces, and their labels, without the examples that do not count.

    Args:
        outputs: For each piece, its "predictions" and "labels".

    Returns:
        The predictions and the labels, `[B, K]` each.
    """
    kept = [
        {name: values[piece.get("counted", slice(None))] for name, values in output.items()}
        for piece, output in zip(pieces, outputs, strict=True)
    ]
    # The fill value is −100, with which the Trainer also pads.
    predictions, labels = (
        join_examples([part[name] for part in kept], fill=-100.0) for name in ("predictions", "labels")
    )
    return predictions, labels


def gather_inputs(accelerator: Accelerator, inputs: Inputs) -> tuple[Inputs, int]:
    """Gather the loss inputs of all ranks, without gradients.

    An input of rank r has the shape `[B_r]`, `[B_r, K_r]` (lists) or `[B_r, T_r]` (tokens). All inputs with two
    dimensions are padded with 0 to the same width.

    Returns:
        The inputs of all ranks, and the index of this rank's first example in them.
    """
    detached = {name: tensor.detach() for name, tensor in inputs.items()}
    if accelerator.num_processes == 1:
        return detached, 0
    count = len(next(iter(detached.values())))
    widest = max((tensor.shape[1] for tensor in detached.values() if tensor.dim() == 2), default=0)
    shapes = accelerator.gather(torch.tensor([[count, widest]], device=accelerator.device))
    sizes, widths = shapes.T.tolist()

    def gathered(tensor: Tensor) -> Tensor:
        room = (0, max(widths) - tensor.shape[1]) if tensor.dim() == 2 else ()
        padded = torch.nn.functional.pad(tensor, (*room, 0, max(sizes) - len(tensor)))
        parts = accelerator.gather(padded).view(len(sizes), *padded.shape)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    everything = {name: gathered(tensor.contiguous()) for name, tensor in detached.items()}
    return everything, sum(sizes[: accelerator.process_index])
