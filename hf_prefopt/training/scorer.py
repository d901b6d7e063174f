"""Scores batches with the policy and with the reference, in the layout that is exact for both models."""

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.collator import Collator, LoaderCollator
from hf_prefopt.data.layouts import AroundCollator, PaddedCollator, SharedCollator
from hf_prefopt.objective.objective import Objective
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.cache_fill import CacheFiller
from hf_prefopt.reference.cache_key import KeyedCollator
from hf_prefopt.reference.choose import choose_reference
from hf_prefopt.reference.engine import any_rank
from hf_prefopt.reference.identity import made_up_logps, warn_of_another_reference
from hf_prefopt.reference.live import LiveReference
from hf_prefopt.reference.moving import MovingReference
from hf_prefopt.reference.remembered import RememberedScores
from hf_prefopt.reporting.start_summary import StartSummary, model_text
from hf_prefopt.reporting.throughput import flops_per_position
from hf_prefopt.scoring.agreement import settle_scores, training_noise
from hf_prefopt.scoring.attention import describe_attention
from hf_prefopt.scoring.dropout import switch_off_dropout
from hf_prefopt.scoring.forward import VOCABULARY_KL, base_causal_lm, install_scoring, score
from hf_prefopt.scoring.four_bits import keep_unpacked
from hf_prefopt.scoring.layout import made_up_batch, reason_of_length, settled_layout
from hf_prefopt.scoring.modes import ModuleTree, body_parameters, evaluation_mode, trained_parameters
from hf_prefopt.training.acting import acting_adapter
from hf_prefopt.training.base_name import base_name_notes
from hf_prefopt.training.router import aux_loss_coef, settled_aux_loss
from hf_prefopt.training.wrapping import compiled_for_scoring

logger = logging.getLogger(__name__)

CUSTOM = "the data_collator's"
NOISE = (
    "%s computes otherwise in training mode than in evaluation mode: without dropout, log-probs of made-up tokens "
    "differ by up to %.2g nats. The reference is scored in evaluation mode, so the policy differs from it before the "
    "first step. Look in the model's config for a router's jitter or noise"
)
INCOMPARABLE = (
    "metric_for_best_model=%r is measured against the reference, which moves every %d steps, so checkpoints before and "
    "after a move cannot be compared by it: choose a metric of the policy alone, such as 'logps/chosen'"
)
NEFTUNE = "NEFTune scales its noise by the length of a row, which would be that of several sequences"


def loader_collator(
    args: PreferenceConfig, pad_token_id: int, custom: Callable[[list[dict]], PreferenceBatch] | None
) -> LoaderCollator:
    """The trainer's collator, whose layout the scorer settles; a user's own collator is the only layout there is."""
    if custom is not None:
        return LoaderCollator({CUSTOM: custom}, CUSTOM)
    padded = PaddedCollator(pad_token_id, args.pad_to_multiple_of)
    layouts: dict[str, Collator] = {"shared": SharedCollator(), "around": AroundCollator(padded), "padded": padded}
    if args.precompute_ref_log_probs:
        layouts = {name: KeyedCollator(collator) for name, collator in layouts.items()}
    return LoaderCollator(layouts, max_tokens=args.max_tokens_per_batch)


