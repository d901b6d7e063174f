"""One optimizer step as the exact mean over the examples of its global batch: all micro-batches, on all ranks.

Losses that compare examples with each other need the inputs of the whole step. When the first piece asks for them, they
are computed for all pieces, without gradients. Each piece then computes the loss of the global batch, in which only the
piece's own inputs have gradients. The sum of these gradients is the gradient of the global batch's loss.
"""

from collections.abc import Callable

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
    """Counts a step's examples, gives every rank as many pieces, and evaluates the objective on all of them.

    Args:
        accelerator: connects the ranks.
        objective: the losses.
        drops_last: whether training leaves out a last batch that is not full, so that no row is repeated.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, drops_last: bool = False):
        self.accelerator, self.objective, self.drops_last = accelerator, objective, drops_last
        self._step: StepInputs | None = None

    def counted(self, pieces: list[PreferenceBatch], rows_per_rank: int) -> list[Tensor | None]:
        """For each piece of the batch that was drawn last, which examples count, `[B]` bool; `None` if all do.

        Args:
            rows_per_rank: the rows that a rank draws at a time.
        """
        state, world_size = self.accelerator.gradient_state, self.accelerator.num_processes
        known = [piece.get("counted") for piece in pieces]
        if world_size == 1 or not state.end_of_dataloader or any(k is not None for k in known):
            return known
        dataset = state.active_dataloader.dataset
        if not has_length(dataset):
            return known
        count = rows_that_count(len(dataset), rows_per_rank, self.accelerator.process_index, world_size)
        return list(examples_of_first_rows(pieces, count))

    def without_repeats(self, batches: list[LoaderBatch], rows_per_rank: int) -> None:
        """Leave the examples that do not count out of the batches that were drawn, in their order, for a step.

        Batches say so themselves, wherever they come in a step; the loader's length tells only of the last one.
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
        """For each batch, pieces without examples, as many as this rank has fewer than the rank that has most.

        Args:
            batches: equally many on all ranks.
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
        """Begin a step: repeated examples are left out, and every rank gets equally many pieces.

        Args:
            batches: as they were drawn; changed in place.
            rows_per_rank: the rows that a rank draws at a time.
            collect: computes the loss inputs of a piece without gradients.
            pieces_differ: whether batches are cut into pieces, whose number may differ between ranks.

        Returns:
            The number of examples in the step, on all ranks.
        """
        self.without_repeats(batches, rows_per_rank)
        if pieces_differ:
            for batch, idle in zip(batches, self.idle(batches), strict=True):
                batch["pieces"] = [*idle, *batch["pieces"]]
        pieces = [piece for batch in batches for piece in batch["pieces"]]
        self.begin(pieces, collect)
        return self.count(pieces)

    def count(self, pieces: list[PreferenceBatch]) -> Tensor | int:
        """The number of examples in these pieces, on all ranks."""
        count = sum(len(piece["rows"]) for piece in pieces)
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(torch.full((), count, device=self.accelerator.device), reduction="sum")

    def begin(self, pieces: list[PreferenceBatch], collect: Callable[[PreferenceBatch], Inputs]) -> None:
        """Begin a step that consists of these pieces on this rank.

        Args:
            collect: computes the loss inputs of a piece without gradients.
        """
        self._step = None
        if self.objective.needs_global_batch and len(pieces) > 1:
            self._step = StepInputs(self.accelerator, lambda: [collect(piece) for piece in pieces])
            for number, piece in enumerate(pieces):
                piece["place_in_step"] = number

    def loss(self, piece: PreferenceBatch, own: Inputs, num_examples: Tensor | int | None) -> tuple[LossOutput, Tensor]:
        """The output for the examples of a piece, and its share of the step's loss.

        Args:
            own: the loss inputs of the piece.
            num_examples: in the whole step; `None`: the piece is the step.
        """
        everything, place = self._inputs(piece, own)
        output = self.objective(everything)
        own_output = output.rows(place)
        examples = len(piece["rows"]) if num_examples is None else num_examples
        scale = self.accelerator.num_processes / examples
        total, share = output.losses.sum() * scale, own_output.losses.detach().sum() * scale
        # The gradient is that of the whole batch's loss; the value is this piece's part of it.
        return own_output, total + (share - total.detach())

    def _inputs(self, piece: PreferenceBatch, own: Inputs) -> tuple[Inputs, slice]:
        """The inputs that the objective is evaluated on, and the place of this piece's examples among them."""
        if not self.objective.needs_global_batch:
            return own, slice(None)
        number = piece.get("place_in_step", 0)
        step = self._step if "place_in_step" in piece and self._step else StepInputs(self.accelerator, lambda: [own])
        if number == 0:
            self.objective.update_state(step.everything)
        return step.splice(number, own)


class StepInputs:
    """The loss inputs of one optimizer step, gathered when they are first needed.

    Args:
        collect: computes the inputs of this rank's pieces, without gradients.
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
        """The global inputs with the entries of piece `number` replaced by its live ones, and their place."""
        everything = self.everything
        start = self._starts[number]
        place = slice(start, start + len(next(iter(own.values()))))
        spliced = {
            name: join_examples([values[: place.start], own[name], values[place.stop :]])
            for name, values in everything.items()
        }
        return spliced, place


def gather_examples(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Numbers `[B_r]` or `[B_r, K]` of the examples of all ranks, which may have different numbers of them."""
    return gather_inputs(accelerator, {"": values})[0][""]


def gather_inputs(accelerator: Accelerator, inputs: Inputs) -> tuple[Inputs, int]:
    """The inputs `[B_r]`, `[B_r, K_r]` or `[B_r, T_r]` of all ranks, detached, and where this rank's begin."""
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
