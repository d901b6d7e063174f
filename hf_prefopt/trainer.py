"""`PreferenceTrainer`: transformers' Trainer with a preference objective as its loss.

A batch passes through `get_batch_samples`, `training_step` and `compute_loss`. These methods use four objects.
`PreferenceData` prepares the rows and builds samplers. `Scorer` computes log-probs under the policy and the reference.
`GlobalBatch` makes the loss of each step the exact mean over its examples. `Evaluation` collects the results of an
evaluation.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HPSearchBackend

from hf_prefopt.batch import LoaderBatch, PreferenceBatch
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.config_names import refuse_foreign_arguments
from hf_prefopt.data.collator import check_loaded
from hf_prefopt.data.unpaired import EpochOfMismatches
from hf_prefopt.objective.objective import Objective
from hf_prefopt.reporting.card import CardFacts, model_card
from hf_prefopt.reporting.evaluated import EvaluatedSets
from hf_prefopt.reporting.finite import ruined_weights
from hf_prefopt.reporting.metrics import Evaluation, TrainingRecord
from hf_prefopt.reporting.observed import observe
from hf_prefopt.reporting.preview import print_preview
from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.run_facts import card_facts
from hf_prefopt.reporting.start_summary import StartSummary, loss_texts
from hf_prefopt.reporting.throughput import Throughput
from hf_prefopt.scoring.modes import adapter_casts_off, body_parameters, light_train
from hf_prefopt.training.activations import check_activations, keep_attention, offloaded
from hf_prefopt.training.arguments import check_arguments, check_types, refuse_empty_epoch, refuse_missing
from hf_prefopt.training.batch_layout import loader_collator
from hf_prefopt.training.best_metric import check_best_metric
from hf_prefopt.training.engines import (
    accept_model,
    begin_evaluation,
    begin_training,
    keep_output_precision,
    make_room,
    refuse_first_fsdp,
    refuse_other_precision,
)
from hf_prefopt.training.global_batch import GlobalBatch, gather_examples, join_outputs
from hf_prefopt.training.models import load_models
from hf_prefopt.training.preference_data import Data, DataOrSplits
from hf_prefopt.training.replicas import RanksAgree, refuse_drifted
from hf_prefopt.training.saved_adapters import load_adapters, refuse_adapter_alone, set_base_name, with_frozen_adapters
from hf_prefopt.training.saved_run import SavedRun
from hf_prefopt.training.scorer import Scorer
from hf_prefopt.training.scorer_events import ScorerEvents, SettleScorer
from hf_prefopt.training.settings import OwnSettings, evaluation_loss
from hf_prefopt.training.step_batches import StepBatches
from hf_prefopt.training.stream_shards import ShardedRanks, is_split_by_shards
from hf_prefopt.training.trainable import check_trainable, refuse_another_model, refuse_frozen
from hf_prefopt.training.wrapping import settle_before_wrapping

logger = logging.getLogger(__name__)


class PreferenceTrainer(Trainer):
    """Trainer for offline preference optimization of causal language models.

    Example:
        ```python
        trainer = PreferenceTrainer(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            args=PreferenceConfig(output_dir="aligned", loss_type="dpo", learning_rate=2e-4),
            train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
            peft_config=LoraConfig(target_modules="all-linear"),
        )
        trainer.train()
        ```

    Args:
        model: A transformers model, a PEFT model, or the name or path of a model or an adapter. A given adapter is
            trained further. Cannot be combined with `model_init`.
        ref_model: The reference: a model of any dtype, or the name or path of a model. A reference given by name is
            loaded with the same options as the policy. Default: see `PreferenceConfig.reference`.
        args: The configuration.
        data_collator: Function that collates prepared rows into a `PreferenceBatch`.
        train_dataset: Preference data, either raw or already prepared by this package.
        eval_dataset: Preference data, either raw or already prepared, or a dict of such datasets.
        processing_class: The tokenizer. Default: the tokenizer saved with the model.
        peft_config: Configuration of a new adapter, for a model without an adapter.
        quantization_config: Quantization options, used if the model is loaded by name.
        model_init: Function that returns a model, as in `Trainer`. It is passed instead of `model`.
        **trainer_arguments: All other arguments of `Trainer`. For pairs, `compute_metrics` and
            `preprocess_logits_for_metrics` get the implicit rewards `[examples, 2]` as predictions, and labels of the
            same shape with (1, 0) for each pair. If the loss has no rewards, the predictions are log-probs. For
            unpaired examples, there is one column, and the labels are those of the data. For lists, there is one
            column per response, and the label of the best response is 1.

    Attributes:
        criterion: The objective.
        evaluated: The examples of the first and the last evaluation of each dataset.
        run_record: Record of the run, written by `console.finish_run` and shown in the model card.

    Raises:
        ValueError: the data, the model, the reference and the losses are incompatible.
    """

    args: PreferenceConfig
    model: nn.Module
    # Named `criterion`, because `Trainer.objective` is the metric of a hyperparameter search.
    criterion: Objective
    global_batch: GlobalBatch
    evaluation: Evaluation
    run_record: RunRecord | None = None

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | PeftModel | None = None,
        ref_model: nn.Module | str | os.PathLike | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict]], PreferenceBatch] | None = None,
        train_dataset: Data | None = None,
        eval_dataset: DataOrSplits | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **trainer_arguments: Any,
    ):
        check_types(args, ref_model, peft_config, processing_class)
        args = args or PreferenceConfig(output_dir="trainer_output")
        check_arguments(
            args, model_init if model is None else model, ref_model, data_collator, train_dataset, trainer_arguments
        )
        models = load_models(args, model, ref_model, model_init, peft_config, quantization_config, processing_class)
        models.check(trainer_arguments.get("optimizers", (None,))[0], trains=train_dataset is not None)
        if processing_class is None:
            processing_class = models.processing_class()
        self.data = models.data(processing_class)
        collator = loader_collator(args, self.data.pad_token_id, data_collator)
        make_room(args.mixed_precision)
        super().__init__(
            model=models.policy,
            args=args,
            data_collator=cast("Callable[[list[Any]], dict[str, Any]]", collator),
            train_dataset=self.data.prepare_training(train_dataset),
            eval_dataset=self.data.prepare(eval_dataset, "eval"),
            processing_class=processing_class,
            model_init=cast("Callable[..., PreTrainedModel] | None", models.model_init),
            **trainer_arguments,
        )
        refuse_first_fsdp(self.accelerator)
        self.settings, self.summary, self.evaluated = OwnSettings(args), StartSummary(), EvaluatedSets()
        self.scorer = Scorer(args, collator, models.reference, self.summary)
        self.throughput = Throughput(self.scorer.flops_per_position)
        self._saved, self._steps = SavedRun(args, self.scorer), StepBatches()
        self._attach_model()
        self._add_callbacks()
        # compute_loss divides by the number of examples in the whole step, so the Trainer must not divide again.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        if args.show_first_batch and train_dataset is not None and self.is_world_process_zero():
            print_preview([next(iter(cast(Data, self.train_dataset)))], self.data.tokenizer)

    def _add_callbacks(self) -> None:
        events = ScorerEvents(self.scorer, self._evaluated, keeps_reference=self.model_init is not None)
        self._needed = (EpochOfMismatches(), SettleScorer(self.scorer), self.settings, events, RanksAgree())
        for callback in (*self._needed[:2], self.summary, *self._needed[2:], self.throughput):
            self.add_callback(callback)

    def _attach_model(self) -> None:
        """Prepare the model for the objective, at construction and again for each new model from `model_init`."""
        if self.train_dataset is not None:
            refuse_frozen(self.model)
        self._eval_dataloaders = {}  # Loaders with persistent workers would keep the layout of the previous model.
        self._use(self.data.objective)
        accept_model(self.accelerator, self.model, self.args.mixed_precision)
        check_activations(self.args, self.model, self.accelerator)
        set_base_name(self.model, self.args.hub_base_model)
        self.scorer.attach(self.model, self.criterion, self.accelerator)
        self.evaluated.forget()

    def _use(self, objective: Objective) -> None:
        self.criterion = self.scorer.objective = objective
        objective.aux_loss_coef = self.scorer.aux_loss_coef
        self.global_batch = GlobalBatch(self.accelerator, objective, self.args.dataloader_drop_last)
        self.evaluation, self.record = Evaluation(objective), TrainingRecord(objective)
        self.summary.say("loss", *loss_texts(objective))

    @property
    def reference(self):
        """The reference, or `None` if the losses need no reference."""
        return self.scorer.reference

    @property
    def layout(self) -> str | None:
        """The batch layout: "shared", "around" or "padded"; `None` until training or evaluation begins."""
        return self.scorer.layout

    # -- a step ---------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the batches of a step, and the number of examples in the step.

        See `StepBatches.draw` and `GlobalBatch.begin_step`.

        Raises:
            RuntimeError: another trainer has used the model in a different precision since training began.
            ValueError: a stream ended before the row at which training resumes.
        """
        refuse_other_precision(self.accelerator, self.model, self.args.mixed_precision)
        self.scorer.settle()
        if self.record.is_full:
            self.record.check(self.accelerator)
        batches = self._steps.draw(epoch_iterator, num_batches, self.state)
        self.throughput.drew(batches)
        if not batches:
            return [], None
        return batches, self.global_batch.begin_step(
            batches, self._train_batch_size, self.scorer.collect, self.args.max_tokens_per_batch is not None
        )

    def training_step(  # type: ignore[override]  # our batches
        self, model: nn.Module, inputs: LoaderBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the forward and backward pass of each piece of a batch (see `LoaderBatch`).

        Gradients are synchronized across ranks in the backward pass of the last piece.
        """
        state, *pieces = self.accelerator.gradient_state, *inputs["pieces"]
        loss, synchronizes = torch.zeros((), device=self.args.device), self.accelerator.sync_gradients
        tree = self.scorer.tree
        # DeepSpeed computes in bf16 without autocast.
        offload = offloaded(self.args.activation_offloading, tree, self.args.device)
        with tree.held(), light_train(tree), adapter_casts_off(tree, self.accelerator.native_amp), offload:
            for piece in pieces[:-1]:
                state._set_sync_gradients(False)
                with self.accelerator.no_sync(model):
                    loss += super().training_step(model, cast(dict, piece), num_items_in_batch)
            state._set_sync_gradients(synchronizes)
            return loss + super().training_step(model, cast(dict, pieces[-1]), num_items_in_batch)

    def compute_loss(  # type: ignore[override]  # our batches
        self,
        model: nn.Module,
        inputs: PreferenceBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one piece of a batch (see `LoaderBatch`).

        In training, this is the piece's share of the loss of the step. In evaluation, it is the mean loss over the
        examples of the piece. With `return_outputs`, also return the predictions and the labels, `[B, 2]` each for
        pairs.
        """
        if "pieces" in inputs:
            raise ValueError("compute_loss expects one piece of a batch: call it for each piece in batch['pieces']")
        objective, state = self.criterion, self.state
        objective.progress = min(1.0, state.global_step / max(1, state.max_steps))
        objective.epoch = int(state.epoch or 0)
        is_training = self.scorer.is_training
        known_as = None if is_training else self.evaluation.dataset
        reference = self.scorer.reference_scores(inputs, known_as)
        policy = self.scorer.policy_scores(model, inputs, reference)
        own = objective.read(inputs, policy, reference)
        own |= observe(objective.kind, inputs, own, policy, reference)
        if is_training:
            output, loss = self.global_batch.loss(inputs, own, num_items_in_batch)
            self.record.add(state.global_step + 1, inputs["rows"], own, output)
        else:
            output = self.evaluation.add(inputs, own)
            loss = output.loss
        return (loss, objective.kind.predictions(output.rewards, own)) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate FLOPs as the Trainer does, but do not count the parameters of the model again for every batch."""
        return 6 * inputs["input_ids"].numel() * self.scorer.tree.derived(body_parameters)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does. Training logs also have the mean of each metric since the previous training log.

        Raises:
            FloatingPointError: a loss since the previous log, the gradient or, in the last log of a run, a weight is
                not finite.
        """
        if "train_loss" in logs:  # the last log of a run
            self.record.check(self.accelerator, ruined_weights(self.model))
        if "loss" in logs:
            logs.update(self.record.pop_means(self.accelerator, logs.get("grad_norm")))
            logs.update(self.throughput.pop(self.accelerator))
        super().log(logs, start_time)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        """Evaluate as the Trainer does, but compute the loss and every metric over rows instead of over batches.

        Raises:
            FloatingPointError: the loss of a row, or of an earlier training step, is not finite.
            ValueError: the engine cannot evaluate before training.
        """
        self.record.check(self.accelerator)
        begin_evaluation(self.accelerator, self.model, self.args.mixed_precision)
        if self.scorer.settle() and not self.is_in_train and self.is_world_process_zero():
            self.summary.show("layout")
        self.scorer.fill_cache(dataloader.dataset, description.lower())
        self.evaluation = Evaluation(self.criterion, dataloader.dataset, self.args.eval_accumulation_steps)
        # The Trainer's own gather function truncates the last batch to its number of rows, but a row may have several
        # examples.
        self.gather_function = partial(gather_examples, self.accelerator)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = self.evaluation.metrics(f"evaluation at step {self.state.global_step}")
        metrics |= self.evaluated.keep(metric_key_prefix, self.state.global_step, self.evaluation.examples)
        assert output.metrics is not None, "the Trainer returns its own metrics"
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.evaluation = Evaluation(self.criterion)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss of the batch, the predictions, and the labels.

        Predictions and labels are `[B, 2]` for pairs. They are `None` with `prediction_loss_only`.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            batch = self._prepare_inputs(check_loaded(inputs))
            pieces, splits = batch["pieces"], self.args.max_tokens_per_batch is not None
            # The ranks of a sharded model must run its layers at the same time, so all ranks must run equally many
            # pieces.
            for piece in self.global_batch.begin_evaluation(batch, self.args.eval_batch_size, splits):
                self.scorer.policy_scores(model, piece, self.scorer.reference_scores(piece, self.evaluation.dataset))
            results = [self.compute_loss(model, piece, return_outputs=True) for piece in pieces]
        losses, outputs = zip(*results, strict=True)
        loss = self.evaluation.returned(losses, pieces)
        return (loss, None, None) if prediction_loss_only else (loss, *join_outputs(pieces, outputs))

    # -- data -----------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | Data | None = None):
        """Return the Trainer's data loader. A raw dataset is prepared first."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # Not the Trainer's own method: with persistent workers, that method returns one loader for all datasets.
        return super().get_test_dataloader(self._prepared(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Data):
        """Return the Trainer's data loader. A raw dataset is prepared first."""
        return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def _prepared(self, dataset: Data, name: str) -> Data:
        prepared = self.data.prepare(dataset, name)
        if self.data.objective is not self.criterion:
            self._use(self.data.objective)
        return prepared

    def _evaluated(self) -> dict[str, Any]:
        """Return the prepared datasets of the evaluation data loaders, keyed by the names of the evaluation sets."""
        if self.eval_dataset is None:
            return {}
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
        return {name or "eval": self.get_eval_dataloader(name).dataset for name in names}

    def _get_train_sampler(self, train_dataset: Any = None):
        """Return a sampler that groups rows by prompt or length if a setting asks for it, or else the Trainer's."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = self.data.sampler(dataset, lambda: self.layout, self._train_batch_size)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        """Return a sampler in the order of the dataset's rows, so that the predictions have the same order."""
        return SequentialSampler(eval_dataset)

    def _get_dataloader(  # type: ignore[override]  # the other arguments are passed on
        self, dataset: Data, description: str, batch_size: int, is_training: bool = False, **kwargs: Any
    ):
        """Return the Trainer's data loader for the result of `PreferenceData.to_read`. Evaluations drop no row."""
        drops_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops_last and is_training
        try:
            to_read = self.data.to_read(dataset, batch_size * self.accelerator.num_processes, is_training)
            if is_training and drops_last:
                refuse_empty_epoch(to_read, batch_size * self.accelerator.num_processes)
            return super()._get_dataloader(to_read, description, batch_size, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops_last

    def _prepare_input(self, data: Any) -> Any:
        """Move tensors to the device without casting them.

        Under DeepSpeed, the Trainer would cast floats to the dtype of the model. But the floats of a batch are scores,
        margins and weights, which only the losses use.
        """
        if not isinstance(data, Tensor):
            return super()._prepare_input(data)
        return data.to(self.accelerator.device, non_blocking=self.accelerator.non_blocking)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = self.data.columns  # type: ignore[assignment]  # annotated as None

    # -- training, searching, resuming ----------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any):  # type: ignore[override]
        """Train as the Trainer does.

        `resume_from_checkpoint=True` resumes from the complete checkpoint with the most steps.

        With `model_init`, training uses the current values in `args`, including those of the settings that
        `PreferenceConfig` adds.

        Raises:
            ValueError: a setting that `PreferenceConfig` adds was changed and there is no `model_init`; no parameter is
                trained; a callback that training needs was removed; `metric_for_best_model` is unknown; the optimizer
                has other parameters than the trained ones; the checkpoint is missing, incomplete or incompatible with
                this run; or a stream has too few rows for one step.
            RuntimeError: the ranks have different weights.
            FloatingPointError: a loss is not finite, or a weight is not finite at a checkpoint or at the end.
        """
        refuse_missing(self._needed, self.callback_handler.callbacks)
        if self.model_init is None:
            refuse_another_model(self.model, self.scorer.model)
            self.settings.refuse_changes()
            check_trainable(self.model, self.optimizer)
            self.model_wrapped = begin_training(
                self.accelerator, self.model, self.model_wrapped, self.args.mixed_precision
            )
        checkpoint = self._saved.to_resume(
            resume_from_checkpoint, self.accelerator, self.train_dataset, self._train_batch_size
        )
        keep_output_precision(self.accelerator)
        evaluating: list[Callable[..., Any]] = [type(self).evaluate, type(self).evaluation_loop]
        evaluating += [callback.on_evaluate for callback in self.callback_handler.callbacks]
        has_own = self.compute_metrics is not None
        check_best_metric(self.args, self.criterion, self.eval_dataset, has_own, evaluating)
        if self.is_world_process_zero():
            self.summary.say("data", *self.data.texts(self.train_dataset, self.eval_dataset))
        ranks = ShardedRanks(self.accelerator) if is_split_by_shards(self.train_dataset, self.args) else None
        self._attempts, self._steps = 0, StepBatches(checkpoint, ranks)
        output = super().train(checkpoint, **options)
        self._steps.check_end(self.state, self.args)
        return output

    def _inner_training_loop(self, *args: Any, **options: Any):
        """Reset the state of losses and metrics, and run the training loop.

        With `auto_find_batch_size`, the Trainer calls this method again with a smaller batch size if memory runs out.
        """
        if self._attempts and self.state.global_step:
            logger.warning(
                "auto_find_batch_size: training restarts from the weights of step %d, because the Trainer does not "
                "undo the steps before memory ran out",
                self.state.global_step,
            )
        self._attempts += 1
        self.record = TrainingRecord(self.criterion)
        self.criterion.reset_state()
        if self.args.checkpointing_keeps == "attention":
            keep_attention(self.model)
        return super()._inner_training_loop(*args, **options)

    def _wrap_model(self, model: nn.Module, training: bool = True, *others: Any) -> nn.Module:
        """Wrap the model as the Trainer does. For training, call `settle_before_wrapping` first."""
        if training:
            settle_before_wrapping(self.scorer, self.args.ddp_find_unused_parameters)
        return super()._wrap_model(model, training, *others)

    def hyperparameter_search(  # type: ignore[override]  # the other arguments are passed on
        self, hp_space=None, compute_objective=None, n_trials: int = 20, direction="minimize", **search: Any
    ):
        """Search hyperparameters as the Trainer does.

        The search may include the settings that `PreferenceConfig` adds, such as `beta`, `loss_type` or `reference`.

        Each trial starts from the settings before the search. The search restores these settings when it ends.

        Args:
            compute_objective: Function that maps evaluation metrics to the value to optimize. Default: the evaluation
                loss. If there are several evaluation datasets, the default is the mean of their losses.

        Raises:
            ValueError: the settings of a trial are invalid or incompatible with the data, or they would change the
                prepared data; or `direction` would maximize the evaluation loss.
        """
        if compute_objective is None and direction != "minimize":
            raise ValueError(f"direction={direction!r} needs compute_objective: by default the loss is minimized")
        with self.settings.restored():
            return super().hyperparameter_search(
                hp_space, compute_objective or evaluation_loss, n_trials, direction, **search
            )

    def _hp_search_setup(self, trial: Any) -> None:
        """Set the values of a trial.

        The Trainer would convert each value to the type of the old value. Settings that `PreferenceConfig` adds are set
        without this conversion.
        """
        if trial is None or self.hp_search_backend is None:
            super()._hp_search_setup(trial)
        else:
            is_space = self.hp_search_backend == HPSearchBackend.OPTUNA
            # Call hp_space only once per trial: it may draw random values.
            space, values = self.hp_space, self.hp_space(trial) if is_space else trial
            others = {name: value for name, value in values.items() if name not in self.settings.names}
            self.hp_space = lambda _: others
            super()._hp_search_setup(trial if is_space else others)
            self.hp_space, self._trial = space, trial
            self.settings.take(values, is_space)
        if self.model_init is not None:
            self.args.check()
            self.settings.refuse_late_changes()
            self.data.settle_again(self.train_dataset, self.eval_dataset)
            self._attach_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, including the state of the losses and a moving reference.

        A checkpoint that will be overwritten is first marked as incomplete.

        Raises:
            FloatingPointError: a loss or a weight is not finite.
            RuntimeError: the ranks have different weights.
        """
        self.record.check(self.accelerator, ruined_weights(self.model))
        refuse_drifted(self.model, self.args.device, f"at the checkpoint of step {self.state.global_step}")
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._saved.save(folder, self.state, self.train_dataset, self._train_batch_size)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model, including adapters that are not trained."""
        super()._save(output_dir, with_frozen_adapters(self.model, state_dict))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state, and wait for all ranks. Therefore, `trainer_state.json` is written last."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_callback_state(self) -> None:
        """Restore the callbacks' state and the losses' state."""
        self._saved.restore(self.state)
        super()._load_callback_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint, including all adapters, of which several may be active."""
        if isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            load_adapters(self.model, resume_from_checkpoint)
            return
        if not isinstance(self.model, PeftModel):
            refuse_adapter_alone(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, including all adapters and a moving reference.

        The Trainer would load only the adapter named "default". PEFT saves each of the other adapters in its own
        folder.
        """
        best = self.state.best_model_checkpoint
        assert best is not None, "the Trainer calls this method if there is a best checkpoint"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            load_adapters(self.model, best)
        self.scorer.load(Path(best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and scheduler, and a moving reference."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.scorer.load(Path(checkpoint))

    def create_model_card(  # type: ignore[override]  # metadata by name
        self, *, model_name: str | None = None, dataset: str | list[str] | None = None, **metadata: Any
    ) -> None:
        """Write the model card of the run to `README.md` in `output_dir`.

        `push_to_hub` passes its arguments to this method.

        Args:
            model_name: Title of the card. Default: the name of the repository or of the output folder.
            dataset: Names of one or more datasets: names on the Hub, or local folders.
            metadata: Additional Hub metadata, such as `license="apache-2.0"` or `language="en"`.

        Raises:
            TypeError: an argument has a name that only another library uses.
        """
        refuse_foreign_arguments(metadata)
        if self.is_world_process_zero():
            model_card(self.card_facts(model_name, dataset), **metadata).save(f"{self.args.output_dir}/README.md")

    def card_facts(self, model_name: str | None = None, dataset: str | list[str] | None = None) -> CardFacts:
        """Return the content of the model card. The arguments have the same meaning as in `create_model_card`."""
        return card_facts(
            self.args,
            self.accelerator.unwrap_model(self.model),
            self.criterion.terms,
            self.reference.description if self.reference else None,
            self.state,
            {"training rows": self.train_dataset, "evaluation rows": self.eval_dataset},
            model_name,
            [dataset] if isinstance(dataset, str) else dataset or [],
            self.summary.as_dict(),
            self.run_record,
        )