class Scorer:
    """The policy and its reference, ready to score.

    Args:
        args: the settings, read when a model is attached.
        collator: its layout is settled here.
        ref_model: an explicit reference.
        summary: gets the lines on the reference, the layout and the attention.

    Attributes:
        objective: the losses, which say what must be scored.
        reference: `None` where the losses need none.
        layout: how batches are laid out; `None` until it is settled.
        tree: the policy's modules.
        aux_loss_coef: what the auxiliary loss of the policy's routers is multiplied by; 0 where it is left out.
        made_up_logps: what tells the reference from another, where it stays the same; see `reference.identity`.
        resumed_logps: the same, of the run that a checkpoint is from.
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
        """Make a model the policy: its dropout, its reference, its scoring forward.

        Raises:
            ValueError: the reference that the settings ask for contradicts the model or the losses.
        """
        args = self._args
        self.objective, self.accelerator = objective, accelerator
        self.layout, self._filler, self._moving, self._remembered = None, None, None, RememberedScores()
        if objective.needs_prompts and CUSTOM in self._collator.collators:
            raise ValueError("a loss reads log-probs of prompts, which a data_collator does not give: leave it out")
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
            copies, share, every = self.reference.copies, args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self._moving = MovingReference(copies, share, every)
            self.reference.description = self._moving.description
            self._warn_of_incomparable_metric()
        if args.precompute_ref_log_probs:
            self.reference = CachedReference(
                self.reference, args.reference_cache_dir, args.temperature, self._autocast_dtype
            )

    @property
    def model(self) -> nn.Module:
        """The policy, without an engine's wrapper."""
        return self.tree.model

    def settle(self) -> bool:
        """Place the reference, check that the models' scores are their own, and choose the layout; once for a model.

        Call it when the model is on its device, before the first batch is collated.

        Returns:
            Whether there was anything to do.

        Raises:
            ValueError: the scores are not those of the model's own logits, or the layout asked for is not exact.
        """
        if self.layout is not None:
            return False
        args, collator = self._args, self._collator
        if self.reference:
            self.reference.place(self.accelerator)
        models = self._models()
        with self.accelerator.autocast(), acting_adapter(self.tree):
            own = [type(base_causal_lm(m)).__name__ for m in models if settle_scores(m, self._autocast_dtype)]
            self._notes = [self._own_logits(own)] if own else []
            self._settle_aux_loss()
            self._say_noise()
            if collator.layout != CUSTOM:
                collator.max_tokens = args.max_tokens_per_batch
                known = NEFTUNE if args.neftune_noise_alpha is not None else reason_of_length(models, args.max_length)
                layout = settled_layout(args.layout, models, self._autocast_dtype, known)
                collator.layout = layout.name
                self._summary.say("layout", f"{layout.name}, {layout.why}")
            else:
                self._summary.say("layout", CUSTOM)
        self.layout = collator.layout
        live = self.reference.live if isinstance(self.reference, CachedReference) else self.reference
        self.made_up_logps = made_up_logps(live) if live is not None and self._moving is None else None
        self._compiled = compiled_for_scoring(self.accelerator, self.model)
        if isinstance(self.reference, LiveReference) and not self.reference.is_separate:
            self.reference.compiled = self._compiled
        self._lower = self._share_lower_layers()
        self._say_how()
        if isinstance(self.reference, CachedReference):
            silent = args.disable_tqdm or not self.accelerator.is_main_process
            self._filler = CacheFiller(
                self.reference, self.collated, self.accelerator, args.max_tokens_per_batch, silent
            )
        return True

    def _own_logits(self, names: list[str]) -> str:
        """What is said of models that are scored by their own logits; `ValueError` if losses compare predictions."""
        name = names[0]
        if VOCABULARY_KL in self.objective.token_stats:
            raise ValueError(
                f"{', '.join(self._args.loss_type)} compares whole predictions, and {name} does something between its "
                "hidden states and its logits that its config does not say in a known way: choose another loss"
            )
        return f"scored by the logits of {name}'s own forward, which is slower than by its output embeddings"

    def _settle_aux_loss(self) -> None:
        """Find out whether the policy's routers have an auxiliary loss, where its config asks for it."""
        coefficient, notes = settled_aux_loss(self.model, self.aux_loss_coef, self._args.router_aux_loss_coef)
        self.aux_loss_coef = self.objective.aux_loss_coef = coefficient
        self._notes += notes

    def _share_lower_layers(self) -> list[str]:
        """Run the layers below all that trains once, if the reference runs on every batch; what there is to say."""
        reference = self.reference
        is_sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if not isinstance(reference, LiveReference) or (reference.is_separate and is_sharded):
            return []
        known = None
        if self.aux_loss_coef:
            known = "the routers' auxiliary loss reads all layers"
        elif self._compiled is not None:
            known = "the model is compiled as a whole"
        with self.accelerator.autocast():
            said = reference.share_lower_layers(self.tree, made_up_batch(str(self.layout), self.model), known)
        if any_rank(self.accelerator, reference.lower is None):
            reference.lower = None
        return [said] if said else []

    def _warn_of_incomparable_metric(self) -> None:
        """Warn where the best checkpoint is told by a metric that has another yardstick after each move."""
        metric = (self._args.metric_for_best_model or "").removeprefix("eval_")
        if re.match(r"loss$|loss/|rewards/", metric) and self.accelerator.is_main_process:
            logger.warning(INCOMPARABLE, metric, self._args.ref_model_sync_steps)

    def _say_noise(self) -> None:
        """Warn of a policy that differs from itself in training mode, where its dropout is off."""
        args = self._args
        if self.reference is None or args.disable_dropout is False or args.neftune_noise_alpha is not None:
            return
        noise = training_noise(self.model, self._autocast_dtype)
        if noise and self.accelerator.is_main_process:
            logger.warning(NOISE, type(base_causal_lm(self.model)).__name__, noise)

    def _say_how(self) -> None:
        """The summary's lines on the model, the reference and the attention."""
        causal_lm = base_causal_lm(self.model)
        dtype = self._autocast_dtype or causal_lm.dtype
        notes = [*self._dropout, *self._notes, *base_name_notes(self.model)]
        self._summary.say("model", model_text(self.model, self._args), *notes)
        reference = self.reference.description if self.reference else "none, the losses need none"
        self._summary.say("reference", reference, *self._lower)
        self._summary.say("attention", describe_attention(causal_lm, self.accelerator.device, dtype))

    def check_resumed(self) -> None:
        """Warn where a checkpoint's run had another reference."""
        if self.resumed_logps and self.made_up_logps and self.accelerator.is_main_process:
            warn_of_another_reference(self.resumed_logps, self.made_up_logps, self.model)
        self.resumed_logps = None

    def policy_scores(
        self, model: nn.Module, batch: PreferenceBatch, reference: ResponseScores | None
    ) -> ResponseScores:
        """The policy's scores; losses that compare whole predictions also get the reference's.

        Args:
            model: the policy as the engine wraps it.
            reference: the reference's scores of the same batch.
        """
        stats, lower = self.objective.token_stats, None
        if reference is not None:
            # Scores that are kept keep no hidden states.
            lower, reference.lower_states = reference.lower_states, None
        predictions = self.reference.predictions(reference) if VOCABULARY_KL in stats else None
        return score(model, batch, stats, predictions, self.aux_loss_coef != 0, lower)

    def reference_scores(self, batch: PreferenceBatch, dataset: Any = None) -> ResponseScores | None:
        """The reference's scores of a batch; `None` where the losses need none.

        Args:
            dataset: what is evaluated, whose scores are computed once for all evaluations; `None` in training.
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
        # An engine's autocast is in the policy's forward, which a separate reference model does not have.
        with self.accelerator.autocast():
            return self.reference.score(batch, self.objective.reference_token_stats)

    def collect(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """The loss inputs of a batch, without gradients; the batch keeps the reference's scores."""
        on_device = send_to_device(batch, self.accelerator.device)
        policy, reference = self.both_scores(on_device)
        batch["reference_scores"] = reference
        return self.objective.read(on_device, policy, reference)

    def both_scores(self, batch: PreferenceBatch) -> tuple[ResponseScores, ResponseScores | None]:
        """The scores of policy and reference of a batch on the device, without gradients and dropout."""
        with torch.no_grad(), evaluation_mode(self.tree):
            reference = self.reference_scores(batch)
            model = self.model if self._compiled is None else self._compiled
            return self.policy_scores(model, batch, reference), reference

    def flops_per_position(self) -> float:
        """The model FLOPs of a position of a training step; see `reporting.throughput`."""
        is_live = isinstance(self.reference, LiveReference)
        of_reference = self.reference.tree.derived(body_parameters) if is_live else 0
        return flops_per_position(
            self.tree.derived(body_parameters), self.tree.derived(trained_parameters), of_reference
        )

    def fill_cache(self, dataset: Any, name: str) -> bool:
        """Cache what is missing of a data set's reference scores; whether all of them are cached now."""
        return self._filler is not None and self._filler.fill(dataset, name)

    def flush_cache(self) -> None:
        """Write the reference scores that a stream has brought so far."""
        if self._filler is not None:
            self.reference.store.flush()

    def release_reference(self) -> None:
        """Free the memory of a reference whose scores are all cached."""
        self.reference.release()
        self._ref_model = None

    def move_reference(self, step: int) -> None:
        """After an optimizer step: let the reference follow the policy, where it does and an update is due."""
        if self._moving and self._moving.follow(step):
            self._remembered.forget()

    def save(self, checkpoint: Path, saves: bool) -> None:
        """Write a reference that moves into a checkpoint; call it on every rank, of which one `saves`."""
        if self._moving:
            self._moving.save(checkpoint, saves)

    def load(self, checkpoint: Path) -> None:
        """Take over a reference that moves from a checkpoint."""
        if self._moving:
            self._moving.load(checkpoint)
            self._remembered.forget()

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self._args.bf16 else torch.float16 if self._args.fp16 else None

    def _models(self) -> list[nn.Module]:
        """The policy and, where it is another model, the reference."""
        return list(dict.fromkeys((self.model, self.reference.model if self.reference else self.model)))

    def collated(self, rows: list[dict[str, Any]]) -> PreferenceBatch:
        """The batch of these prepared rows on the device, in the layout that is settled."""
        return send_to_device(self._collator.collators[self.layout](rows), self.accelerator.device)


