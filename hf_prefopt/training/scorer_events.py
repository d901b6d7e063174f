"""Callbacks that choose the layout, fill the cache of reference scores, and move the reference at the right time."""

from collections.abc import Callable, Mapping
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hf_prefopt.reference.choose import refuse_moved
from hf_prefopt.training.policy_checks import warn_of_lost_steps
from hf_prefopt.training.scorer import Scorer
from hf_prefopt.training.trainable import refuse_foreign_optimizer


class SettleScorer(TrainerCallback):
    """Callback that chooses the layout when training begins, after the model was wrapped and a checkpoint was loaded.

    Before a step, it checks the reference if the number of parameters that the optimizer trains has changed.
    """

    def __init__(self, scorer: Scorer):
        self._scorer = scorer
        self._trained = 0

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        """Check the optimizer, and choose the layout before the start summary is shown and before a cache is filled."""
        if self._scorer.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            refuse_foreign_optimizer(self._scorer.model, optimizer)
            warn_of_lost_steps(self._scorer.model, args)
        self._scorer.settle()
        self._scorer.check_resumed()
        self._trained = 0

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        """Check that the step does not change the reference."""
        trained = sum(tensor.requires_grad for group in optimizer.param_groups for tensor in group["params"])
        if trained != self._trained and self._scorer.live_reference is not None:
            refuse_moved(self._scorer.live_reference, self._scorer.model)
        self._trained = trained


class ScorerEvents(TrainerCallback):
    """Callback that fills the cache of reference scores and updates a moving reference.

    With a cache, the reference scores of a dataset are computed before its first batch is read, and those of a stream
    while it is read. If the scores of the training data are then all cached, the reference model may be freed.
    Mismatched responses (responses to other prompts) change in every epoch, so the scores of the training data are then
    computed at the beginning of each epoch.

    Args:
        scorer: The scorer.
        evaluated: Function that returns the datasets of the evaluation data loaders, after all preprocessing, keyed by
            name.
        keeps_reference: True if a later run of the same trainer may need the reference model.
    """

    def __init__(self, scorer: Scorer, evaluated: Callable[[], Mapping[str, Any]], keeps_reference: bool):
        self._scorer, self._evaluated, self._keeps_reference = scorer, evaluated, keeps_reference

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        """Fill the cache. `SettleScorer` has already chosen the layout."""
        if not args.precompute_ref_log_probs:
            return
        for name, dataset in self._evaluated().items():
            self._scorer.fill_cache(dataset, name)
        if self._scorer.objective.needs_mismatched:
            return
        if self._scorer.fill_cache(train_dataloader.dataset, "train") and not self._keeps_reference:
            self._scorer.release_reference()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        """Fill the cache for the mismatched responses of this epoch."""
        if self._scorer.objective.needs_mismatched:
            self._scorer.fill_cache(train_dataloader.dataset, "train")

    def on_step_end(self, args, state, control, **_):
        """Update a moving reference, before any evaluation or checkpoint of this step."""
        self._scorer.move_reference(state.global_step)

    def on_save(self, args, state, control, **_):
        """Write new reference scores to the cache after each checkpoint."""
        self._scorer.flush_cache()

    def on_evaluate(self, args, state, control, **_):
        """Write new reference scores to the cache after each evaluation."""
        self._scorer.flush_cache()

    def on_train_end(self, args, state, control, **_):
        """Write new reference scores to the cache at the end of training."""
        self._scorer.flush_cache()
