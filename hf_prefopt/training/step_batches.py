"""Draw the batches of each optimizer step from the data loader."""

import logging
from collections.abc import Iterator
from itertools import islice

from transformers import TrainerState, TrainingArguments

from hf_prefopt.batch import LoaderBatch
from hf_prefopt.data.collator import check_loaded
from hf_prefopt.reporting.run_facts import NOTHING_TRAINED
from hf_prefopt.training.checkpoints import begun_at
from hf_prefopt.training.stream_shards import ShardedRanks

logger = logging.getLogger(__name__)


class StepBatches:
    """An object that draws the batches of each step. If too few are left in an epoch, they go into the next epoch.

    Args:
        checkpoint: Checkpoint from which the run resumes; `None` if the run starts from the beginning.
        ranks: Object that evens out the numbers of batches, if the ranks read different shards of a stream; `None`
            otherwise.
    """

    def __init__(self, checkpoint: str | None = None, ranks: ShardedRanks | None = None):
        self._checkpoint, self._begun_at, self._ranks = checkpoint, begun_at(checkpoint), ranks
        self._left_over: list[LoaderBatch] = []
        self._ended: Iterator[LoaderBatch] | None = None
        self._ended_short = False

    def draw(self, loaded: Iterator[LoaderBatch], count: int, state: TrainerState) -> list[LoaderBatch]:
        """Return the `count` batches of the next step; [] if the epoch has fewer batches left, or if the run has ended.

        Raises:
            ValueError: a stream ended before the row at which training resumes.
        """
        if 0 < state.max_steps <= state.global_step:
            return []  # The run resumes at its last step. The Trainer would make one more step.
        if loaded is self._ended:
            return []  # The Trainer asks for batches until max_steps, even if the epoch has ended.
        batches = [*self._left_over, *map(check_loaded, islice(loaded, count - len(self._left_over)))]
        most = len(batches)
        if self._ranks is not None:
            batches, most = self._ranks.even(batches, count)
        if not most and 0 < self._begun_at == state.global_step:
            raise ValueError(
                f"the training stream ended before step {self._begun_at}, where training resumes: set "
                "ignore_data_skip=True to continue with the first rows of the stream"
            )
        self._ended_short = len(batches) < count
        self._left_over = batches if self._ended_short else []
        self._ended = loaded if self._ended_short else None
        return [] if self._ended_short else batches

    def check_end(self, state: TrainerState, args: TrainingArguments) -> None:
        """Warn if the run has made no step.

        Raises:
            ValueError: a new run has made no step, because its stream has too few rows.
        """
        if state.global_step == 0 and self._ended_short:
            raise ValueError(f"nothing was trained: {self._reason(args)}")
        if state.global_step == 0:
            logger.warning(NOTHING_TRAINED)
        elif self._checkpoint is not None and state.global_step == self._begun_at:
            logger.warning(
                "nothing was trained: %s is at step %d, and the run ends at step %d",
                self._checkpoint,
                self._begun_at,
                state.max_steps,
            )

    def _reason(self, args: TrainingArguments) -> str:
        if not self._left_over:
            return "the training stream has no usable row"
        return (
            f"the training stream has only {len(self._left_over)} batches, but a step needs "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} batches: lower this setting"
        )