class SettleScorer(TrainerCallback):
    """Settles the layout when training begins: the engine has wrapped the model, and a checkpoint has been loaded."""

    def __init__(self, scorer: Scorer):
        self._scorer = scorer

    def on_train_begin(self, args, state, control, **_):
        """Before the start summary is shown, and before a cache is filled."""
        self._scorer.settle()
        self._scorer.check_resumed()


class ScorerEvents(TrainerCallback):
    """What the scorer does at the events of a training run.

    With a cache, every data set is filled before its first batch is read; then the reference's memory may be freed.
    Mismatched responses are drawn anew in every epoch, so they are filled at its beginning.

    Args:
        evaluated: gives the evaluation data sets as their data loaders read them, by name.
        keeps_reference: whether another run of the same trainer may need it.
    """

    def __init__(self, scorer: Scorer, evaluated: Callable[[], Mapping[str, Any]], keeps_reference: bool):
        self._scorer, self._evaluated, self._keeps_reference = scorer, evaluated, keeps_reference

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        """The layout is settled."""
        if not args.precompute_ref_log_probs:
            return
        for name, dataset in self._evaluated().items():
            self._scorer.fill_cache(dataset, name)
        if self._scorer.objective.needs_mismatched:
            return
        if self._scorer.fill_cache(train_dataloader.dataset, "train") and not self._keeps_reference:
            self._scorer.release_reference()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        """The mismatched responses of the epoch have been drawn."""
        if self._scorer.objective.needs_mismatched:
            self._scorer.fill_cache(train_dataloader.dataset, "train")

    def on_step_end(self, args, state, control, **_):
        """The optimizer has made its step; nothing has been evaluated or saved yet."""
        self._scorer.move_reference(state.global_step)

    def on_save(self, args, state, control, **_):
        """A checkpoint has been written."""
        self._scorer.flush_cache()

    def on_evaluate(self, args, state, control, **_):
        """An evaluation has ended."""
        self._scorer.flush_cache()

    def on_train_end(self, args, state, control, **_):
        """Training has ended."""
        self._scorer.flush_cache()
