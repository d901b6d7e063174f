"""`PreferenceTrainer`: transformers' Trainer with a preference objective in place of its loss.

A step is four lines: score the reference, score the batch, evaluate the objective, record. Everything else here makes
the step's loss the exact mean over the examples of the global batch, evaluation exact over rows, and keeps every habit
of the Trainer. Which losses there are, how tokens are laid out and where a reference comes from is decided elsewhere.
"""

import json
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_prefopt.checkpoints import is_complete, last_complete_checkpoint
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.batch import PreferenceBatch, ResponseScores, join_examples
from hf_prefopt.data.collate import PaddedCollator
from hf_prefopt.data.group import PromptSampler, prompt_keys
from hf_prefopt.data.microbatch import MicroBatchCollator, pieces_of
from hf_prefopt.data.mismatched import EpochOfMismatches, MismatchedResponses
from hf_prefopt.data.prepare import prepare_dataset, prepared_features
from hf_prefopt.data.preview import print_preview
from hf_prefopt.data.shared import SharedCollator
from hf_prefopt.data.uneven import examples_of_first_rows, keep_examples, rows_that_count
from hf_prefopt.examples import KINDS, kind_of_columns
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.global_batch import StepInputs
from hf_prefopt.losses.inputs import loss_inputs
from hf_prefopt.policy import disable_dropout, load_model, load_tokenizer, with_adapter
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.cache_fill import FillCache
from hf_prefopt.reference.cache_key import KeyedCollator
from hf_prefopt.reference.choose import choose_reference
from hf_prefopt.reference.live import evaluation_mode
from hf_prefopt.reference.moving import MovingReference
from hf_prefopt.reference.remembered import RememberedScores
from hf_prefopt.reporting.card import model_card
from hf_prefopt.reporting.metrics import EvaluationRecord, RunningMeans, example_metrics
from hf_prefopt.reporting.run_facts import card_facts
from hf_prefopt.scoring.forward import VOCABULARY_KL, base_causal_lm, install_scoring, score
from hf_prefopt.scoring.layout import reason_against_shared

logger = logging.getLogger(__name__)

OBJECTIVE_STATE = "objective_state.json"
Data = Dataset | IterableDataset
DataOrSplits = Data | dict[str, Data]


