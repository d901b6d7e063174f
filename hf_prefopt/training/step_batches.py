"""The batches of each optimizer step of a run, as they come from the data loader."""

import logging
from collections.abc import Iterator
from itertools import islice

from transformers import TrainerState, TrainingArguments

from hf_prefopt.batch import LoaderBatch
from hf_prefopt.data.collator import check_loaded
from hf_prefopt.training.checkpoints import begun_at

logger = logging.getLogger(__name__)


class StepBatches:
    """Draws whole steps: the last batches of a stream that do not fill one begin the next epoch's first step.

    Args:
        checkpoint: the one that the run resumes from; `None` if it starts from the beginning.
    """

    def __init__(self, checkpoint: str | None = None):
        self._checkpoint, self._begun_at = checkpoint, begun_at(checkpoint)
        self._left_over: list[LoaderBatch] = []
        self._ended_short = False

    def draw(self, loaded: Iterator[LoaderBatch], count: int, state: TrainerState) -> list[LoaderBatch]:
        """The `count` batches of the next step, or none if the epoch has too few left or the run has ended.

        Raises:
            ValueError: a stream has ended before the place at which training resumes.
        """
        if 0 < state.max_steps <= state.global_step:
            return []  # resumed from its end, where the Trainer would make one more step
        batches = [*self._left_over, *map(check_loaded, islice(loaded, count - len(self._left_over)))]
        if not batches and 0 < self._begun_at == state.global_step:
            raise ValueError(
                f"the stream of the training data ended before step {self._begun_at}, where training resumes; it is "
                "read once from its beginning: set ignore_data_skip=True to continue with its first rows"
            )
        self._ended_short = len(batches) < count
        self._left_over = batches if self._ended_short else []
        return [] if self._ended_short else batches

    def check_end(self, state: TrainerState, args: TrainingArguments) -> None:
        """Warn if a resumed run has made no step.

        Raises:
            ValueError: a run from the beginning has made none, because its stream has too few rows.
        """
        if state.global_step == 0 and self._ended_short:
            raise ValueError(f"nothing was trained: {self._reason(args)}")
        if self._checkpoint is not None and state.global_step == self._begun_at:
            logger.warning(
                "nothing was trained: %s is of step %d, and the run ends at step %d",
                self._checkpoint,
                self._begun_at,
                state.max_steps,
            )

    def _reason(self, args: TrainingArguments) -> str:
        if not self._left_over:
            return "the stream of the training data gave no row that can be used"
        return (
            f"the stream of the training data gave {len(self._left_over)} batches, and a step takes "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} of them: lower it"
        )
