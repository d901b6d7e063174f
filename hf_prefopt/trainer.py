"""`PreferenceTrainer`: transformers' Trainer with a preference objective in place of its loss.

A micro-batch is four lines: score the reference, score the batch, evaluate the objective, record. What makes steps and
evaluations exact lies beneath, in `training/`; which losses there are, how tokens are laid out and where a reference
comes from is decided elsewhere.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.collator import MicroBatchCollator
from hf_prefopt.data.mismatched import EpochOfMismatches
from hf_prefopt.data.padded import PaddedCollator
from hf_prefopt.data.shared import SharedCollator
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.objective.inputs import loss_inputs
from hf_prefopt.policy import disable_dropout, load_model, load_tokenizer, with_adapter
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.cache_fill import FillCache
from hf_prefopt.reference.cache_key import KeyedCollator
from hf_prefopt.reference.choose import choose_reference
from hf_prefopt.reference.engine import any_rank
from hf_prefopt.reference.moving import MovingReference
from hf_prefopt.reference.remembered import RememberedScores
from hf_prefopt.reporting.card import model_card
from hf_prefopt.reporting.finite import FiniteRun, Seen
from hf_prefopt.reporting.losses import SayLosses
from hf_prefopt.reporting.metrics import EvaluationRecord, RunningMeans, example_metrics
from hf_prefopt.reporting.preview import print_preview
from hf_prefopt.reporting.run_facts import card_facts
from hf_prefopt.scoring.agreement import check_scores
from hf_prefopt.scoring.forward import VOCABULARY_KL, install_scoring, score
from hf_prefopt.scoring.layout import settled_layout
from hf_prefopt.training.agreement import RanksAgree
from hf_prefopt.training.arguments import check_arguments, check_types
from hf_prefopt.training.preparing import Data, DataOrSplits
from hf_prefopt.training.trainable import refuse_frozen, refuse_stale_optimizer
from hf_prefopt.training.trials import TryingTrainer, settings_of

logger = logging.getLogger(__name__)


class PreferenceTrainer(TryingTrainer):
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
        model: a name or path (of an adapter, too: it goes on training), a transformers model or a PEFT model. Not with
            `model_init`.
        ref_model: an explicit reference, as a model of any dtype, or as a name or path, which is loaded as the policy
            is; by default see `PreferenceConfig.reference`.
        args: the configuration.
        data_collator: from prepared rows to a `PreferenceBatch`.
        train_dataset, eval_dataset: preference data, raw or prepared; `eval_dataset` may be several by name.
        processing_class: the tokenizer; by default the one beside the model's weights.
        peft_config: puts a new adapter on a model that has none.
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
        model: str | os.PathLike | PreTrainedModel | PeftModel | None = None,
        ref_model: nn.Module | str | os.PathLike | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict]], PreferenceBatch] | None = None,
        train_dataset: Data | None = None,
        eval_dataset: DataOrSplits | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **trainer_arguments: Any,
    ):
        check_types(args, ref_model, peft_config, processing_class)
        model, ref_model = (os.fspath(m) if isinstance(m, os.PathLike) else m for m in (model, ref_model))
        self.args = args = args or PreferenceConfig(output_dir="trainer_output")
        check_arguments(args, model, ref_model, data_collator, trainer_arguments)
        self.criterion, self._configured = args.build_objective(), settings_of(args)
        self._has_seen_data = self.is_in_train = False
        self._given_reference, self._peft_config = ref_model, peft_config
        self._trains = train_dataset is not None
        self._moving = MovingReference(self) if args.sync_ref_model else None
        if isinstance(ref_model, str) and self.criterion.needs_reference_model:
            self._given_reference = load_model(ref_model, args.model_init_kwargs, quantization_config)
        name = model if isinstance(model, str) else None
        if name is not None:
            model = load_model(name, args.model_init_kwargs, quantization_config)
        if model is not None:
            model = self._adopt(with_adapter(model, peft_config))
            refuse_stale_optimizer(model, trainer_arguments.get("optimizers", (None,))[0])
        if processing_class is None:
            self.model_init = trainer_arguments.get("model_init")
            processing_class = load_tokenizer(model or super().call_model_init(), args.model_init_kwargs, name)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._train_metrics, self._evaluation, self._finite = RunningMeans(), EvaluationRecord(), FiniteRun()
        padded = PaddedCollator(_pad_token_id(self.tokenizer), args.pad_to_multiple_of)
        layouts = {"padded": padded, "shared": SharedCollator()}
        self._cache_filler = FillCache(self) if args.precompute_ref_log_probs else None
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
        callbacks = (
            EpochOfMismatches(),
            SayLosses(lambda: self.criterion),
            self._cache_filler,
            self._moving,
            RanksAgree(self),
        )
        for callback in filter(None, callbacks):
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
        """Make a given model the policy: dropout, reference, scoring."""
        self.layout: str | None = None
        if self._trains:
            refuse_frozen(model)
        if self.args.disable_dropout:
            disable_dropout(model)
        needed = self.criterion.needs_reference_model
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
        self._layouts.max_tokens = self.args.max_tokens_per_batch
        if self.reference:
            self.reference.place(self.accelerator)
        models = list(dict.fromkeys((self.model, self.reference.model if self.reference else self.model)))
        with self.accelerator.autocast():
            for model in models:
                check_scores(model, self._autocast_dtype)
            if self.data_collator is self._layouts:
                asked, longest = self.args.layout, self.args.max_length
                self._layouts.layout = settled_layout(asked, models, longest, self._autocast_dtype)
        self.layout = self._layouts.layout if self.data_collator is self._layouts else "the data_collator's"

    def call_model_init(self, trial: Any = None) -> PreTrainedModel | PeftModel:
        """A fresh policy from `model_init`, with a fresh reference; in training, once the settings are known for it."""
        if self._cache_filler:
            self._cache_filler.forget()
        model = with_adapter(super().call_model_init(trial), self._peft_config)
        return model if self.is_in_train else self._adopt(model)

    # -- the step -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PreferenceBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the step's loss; with `return_outputs` also rewards and labels, `[B, 2]` each."""
        self.criterion.progress = min(1.0, self.state.global_step / max(1, self.state.max_steps))
        self.criterion.epoch = int(self.state.epoch or 0)
        training = self.model.training  # DeepSpeed's wrapper stays in training mode
        reference = self._score_reference(inputs) if training else self._remembered_reference(inputs)
        policy = self._score_policy(model, inputs, reference)
        output, loss = self._objective_loss(inputs, policy, reference, num_items_in_batch, training)
        return (loss, output) if return_outputs else loss

    def _score_policy(
        self, model: nn.Module, inputs: PreferenceBatch, reference: ResponseScores | None
    ) -> ResponseScores:
        """The policy's scores; where a loss compares whole predictions, with those that the reference makes at hand."""
        compared = VOCABULARY_KL in self.criterion.token_stats
        predictions = self.reference.predictions(reference) if compared else None
        return score(model, inputs, self.criterion.token_stats, predictions)

    def _score_reference(self, inputs: PreferenceBatch) -> ResponseScores | None:
        if self.reference is None:
            return None
        if "reference_scores" in inputs:
            return inputs["reference_scores"]
        # An engine's autocast is in the policy's forward, which a reference model of its own has not.
        with self.accelerator.autocast():
            return self.reference.score(inputs, self.criterion.reference_token_stats)

    def forget_reference_scores(self) -> None:
        """For whoever changes the reference: what evaluations remember of it holds no longer."""
        self._reference_memory.forget()

    def _remembered_reference(self, inputs: PreferenceBatch) -> ResponseScores | None:
        """The reference's scores of an evaluation batch, run once for all evaluations of a data set."""
        if self.reference is None or self._cache_filler:
            return self._score_reference(inputs)
        dataset = getattr(self.callback_handler.eval_dataloader, "dataset", None)
        fingerprint = getattr(dataset, "_fingerprint", None)
        ranks = partial(any_rank, self.accelerator)
        return self._reference_memory.score(fingerprint, inputs, self._score_reference, ranks)

    def _run_along(self, model: nn.Module, idle: PreferenceBatch) -> None:
        """An evaluation's forwards of a piece without examples: ranks of a sharded model call its layers together."""
        self._score_policy(model, idle, self._remembered_reference(idle))

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
            output = self.criterion(own, training=False)
            self._evaluation.add(inputs, own)
            return self.criterion.kind.predictions(output.rewards, own), output.loss
        everything, where = self._step_inputs(inputs, own)
        output = self.criterion(everything)
        own_output = _rows_of(output, where)
        self._train_metrics.add(example_metrics(self.criterion.kind, own_output, own))
        self._finite.add(self.state.global_step + 1, Seen.of(self.criterion, inputs["rows"], own, own_output))
        scale = self.accelerator.num_processes / (len(inputs["rows"]) if num_examples is None else num_examples)
        total, share = output.losses.sum() * scale, own_output.losses.detach().sum() * scale
        # The gradient is that of the whole batch's loss; the value is this micro-batch's part of it.
        return self.criterion.kind.predictions(own_output.rewards, own), total + (share - total.detach())

    def _loss_inputs(
        self, inputs: PreferenceBatch, policy: ResponseScores, reference: ResponseScores | None
    ) -> dict[str, Tensor]:
        names = dict.fromkeys((*self.criterion.inputs, *self.criterion.kind.metric_inputs))
        return loss_inputs(names, inputs, policy, reference)

    # -- the model card --------------------------------------------------------------------------------------------

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
            facts = card_facts(
                self.args,
                self.accelerator.unwrap_model(self.model),
                self.criterion.terms,
                self.reference.description if self.reference else None,
                self.state,
                {"training rows": self.train_dataset, "evaluation rows": self.eval_dataset},
                model_name,
                datasets,
            )
            card = model_card(facts, **metadata)
            card.save(f"{self.args.output_dir}/README.md")


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill padded rows with; the mask is made from lengths, so it may be the EOS."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _rows_of(output: LossOutput, where: slice) -> LossOutput:
    rewards = None if output.rewards is None else output.rewards[where]
    return LossOutput(
        output.losses[where], rewards, {name: values[where] for name, values in output.components.items()}
    )
