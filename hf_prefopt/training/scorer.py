"""Compute the log-probs of batches under the policy and the reference, in a layout that is exact for both models."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.collator import LoaderCollator
from hf_prefopt.objective.objective import Objective
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.cache_fill import CacheFiller
from hf_prefopt.reference.choose import choose_reference
from hf_prefopt.reference.engine import any_rank
from hf_prefopt.reference.identity import made_up_logps, warn_of_another_reference
from hf_prefopt.reference.live import LiveReference
from hf_prefopt.reference.moving import MovingReference
from hf_prefopt.reference.remembered import RememberedScores
from hf_prefopt.reporting.start_summary import StartSummary, model_text
from hf_prefopt.reporting.throughput import flops_per_position
from hf_prefopt.scoring.agreement import settle_scores
from hf_prefopt.scoring.attention import describe_attention
from hf_prefopt.scoring.dropout import switch_off_dropout
from hf_prefopt.scoring.forward import VOCABULARY_KL, base_causal_lm, install_scoring, score
from hf_prefopt.scoring.four_bits import keep_unpacked
from hf_prefopt.scoring.modes import ModuleTree, body_parameters, evaluation_mode, trained_parameters
from hf_prefopt.training.acting import acting_adapter
from hf_prefopt.training.batch_layout import CUSTOM, settle_layout
from hf_prefopt.training.policy_checks import own_logits_note, warn_of_incomparable_metric, warn_of_noise
from hf_prefopt.training.router import aux_loss_coef, settled_aux_loss
from hf_prefopt.training.saved_adapters import base_name_notes
from hf_prefopt.training.shared_layers import share_lower_layers
from hf_prefopt.training.wrapping import compiled_for_scoring


class Scorer:
    """An object that computes the scores of batches under the policy and its reference.

    Args:
        args: Settings. They are read when a model is attached.
        collator: Collator for which the scorer chooses the layout.
        ref_model: The reference, if the user passed one.
        summary: Start summary, to which the scorer adds lines about model, reference, layout and attention.

    Attributes:
        objective: The losses. They determine which statistics of each token are computed.
        reference: The reference, or `None` if the losses need no reference.
        layout: Name of the batch layout; `None` until the layout is chosen.
        tree: Modules of the policy.
        aux_loss_coef: Coefficient of the auxiliary router loss; 0 if this loss is not added.
        made_up_logps: The reference's log-probs of synthetic tokens, in nats, which identify the reference; see
            `reference.identity`. `None` if there is no reference or if it moves.
        resumed_logps: The same log-probs as saved in the checkpoint from which the run resumes.
    """

    tree: ModuleTree
    objective: Objective
    accelerator: Accelerator

    def __init__(
        self,
        args: PreferenceConfig,
        collator: LoaderCollator,
        ref_model: nn.Module | None = None,
        summary: StartSummary | None = None,
    ):
        self._args, self._collator, self._ref_model = args, collator, ref_model
        self._summary = summary or StartSummary()
        self.reference: LiveReference | CachedReference | None = None
        self.layout: str | None = None
        self._moving: MovingReference | None = None
        self._filler: CacheFiller | None = None
        self._remembered = RememberedScores()
        self._dropout: list[str] = []
        self._notes: list[str] = []
        self.aux_loss_coef = 0.0
        self._compiled: nn.Module | None = None
        self._lower: list[str] = []
        self.made_up_logps: list[float] | None = None
        self.resumed_logps: list[float] | None = None

    def attach(self, model: nn.Module, objective: Objective, accelerator: Accelerator) -> None:
        """Make a model the policy: set its dropout, choose its reference, and install the forward pass that scores.

        Raises:
            ValueError: the setting `reference` is incompatible with the model or the losses; or a loss needs log-probs
                of prompts, which a custom `data_collator` does not support.
        """
        args = self._args
        self.objective, self.accelerator = objective, accelerator
        self.layout, self._filler, self._moving, self._remembered = None, None, None, RememberedScores()
        if objective.needs_prompts and CUSTOM in self._collator.collators:
            raise ValueError(
                "a loss needs log-probs of prompts, which a custom data_collator does not support: remove data_collator"
            )
        self._collator.scores_prompts = objective.needs_prompts
        self._dropout = switch_off_dropout(model, args.disable_dropout)
        self.aux_loss_coef = objective.aux_loss_coef = aux_loss_coef(model, args.router_aux_loss_coef)
        reference = choose_reference(args.reference, model, self._ref_model, objective.needs_reference_model)
        self.tree = reference.tree if reference is not None and not reference.is_separate else ModuleTree(model)
        self.reference = reference
        for module in self._models():
            keep_unpacked(module)
            install_scoring(module, args.temperature)
        if args.sync_ref_model:
            assert reference is not None and reference.copies is not None, "a moving reference is a copy"
            share, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self._moving = MovingReference(reference.copies, share, every)
            reference.description = self._moving.description
            if self.accelerator.is_main_process:
                warn_of_incomparable_metric(args)
        if args.precompute_ref_log_probs:
            assert reference is not None, "the configuration checks that the losses need one"
            self.reference = CachedReference(
                reference, args.reference_cache_dir, args.temperature, self._autocast_dtype
            )

    @property
    def model(self) -> nn.Module:
        """The policy, without an engine's wrapper."""
        return self.tree.model

    @property
    def is_training(self) -> bool:
        """True if the policy is in training mode.

        The mode is read from the head (the output embeddings). The mode of an outer module may be wrong: DeepSpeed's
        wrapper stays in training mode, and if accelerate compiles each layer separately, it copies the outer modules.
        """
        return base_causal_lm(self.model).get_output_embeddings().training

    @property
    def live_reference(self) -> LiveReference | None:
        """The reference that can be run; `None` if there is none, or if it was freed after all scores were cached."""
        return self.reference.live if isinstance(self.reference, CachedReference) else self.reference

    def settle(self) -> bool:
        """Move the reference to its device, check the scores of both models, and choose the layout.

        Call this method when the model is on its device, before the first batch is collated. Only the first call for a
        model has an effect.

        Returns:
            True at the first call for a model, False at later calls.

        Raises:
            ValueError: the scores differ from those of the model's own logits, or the requested layout changes the
                scores.
        """
        if self.layout is not None:
            return False
        if self.reference:
            self.reference.place(self.accelerator)
        with self.accelerator.autocast(), acting_adapter(self.tree):
            self._settle_scores()
            layout = settle_layout(self._collator, self._args, self._models(), self._autocast_dtype)
        self._summary.say("layout", layout)
        self.layout = self._collator.layout
        self._settle_reference()
        self._say_how()
        return True

    def _settle_scores(self) -> None:
        """Compare the scores with the models' own logits, and warn if training mode changes the policy's results."""
        own = [base_causal_lm(model) for model in self._models() if settle_scores(model, self._autocast_dtype)]
        self._notes = [own_logits_note(own[0], self.objective, self._args.loss_type)] if own else []
        self._settle_aux_loss()
        if self.reference is not None:
            warn_of_noise(self.model, self._args, self._autocast_dtype, self.accelerator.is_main_process)

    def _settle_reference(self) -> None:
        """Compute the log-probs that identify the reference, compile the model, share lower layers, and open the cache.

        The compiled model computes scores without gradients. The lower layers are shared by policy and reference.
        """
        args = self._args
        live = self.live_reference
        self.made_up_logps = made_up_logps(live) if live is not None and self._moving is None else None
        self._compiled = compiled_for_scoring(self.accelerator, self.model)
        if isinstance(self.reference, LiveReference) and not self.reference.is_separate:
            self.reference.compiled = self._compiled
        self._lower = share_lower_layers(
            self.reference, self.tree, str(self.layout), args, self.accelerator, self.aux_loss_coef != 0
        )
        if isinstance(self.reference, CachedReference):
            silent = bool(args.disable_tqdm) or not self.accelerator.is_main_process
            self._filler = CacheFiller(
                self.reference, self.collated, self.accelerator, args.max_tokens_per_batch, silent
            )

    def _settle_aux_loss(self) -> None:
        """Check whether the policy computes an auxiliary router loss, and set its coefficient."""
        coefficient, notes = settled_aux_loss(self.model, self.aux_loss_coef, self._args.router_aux_loss_coef)
        self.aux_loss_coef = self.objective.aux_loss_coef = coefficient
        self._notes += notes

    def _say_how(self) -> None:
        """Add lines about the model, the reference and the attention to the start summary."""
        causal_lm = base_causal_lm(self.model)
        dtype = self._autocast_dtype or causal_lm.dtype
        notes = [*self._dropout, *self._notes, *base_name_notes(self.model)]
        self._summary.say("model", model_text(self.model, self._args), *notes)
        reference = self.reference.description if self.reference else "none, the losses need none"
        self._summary.say("reference", reference, *self._lower)
        self._summary.say("attention", describe_attention(causal_lm, self.accelerator.device, dtype))

    def check_resumed(self) -> None:
        """Warn if the checkpoint's run had another reference."""
        if self.resumed_logps and self.made_up_logps and self.accelerator.is_main_process:
            warn_of_another_reference(self.resumed_logps, self.made_up_logps, self.model)
        self.resumed_logps = None

    def policy_scores(
        self, model: nn.Module, batch: PreferenceBatch, reference: ResponseScores | None
    ) -> ResponseScores:
        """Compute the policy's scores, including the KL divergence from the reference if a loss needs it.

        Args:
            model: The policy, as wrapped by the engine.
            reference: Scores of the reference for the same batch.
        """
        stats, lower = self.objective.token_stats, None
        if reference is not None:
            # The reference's scores may stay in memory for the whole step, so the large hidden states are removed from
            # them.
            lower, reference.lower_states = reference.lower_states, None
        predictions = None
        if VOCABULARY_KL in stats:
            assert self.reference is not None and reference is not None, "the KL needs a reference"
            predictions = self.reference.predictions(reference)
        return score(model, batch, stats, predictions, self.aux_loss_coef != 0, lower)

    def reference_scores(self, batch: PreferenceBatch, dataset: Any = None) -> ResponseScores | None:
        """Compute the reference's scores of a batch; return `None` if the losses need no reference.

        Args:
            dataset: The evaluation dataset, for which the scores are stored for later evaluations; `None` in training.
        """
        if self.reference is None:
            return None
        if dataset is None or isinstance(self.reference, CachedReference):
            return self._run_reference(batch)
        fingerprint = getattr(dataset, "_fingerprint", None)
        ranks = partial(any_rank, self.accelerator)
        return self._remembered.score(fingerprint, batch, self._run_reference, ranks)

    def _run_reference(self, batch: PreferenceBatch) -> ResponseScores:
        if "reference_scores" in batch:
            return batch["reference_scores"]
        assert self.reference is not None
        # Engines apply autocast in the forward pass of the policy, but not of a separate reference model.
        with self.accelerator.autocast():
            return self.reference.score(batch, self.objective.reference_token_stats)

    def collect(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Compute the loss inputs of a batch without gradients, and store the reference's scores in the batch."""
        on_device = send_to_device(batch, self.accelerator.device)
        policy, reference = self.both_scores(on_device)
        if reference is not None:
            batch["reference_scores"] = reference
        return self.objective.read(on_device, policy, reference)

    def both_scores(self, batch: PreferenceBatch) -> tuple[ResponseScores, ResponseScores | None]:
        """Compute the scores of policy and reference without gradients and without dropout.

        Args:
            batch: The batch, on the device of the models.
        """
        with torch.no_grad(), evaluation_mode(self.tree), self.accelerator.autocast():
            reference = self.reference_scores(batch)
            model = self.model if self._compiled is None else self._compiled
            return self.policy_scores(model, batch, reference), reference

    def flops_per_position(self) -> float:
        """Return the model FLOPs per token of a training step; see `reporting.throughput`."""
        live = self.reference
        of_reference = live.tree.derived(body_parameters) if isinstance(live, LiveReference) else 0
        return flops_per_position(
            self.tree.derived(body_parameters), self.tree.derived(trained_parameters), of_reference
        )

    def fill_cache(self, dataset: Any, name: str) -> bool:
        """Compute the reference scores of a dataset that are not cached yet.

        Returns:
            True if all scores of the dataset are now cached. False for a stream, whose scores are computed while it is
            read, and if there is no cache.
        """
        return self._filler is not None and self._filler.fill(dataset, name)

    def flush_cache(self) -> None:
        """Write new reference scores to the cache folder. The scores of a stream are computed while it is read."""
        if self._filler is not None and isinstance(self.reference, CachedReference):
            self.reference.store.flush()

    def release_reference(self) -> None:
        """Free the memory of a reference whose scores are all cached."""
        assert isinstance(self.reference, CachedReference)
        self.reference.release()
        self._ref_model = None

    def move_reference(self, step: int) -> None:
        """Update a moving reference after an optimizer step, if an update is due."""
        if self._moving and self._moving.follow(step):
            self._remembered.forget()

    def save(self, checkpoint: Path, saves: bool) -> None:
        """Save a moving reference in a checkpoint. Call this method on every rank, with `saves=True` on one rank."""
        if self._moving:
            self._moving.save(checkpoint, saves)

    def load(self, checkpoint: Path) -> None:
        """Load a moving reference from a checkpoint."""
        if self._moving:
            self._moving.load(checkpoint)
            self._remembered.forget()

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self._args.bf16 else torch.float16 if self._args.fp16 else None

    def _models(self) -> list[nn.Module]:
        """Return the policy and, if the reference is a separate model, the reference."""
        reference = self.reference.model if self.reference else None
        return list(dict.fromkeys((self.model, self.model if reference is None else reference)))

    def collated(self, rows: list[dict[str, Any]]) -> PreferenceBatch:
        """Collate prepared rows in the chosen layout and move the batch to the device."""
        assert self.layout is not None, "settle() has chosen the layout"
        return send_to_device(self._collator.collators[self.layout](rows), self.accelerator.device)