class PreferenceTrainer(Trainer):
    """Aligns a causal language model with preference data, offline.

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
        model: a name or path, a transformers model or a PEFT model. Not with `model_init`.
        ref_model: an explicit reference, as a model of any dtype, or as a name or path, which is loaded as the policy
            is; by default see `PreferenceConfig.reference`.
        args: the configuration.
        data_collator: from prepared rows to a `PreferenceBatch`.
        train_dataset, eval_dataset: preference data, raw or prepared; `eval_dataset` may be several by name.
        processing_class: the tokenizer; by default the one beside the model's weights.
        peft_config: puts a new adapter on the model.
        quantization_config: used when the model is loaded by name.
        Everything else is `Trainer`'s: `model_init`, `compute_metrics`, `callbacks`, `optimizers`, ….
            `compute_metrics` gets the implicit rewards `[rows, 2]` as predictions and (1, 0) per row as labels; a loss
            without rewards gives the log-probs instead. Unpaired examples have one column and their label, lists one
            for each response and 1 for the best.

    Raises:
        ValueError: the data, the model, the reference and the losses do not fit together.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: nn.Module | str | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict]], PreferenceBatch] | None = None,
        train_dataset: Data | None = None,
        eval_dataset: DataOrSplits | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **trainer_arguments: Any,
    ):
        self.args = args = args or PreferenceConfig(output_dir="trainer_output")
        self.objective = args.build_objective()
        self._has_seen_data = False
        self._given_reference, self._peft_config = ref_model, peft_config
        self._moving = MovingReference(self) if args.sync_ref_model else None
        if self._moving and ref_model is not None:
            raise ValueError("sync_ref_model=True moves a frozen copy of what trains, not a ref_model: leave it out")
        if isinstance(ref_model, str) and self.objective.needs_reference_model:
            self._given_reference = load_model(ref_model, args.model_init_kwargs, quantization_config)
        if isinstance(model, str):
            model = load_model(model, args.model_init_kwargs, quantization_config)
        if model is not None:
            model = self._adopt(model)
        elif trainer_arguments.get("model_init") is None:
            raise ValueError("PreferenceTrainer wants a model, or a model_init that makes one")
        if processing_class is None:
            processing_class = load_tokenizer(model or trainer_arguments["model_init"](), args.model_init_kwargs)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._train_metrics, self._evaluation = RunningMeans(), EvaluationRecord()
        padded = PaddedCollator(_pad_token_id(self.tokenizer), args.pad_to_multiple_of)
        layouts = {"padded": padded, "shared": SharedCollator()}
        self._cache_filler = FillCache(self) if args.precompute_ref_log_probs else None
        if self._cache_filler and data_collator is not None:
            raise ValueError("precompute_ref_log_probs=True finds responses by keys that a data_collator does not give")
        if self._cache_filler:
            layouts = {name: KeyedCollator(collator) for name, collator in layouts.items()}
        self._layouts = MicroBatchCollator(layouts, max_tokens=args.max_tokens_per_batch)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self._layouts,
            train_dataset=self._prepared(train_dataset, "train"),
            eval_dataset=self._prepared(eval_dataset, "eval"),
            processing_class=processing_class,
            **trainer_arguments,
        )
        if self.objective.needs_mismatched:
            self.add_callback(EpochOfMismatches())
        for callback in filter(None, (self._cache_filler, self._moving)):
            self.add_callback(callback)
        # compute_loss divides by the examples of the whole step itself.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) are not supported: start with `accelerate "
                "launch`, or show this process one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if args.show_first_batch and train_dataset is not None and self.is_world_process_zero():
            print_preview([next(iter(self.train_dataset))], self.tokenizer)

    # -- the model and the data -----------------------------------------------------------------------------------

    def _adopt(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        """Make a given model the policy: adapter, dropout, reference, scoring."""
        self.layout: str | None = None
        model = with_adapter(model, self._peft_config)
        if self.args.disable_dropout:
            disable_dropout(model)
        needed = self.objective.needs_reference_model
        self._reference_memory = RememberedScores()
        self.reference = choose_reference(self.args.reference, model, self._given_reference, needed)
        for module in {model, self.reference.model if self.reference else model}:
            install_scoring(module, self.args.temperature)
        if self.args.precompute_ref_log_probs:
            where = self.args.reference_cache_dir
            self.reference = CachedReference(self.reference, where, self.args.temperature, self._autocast_dtype)
        if self._moving:
            self.reference.description = self._moving.description
        return model

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    def _settle_layout(self) -> None:
        """Decide, once for a model, how its batches are laid out: when it is on its device, before the first batch.

        A reference model of its own follows it there.
        """
        if self.layout is not None:
            return
        if self.reference:
            self.reference.place(self.args.device)
        if self.data_collator is not self._layouts:
            self.layout = "the data_collator's"
            return
        reason = None if self.args.layout == "padded" else self._reason_against_shared()
        if reason is not None and self.args.layout == "shared":
            raise ValueError(f"layout='shared' is not exact for this model: {reason}; choose layout='auto'")
        if reason is not None:
            logger.warning("layout: padded, because %s", reason)
        self.layout = "padded" if reason is not None else self.args.layout.replace("auto", "shared")
        self._layouts.layout = self.layout

    def _reason_against_shared(self) -> str | None:
        """Why the policy, or a reference model of its own, cannot be scored in the layout "shared"."""
        for model in dict.fromkeys((self.model, self.reference.model if self.reference else self.model)):
            reason = reason_against_shared(model, self.args.max_length, self._autocast_dtype)
            if reason is not None:
                return f"{reason} ({type(base_causal_lm(model)).__name__})"
        return None

    def call_model_init(self, trial: Any = None) -> PreTrainedModel | PeftModel:
        """A fresh policy from `model_init`, with a fresh reference; the losses forget what they have seen."""
        self.objective.reset_state()
        if self._cache_filler:
            self._cache_filler.forget()
        return self._adopt(super().call_model_init(trial))

    def _prepared(self, dataset: DataOrSplits | None, name: str) -> DataOrSplits | None:
        """The data set tokenised, or each of several."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {key: self._prepared(split, key) for key, split in dataset.items()}
        with self.args.main_process_first(desc=f"tokenising {name}"):
            prepared = prepare_dataset(
                dataset,
                self.tokenizer,
                max_length=self.args.max_length,
                truncation_mode=self.args.truncation_mode,
                on_bad_rows=self.args.on_bad_rows,
                num_proc=self.args.dataset_num_proc,
                name=name,
                unpair=self.args.unpair,
            )
        self._check_examples(prepared, name)
        return prepared

    def _check_examples(self, dataset: Data, name: str) -> None:
        """Refuse a data set whose examples the losses cannot compare; losses that take several kinds take the first."""
        kind = kind_of_columns(dataset.column_names)
        if kind is not self.objective.kind and not self._has_seen_data:
            self.objective = self.args.build_objective(kind)
        self._has_seen_data = True
        losses = ", ".join(self.args.loss_type)
        if kind is not self.objective.kind:
            raise ValueError(f"{name} holds {kind.name}, and {losses} wants {self.objective.kind.wanted}")
        # The rows of a stream are looked at when they are reached.
        is_stream = not isinstance(dataset, Dataset)
        reason = None if is_stream or not len(dataset) else kind.refusal(dataset[0], self.objective.inputs)
        if reason is None and self.objective.needs_mismatched and is_stream:
            reason = "it draws responses to other prompts from the whole data set, which a stream does not give"
        if reason is not None:
            raise ValueError(f"{name} does not fit {losses}: {reason}")

    def get_eval_dataloader(self, eval_dataset: str | Data | None = None):
        """As the Trainer's; a raw data set is prepared first."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if named else self._prepared(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Data):
        """As the Trainer's; a raw data set is prepared first."""
        return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        """As the Trainer's, or by prompt where `group_by_prompt` asks for it."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        dataset = dataset.dataset if isinstance(dataset, MismatchedResponses) else dataset
        if not self.args.group_by_prompt or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        return PromptSampler(prompt_keys(dataset), self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def _get_dataloader(self, dataset: Data, *args: Any, **kwargs: Any):
        """As the Trainer's; rows get a mismatched response where a loss asks for it."""
        if self.objective.needs_mismatched:
            dataset = MismatchedResponses(dataset, self._data_seed, self.args.max_length)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        columns = dict.fromkeys(column for kind in KINDS for column in prepared_features(kind))
        self._signature_columns = [*columns, "token_weights", "mismatched_ids", "mismatched_masks"]

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments: Any):
        """As the Trainer's; with `resume_from_checkpoint=True` from the newest checkpoint that was written to its end.

        Raises:
            ValueError: the checkpoint is half of one, or there is no whole one to resume from.
        """
        newest = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint is True:
            if newest is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from: start without")
            resume_from_checkpoint = newest
        if resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            cure = f"resume from {newest}" if newest else "start without resume_from_checkpoint"
            raise ValueError(f"{resume_from_checkpoint} is no checkpoint that was written to its end: {cure}")
        return super().train(resume_from_checkpoint or None, **arguments)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's; one that is overwritten loses the sign of a whole checkpoint first."""
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """As the Trainer's, the last of what all ranks write; the state of the first rank follows when it is there."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's, with what losses keep across batches, and with a reference that moves."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._moving:
            self._moving.save(output_dir)
        if self.objective.state and self.args.should_save:
            Path(output_dir, OBJECTIVE_STATE).write_text(json.dumps(self.objective.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, with what losses keep across batches, and with a reference that moves."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._moving and checkpoint is not None:
            self._moving.load(checkpoint)
        if checkpoint is None or not self.objective.state:
            return
        saved = Path(checkpoint, OBJECTIVE_STATE)
        if saved.is_file():
            self.objective.load_state_dict(json.loads(saved.read_text()))
        else:
            logger.warning("%s has no %s: %s starts afresh", checkpoint, saved.name, ", ".join(self.objective.state))

    # -- the step -------------------------------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: PreferenceBatch | dict[str, list[PreferenceBatch]],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of a batch, piece by piece where a token budget has cut it."""
        *pieces, last = pieces_of(inputs)
        synchronise = self.accelerator.sync_gradients
        loss = torch.zeros((), device=self.args.device)
        for piece in pieces:
            self.accelerator.gradient_state._set_sync_gradients(False)
            with self.accelerator.no_sync(model):
                loss += super().training_step(model, piece, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(synchronise)
        return loss + super().training_step(model, last, num_items_in_batch)

    def floating_point_ops(self, inputs: PreferenceBatch | dict[str, list[PreferenceBatch]]) -> int:
        """As the Trainer's, over the pieces of a batch."""
        count = super().floating_point_ops
        return sum(count(piece) for piece in pieces_of(inputs))

    def _evened(self, pieces: list[PreferenceBatch]) -> list[PreferenceBatch]:
        """As many pieces on every rank."""
        if self.accelerator.num_processes == 1:
            return pieces
        count = self.accelerator.gather(torch.tensor([len(pieces)], device=self.args.device)).max().item()
        idle = keep_examples(pieces[-1], torch.zeros_like(pieces[-1]["rows"], dtype=torch.bool))
        return [*({**idle} for _ in range(count - len(pieces))), *pieces]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PreferenceBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the step's loss; with `return_outputs` also rewards and labels, `[B, 2]` each."""
        reference = self._score_reference(inputs) if model.training else self._remembered_reference(inputs)
        policy = self._score_policy(model, inputs, reference)
        output, loss = self._objective_loss(inputs, policy, reference, num_items_in_batch, model.training)
        return (loss, output) if return_outputs else loss

    def _score_policy(
        self, model: nn.Module, inputs: PreferenceBatch, reference: ResponseScores | None
    ) -> ResponseScores:
        """The policy's scores; where a loss compares whole predictions, with those that the reference makes at hand."""
        compared = VOCABULARY_KL in self.objective.token_stats
        predictions = self.reference.predictions(reference) if compared else None
        return score(model, inputs, self.objective.token_stats, predictions)

    def _score_reference(self, inputs: PreferenceBatch) -> ResponseScores | None:
        if self.reference is None:
            return None
        if "reference_scores" in inputs:
            return inputs["reference_scores"]
        # An engine's autocast is in the policy's forward, which a reference model of its own has not.
        with self.accelerator.autocast():
            return self.reference.score(inputs, self.objective.reference_token_stats)

    def forget_reference_scores(self) -> None:
        """For whoever changes the reference: what evaluations remember of it holds no longer."""
        self._reference_memory.forget()

    def _remembered_reference(self, inputs: PreferenceBatch) -> ResponseScores | None:
        """The reference's scores of an evaluation batch, run once for all evaluations of a data set."""
        if self.reference is None or self._cache_filler:
            return self._score_reference(inputs)
        dataset = getattr(self.callback_handler.eval_dataloader, "dataset", None)
        fingerprint = getattr(dataset, "_fingerprint", None)
        return self._reference_memory.score(fingerprint, inputs, self._score_reference)

    def _objective_loss(
        self,
        inputs: PreferenceBatch,
        policy: ResponseScores,
        reference: ResponseScores | None,
        num_examples: Tensor | int | None,
        training: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The objective on a micro-batch, recorded, and scaled so that a step's micro-batches add up to its mean."""
        own = self._loss_inputs(inputs, policy, reference)
        if not training:
            output = self.objective(own)
            self._evaluation.add(inputs, own)
            return self.objective.kind.predictions(output.rewards, own), output.loss
        everything, where = self._step_inputs(inputs, own)
        output = self.objective(everything)
        own_output = _rows_of(output, where)
        self._train_metrics.add(example_metrics(self.objective.kind, own_output, own))
        scale = self.accelerator.num_processes / (len(inputs["rows"]) if num_examples is None else num_examples)
        total, share = output.losses.sum() * scale, own_output.losses.detach().sum() * scale
        # The gradient is that of the whole batch's loss; the value is this micro-batch's part of it.
        return self.objective.kind.predictions(own_output.rewards, own), total + (share - total.detach())

    def _loss_inputs(
        self, inputs: PreferenceBatch, policy: ResponseScores, reference: ResponseScores | None
    ) -> dict[str, Tensor]:
        names = dict.fromkeys((*self.objective.inputs, *self.objective.kind.metric_inputs))
        return loss_inputs(names, inputs, policy, reference)

    def _step_inputs(self, inputs: PreferenceBatch, own: dict[str, Tensor]) -> tuple[dict[str, Tensor], slice]:
        """The inputs that the objective is evaluated on, and where this micro-batch's stand among them."""
        if not self.objective.needs_global_batch:
            return own, slice(None)
        step, index = inputs.get("step_inputs") or (StepInputs(self.accelerator, lambda: [own]), 0)
        if index == 0:
            self.objective.update_state(step.everything)
        return step.splice(index, own)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step and its number of examples; for batch-wise losses, tied together."""
        self._settle_layout()
        batches = list(islice(epoch_iterator, num_batches))
        if batches:
            batches[-1] = self._without_repeats(batches[-1])
        num_examples = self._get_num_items_in_batch(batches, device)
        if self.args.max_tokens_per_batch is not None:
            batches = [{"pieces": self._evened(pieces_of(batch))} for batch in batches]
        pieces = [piece for batch in batches for piece in pieces_of(batch)]
        if self.objective.needs_global_batch and len(pieces) > 1:
            step = StepInputs(self.accelerator, lambda: self._collect(pieces))
            for index, piece in enumerate(pieces):
                piece["step_inputs"] = (step, index)
        return batches, num_examples

    def _without_repeats(self, batch: PreferenceBatch | dict[str, list[PreferenceBatch]]):
        """A training batch without the examples of rows that are repeated at the end of the data."""
        pieces = pieces_of(batch)
        counted = self._counted(pieces, self._train_batch_size)
        if counted is None:
            return batch
        pieces = [keep_examples(piece, kept) for piece, kept in zip(pieces, counted, strict=True)]
        return {"pieces": pieces} if "pieces" in batch else pieces[0]

    def _counted(self, pieces: list[PreferenceBatch], share: int) -> list[Tensor] | None:
        """For each piece of a batch of `share` rows, which examples count; `None` where all do. See `data.uneven`."""
        state, world_size = self.accelerator.gradient_state, self.accelerator.num_processes
        if world_size == 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return None
        dataset = state.active_dataloader.dataset
        if isinstance(dataset, torch.utils.data.IterableDataset | IterableDataset):
            return None  # a stream does not say how many rows it has
        return examples_of_first_rows(
            pieces, rows_that_count(len(dataset), share, self.accelerator.process_index, world_size)
        )

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

    def _get_num_items_in_batch(self, batch_samples: list[PreferenceBatch], device: torch.device) -> Tensor | int:
        """The examples of a step: those of its micro-batches on all ranks."""
        count = sum(len(piece["rows"]) for batch in batch_samples for piece in pieces_of(batch))
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")

    # -- evaluation and logs --------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(mean loss of the batch, rewards `[B, 2]`, labels `[B, 2]`)."""
        with torch.no_grad(), self.compute_loss_context_manager():
            pieces = pieces_of(self._prepare_inputs(inputs))
            counted = self._counted(pieces, self.args.eval_batch_size)
            if counted is not None:
                pieces = [{**piece, "counted": examples} for piece, examples in zip(pieces, counted, strict=True)]
            outputs = [self.compute_loss(model, piece, return_outputs=True) for piece in pieces]
        loss = torch.stack([loss for loss, _ in outputs]).mean()
        if prediction_loss_only:
            return loss, None, None
        # The Trainer fills up what is shorter with −100, too.
        names = ("predictions", "labels")
        return loss, *(join_examples([output[name] for _, output in outputs], fill=-100.0) for name in names)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """As the Trainer's, with the loss and every metric taken over the rows and not over the batches."""
        self._settle_layout()
        if self._cache_filler:
            self._cache_filler.fill(dataloader.dataset, description.lower())
        self._evaluation = EvaluationRecord()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._evaluation.metrics(self.objective)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._evaluation = EvaluationRecord()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a training log also carries the means of the metrics since the last one."""
        if "loss" in logs:
            logs.update(self.objective.kind.conclude(self._train_metrics.pop(self.accelerator)))
        super().log(logs, start_time)

    def create_model_card(
        self, *_: Any, model_name: str | None = None, dataset: str | list[str] | None = None, **metadata: Any
    ) -> None:
        """Writes the run's model card, `README.md`, into `output_dir`; `push_to_hub` passes its arguments on to here.

        Args:
            model_name: the card's title; by default the name of the repository or of the output folder.
            dataset: the name or names of the data, on the Hub or local.
            metadata: further metadata of the Hub, such as `license="apache-2.0"` or `language="en"`.
        """
        if self.is_world_process_zero():
            datasets = [dataset] if isinstance(dataset, str) else dataset or []
            card = model_card(card_facts(self, model_name, datasets), **metadata)
            card.save(f"{self.args.output_dir}/README.md")


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill padded rows with; the mask is made from lengths, so it may be the EOS."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _rows_of(output: LossOutput, where: slice) -> LossOutput:
    rewards = None if output.rewards is None else output.rewards[where]
    return LossOutput(
        output.losses[where], rewards, {name: values[where] for name, values in output.components.items()}
    )
