"""Compute the loss of an optimizer step as the exact mean over the global batch: all micro-batches on all ranks.

Losses that compare examples with each other need the inputs of the whole step. When the first piece needs these inputs,
they are computed for all pieces, without gradients. Each piece then evaluates the loss of the global batch, in which
only the piece's own inputs have gradients. The gradients of all pieces add up to the gradient of the global loss.
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
    """An object that counts the examples of a step, equalizes pieces across ranks, and evaluates the objective.

    Args:
        accelerator: Accelerator used for communication between ranks.
        objective: The losses.
        drops_last: True if training drops an incomplete last batch, so that no row is repeated.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, drops_last: bool = False):
        self.accelerator, self.objective, self.drops_last = accelerator, objective, drops_last
        self._step: StepInputs | None = None

    def counted(self, pieces: list[PreferenceBatch], rows_per_rank: int) -> list[Tensor | None]:
        """Return, for each piece of the last drawn batch, a `[B]` bool mask of the examples that count.

        Repeated rows do not count. The mask is `None` if all examples of the piece count.

        Args:
            rows_per_rank: Number of rows that each rank draws at a time.
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
        """Remove the examples that do not count from the batches of a step.

        A batch of a stream already has a mask (`counted`). For other datasets, only the last batch of the data loader
        has repeated rows, which are found from the number of rows that the sampler draws.
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
        """Return empty pieces for each batch, so that every rank has the same number of pieces.

        Args:
            batches: Batches of this rank; all ranks have the same number of batches.
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
            batches: Batches of the step in the order in which they were drawn; changed in place.
            rows_per_rank: Number of rows that each rank draws at a time.
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
        """Mark the examples of an evaluation batch that count, in the entry `counted` of its pieces.

        The arguments are those of `begin_step`.

        Returns:
            Empty pieces, with which this rank has as many pieces as all other ranks; see `idle`.
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
                overridden `training_step`: then the number of the step that was begun with this piece, or else of the
                piece.
        """
        everything, place = self._inputs(piece, own)
        output = self.objective(everything)
        own_output = output.rows(place)
        known = cast(dict[str, Any], piece).get("examples_of_step", len(piece["rows"]))
        examples = known if num_examples is None else num_examples
        scale = self.accelerator.num_processes / examples
        total, share = output.losses.sum() * scale, own_output.losses.detach().sum() * scale
        # The value is the piece's share; the gradient is the gradient of the whole batch's loss.
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
    while hasattr(batches, "batch_sampler"):  # accelerate's, which deal out batches to ranks or skip some
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
    """Gather tensors `[B_r]` or `[B_r, K]` from all ranks; B_r may differ between ranks."""
    return gather_inputs(accelerator, {"": values})[0][""]


def join_outputs(pieces: list[PreferenceBatch], outputs: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join predictions and labels of a batch's pieces, `[B, K]` each, without the examples that do not count.

    Args:
        outputs: For each piece, its "predictions" and "labels".
    """
    kept = [
        {name: values[piece.get("counted", slice(None))] for name, values in output.items()}
        for piece, output in zip(pieces, outputs, strict=True)
    ]
    # The Trainer also pads with −100.
    predictions, labels = (
        join_examples([part[name] for part in kept], fill=-100.0) for name in ("predictions", "labels")
    )
    return predictions, labels


def gather_inputs(accelerator: Accelerator, inputs: Inputs) -> tuple[Inputs, int]:
    """Gather inputs `[B_r]`, `[B_r, K_r]` or `[B_r, T_r]` from all ranks, without gradients.

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
