"""A Trainer whose step is the exact mean over the examples of the global batch, whatever it is cut into."""

from itertools import islice

import torch
from torch import Tensor, nn

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.collator import pieces_of
from hf_prefopt.objective.step_inputs import StepInputs
from hf_prefopt.scoring.modes import adapter_casts_off, evaluation_mode
from hf_prefopt.training.evaluating import EvaluatingTrainer

# A micro-batch, whole, or under "pieces" as a token budget has cut it.
Cut = PreferenceBatch | dict[str, list[PreferenceBatch]]


class SteppingTrainer(EvaluatingTrainer):
    """Counts a step's examples, cuts it alike on every rank, and gives batch-wise losses the inputs of all of it.

    How a micro-batch is laid out and scored is the subclass's: `_settle_layout`, `_score_reference`, `_score_policy`,
    `_loss_inputs`.
    """

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step and its number of examples; for batch-wise losses, tied together."""
        self._settle_layout()
        if self._finite.is_full:
            self._finite.check(self.accelerator)
        batches = list(islice(epoch_iterator, num_batches))
        if batches:
            batches[-1] = self._without_repeats(batches[-1])
        num_examples = self._get_num_items_in_batch(batches, device)
        if self.args.max_tokens_per_batch is not None:
            batches = [{"pieces": self._evened(pieces_of(batch))} for batch in batches]
        pieces = [piece for batch in batches for piece in pieces_of(batch)]
        if self.criterion.needs_global_batch and len(pieces) > 1:
            step = StepInputs(self.accelerator, lambda: self._collect(pieces))
            for index, piece in enumerate(pieces):
                piece["step_inputs"] = (step, index)
        return batches, num_examples

    def _get_num_items_in_batch(self, batch_samples: list[PreferenceBatch], device: torch.device) -> Tensor | int:
        """The examples of a step: those of its micro-batches on all ranks."""
        count = sum(len(piece["rows"]) for batch in batch_samples for piece in pieces_of(batch))
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")

    def _evened(self, pieces: list[PreferenceBatch]) -> list[PreferenceBatch]:
        """As many pieces on every rank."""
        return [*self._idle(pieces), *pieces]

    def _collect(self, batches: list[PreferenceBatch]) -> list[dict[str, Tensor]]:
        """The loss inputs of all micro-batches of a step, without gradients; the reference's scores are kept."""
        collected = []
        with torch.no_grad(), evaluation_mode(self.model):
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                reference = batch["reference_scores"] = self._score_reference(inputs)
                policy = self._score_policy(self.model, inputs, reference)
                collected.append(self._loss_inputs(inputs, policy, reference))
        return collected

    def _step_inputs(self, inputs: PreferenceBatch, own: dict[str, Tensor]) -> tuple[dict[str, Tensor], slice]:
        """The inputs that the objective is evaluated on, and where this micro-batch's stand among them."""
        if not self.criterion.needs_global_batch:
            return own, slice(None)
        step, index = inputs.get("step_inputs") or (StepInputs(self.accelerator, lambda: [own]), 0)
        if index == 0:
            self.criterion.update_state(step.everything)
        return step.splice(index, own)

    def training_step(self, model: nn.Module, inputs: Cut, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of a batch, piece by piece where a token budget has cut it."""
        *pieces, last = pieces_of(inputs)
        synchronise = self.accelerator.sync_gradients
        loss = torch.zeros((), device=self.args.device)
        for piece in pieces:
            self.accelerator.gradient_state._set_sync_gradients(False)
            with self.accelerator.no_sync(model):
                loss += self._forward_and_backward(model, piece, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(synchronise)
        return loss + self._forward_and_backward(model, last, num_items_in_batch)

    def _forward_and_backward(self, model: nn.Module, piece: PreferenceBatch, num_items: Tensor | int | None) -> Tensor:
        # Under DeepSpeed there is bf16 without autocast.
        with adapter_casts_off(model, self.accelerator.native_amp):
            return super().training_step(model, piece, num_items)

    def floating_point_ops(self, inputs: Cut) -> int:
        """As the Trainer's, over the pieces of a batch."""
        count = super().floating_point_ops
        return sum(count(piece) for piece in pieces_of(inputs))
