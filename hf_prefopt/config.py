"""`PreferenceConfig`: every setting of a run, checked when it is made."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from hf_prefopt.config_checks import refuse_uneven_batches, without_fused_head
from hf_prefopt.kinds import UNPAIRED, ExampleKind
from hf_prefopt.objective.build import build_objective
from hf_prefopt.objective.divergences import DIVERGENCES, FDivergence
from hf_prefopt.objective.objective import Objective
from hf_prefopt.objective.term import Modifier
from hf_prefopt.objective.token_sums import ColumnWeights, Humanline, LengthDesensitised, TokenStep, TokenSums

REFERENCES = ("auto", "adapter_off", "adapter:<name>", "model", "copy", "cache", "none")
TRUNCATION_MODES = ("keep_start", "keep_end")
BAD_ROWS = ("error", "drop")
LAYOUTS = ("auto", "shared", "padded")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PreferenceConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what preference optimisation adds, by TRL's names where TRL has it.

    The loss:
        loss_type: a name, an alias or a list of them; `list_losses()` names them all.
        loss_weights: one weight per loss; 1 each when left out.
        beta, label_smoothing: given to every loss that takes them; `None` means the loss's own published default.
        loss_params: further hyperparameters, flat for one loss, by name for several.
        sft_weight: adds this times the mean negative log-likelihood of the chosen response's tokens.
        use_weighting: multiplies each pair's loss by its WPO weight.
        reference_free: leaves the reference out of losses that can do without it.
        temperature: log-probs are those of logits / temperature, for policy and reference.

    Modifiers, which change what any loss is given that has a meaning with them:
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" (its α is
            `f_alpha_divergence_coef`): f-DPO's reward f′(π/π_ref) in place of the log-ratio.
        ld_alpha: LD-DPO; tokens past the length of a pair's shorter response weigh this, in [0, 1]; `None` or 1: off.
            ld_policy_only: of the policy's log-probs alone.
        humanline: clamps each token's log-ratio to [humanline_log_eps_p, humanline_log_eps_r]. Its authors copy the
            policy into the reference every few steps, too: sync_ref_model with ref_model_mixup_alpha=1.0.
        use_token_weights: weighs tokens by the columns `chosen_token_weights`, `rejected_token_weights`.

    The reference:
        reference: "auto" (the adapter switched off when it is fresh; otherwise a frozen copy of what is trained, as
            given), "adapter_off", "adapter:<name>", "model" (the `ref_model` passed to the trainer), "copy", "none";
            "cache" is "auto" with precompute_ref_log_probs.
        precompute_ref_log_probs: computes the reference's log-probs of all data once, and keeps them on disk in
            reference_cache_dir, where other runs find them; by default a folder beside the Hub's caches.
        sync_ref_model: the reference, a frozen copy of the policy, follows it (TR-DPO): every ref_model_sync_steps
            optimiser steps it becomes ref_model_mixup_alpha of the policy and the rest of itself; 1 is a hard update.

    The data:
        max_length: tokens of prompt and response together; `None` for no limit. truncation_mode: "keep_start" cuts the
            end of responses (their EOS stays), "keep_end" cuts the start of the prompt.
        Columns beside the responses are used where there are any: `weight` multiplies the loss of its example (the mean
            stays over the number of examples), `margin` is subtracted from a pair's reward margin (in reward units,
            nats), scores and win rates go to the losses that ask for them.
        unpair: makes two examples of every pair, a desirable and an undesirable one, for losses of single responses.
        on_bad_rows: "error" or "drop". dataset_num_proc: processes that tokenise.
        layout: "auto" computes every prompt once and no padding where that is exact for the model, and says where it is
            not; "shared" insists on it, "padded" is one padded sequence per response.
        group_by_prompt: draws prompts instead of rows, so that the pairs of a prompt share its tokens.
        max_tokens_per_batch: a token budget for a forward; the examples per step stay as configured.
        show_first_batch: print the first training row, its tokens and which of them are scored.

    Of the Trainer's settings, `logging_steps` is 10 by default and `logging_nan_inf_filter` off: to filter the loss of
    every micro-batch, the host waits for the device. With it or without it, a loss that is not finite stops the run.

    Raises:
        ValueError: at construction, naming the field, its value and what it may be.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "liger_kernel_config",
        "loss_params",
        "model_init_kwargs",
    ]

    learning_rate: float = field(default=1e-6, metadata=_help("Initial learning rate; adapters want 1e-5 to 2e-4."))
    logging_steps: float = field(default=10, metadata=_help("Log every so many steps (below 1: a share of all steps)."))
    logging_nan_inf_filter: bool = field(
        default=False, metadata=_help("Log other steps' mean in place of a NaN; a run with one stops either way.")
    )
    bf16: bool | None = field(
        default=None, metadata=_help("bf16 autocast; by default where the hardware is fast in it, unless fp16 is set.")
    )

    loss_type: list[str] = field(default_factory=lambda: ["dpo"], metadata=_help("One or more names of losses."))
    loss_weights: list[float] | None = field(default=None, metadata=_help("One weight per loss; 1 each by default."))
    beta: float | None = field(default=None, metadata=_help("β of the losses that take it; default: each loss's own."))
    label_smoothing: float | None = field(
        default=None, metadata=_help("ε of the losses that take it; default: each loss's own.")
    )
    loss_params: dict | str | None = field(
        default=None, metadata=_help('Other hyperparameters, as JSON: flat for one loss, {"name": {...}} for several.')
    )
    sft_weight: float = field(default=0.0, metadata=_help("Adds this times the NLL of the chosen response (RPO's α)."))
    use_weighting: bool = field(default=False, metadata=_help("Multiply each pair's loss by its WPO weight."))
    reference_free: bool = field(default=False, metadata=_help("Leave the reference out of the losses that can."))
    temperature: float = field(default=1.0, metadata=_help("Log-probs of logits / temperature."))

    f_divergence_type: str = field(
        default="reverse_kl", metadata=_help("The reward's divergence: " + ", ".join(DIVERGENCES) + ".")
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata=_help("α of alpha_divergence."))
    ld_alpha: float | None = field(
        default=None, metadata=_help("LD-DPO: the weight of tokens past the length of the pair's shorter response.")
    )
    ld_policy_only: bool = field(default=False, metadata=_help("ld_alpha weighs the policy's tokens alone."))
    humanline: bool = field(default=False, metadata=_help("Clamp each token's log-ratio to the reference."))
    humanline_log_eps_p: float = field(default=-1.0, metadata=_help("The lower bound of humanline, a logarithm."))
    humanline_log_eps_r: float = field(default=1.5, metadata=_help("The upper bound of humanline, a logarithm."))
    use_token_weights: bool = field(
        default=False, metadata=_help("Weigh tokens by chosen_token_weights and rejected_token_weights.")
    )

    reference: str = field(
        default="auto", metadata=_help("Where the reference comes from: " + ", ".join(REFERENCES) + ".")
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata=_help("Compute the reference's log-probs once, before training, and keep them on disk.")
    )
    reference_cache_dir: str | None = field(
        default=None, metadata=_help("Where reference log-probs are kept; default: hf_prefopt in Hugging Face's cache.")
    )
    sync_ref_model: bool = field(
        default=False, metadata=_help("Move the reference towards the policy every ref_model_sync_steps steps.")
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=_help("α of θ_ref ← α·θ + (1 − α)·θ_ref when the reference is moved; 1: a hard update.")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=_help("Optimiser steps from one move of the reference to the next.")
    )
    disable_dropout: bool = field(
        default=False, metadata=_help("Train without dropout. The reference never has any, whatever this says.")
    )
    model_init_kwargs: dict | str | None = field(
        default=None, metadata=_help("Arguments of `from_pretrained` when the model is given by name, as JSON.")
    )

    max_length: int | None = field(default=1024, metadata=_help("Tokens of prompt and response together."))
    truncation_mode: str = field(default="keep_start", metadata=_help("keep_start or keep_end (of the prompt)."))
    unpair: bool = field(
        default=False, metadata=_help("Make two unpaired examples of every pair, for losses of single responses.")
    )
    on_bad_rows: str = field(default="error", metadata=_help("error or drop."))
    dataset_num_proc: int | None = field(default=None, metadata=_help("Processes that tokenise."))
    pad_to_multiple_of: int | None = field(default=None, metadata=_help("Round padded lengths up to a multiple."))
    layout: str = field(
        default="auto",
        metadata=_help("auto, shared (every prompt computed once, no padding) or padded (a sequence per response)."),
    )
    group_by_prompt: bool = field(
        default=False, metadata=_help("Keep the pairs of a prompt together, so that its tokens are computed once.")
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=_help("Token positions per forward: a batch of examples is cut into pieces below it, memory is flat."),
    )
    show_first_batch: bool = field(
        default=False, metadata=_help("Print the first training row: its tokens, and which are scored.")
    )

    def __post_init__(self):
        # TrainingArguments refuses bf16 on a CPU that it was not told of, even where there is nothing else.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _is_fast_in_bf16(self.use_cpu)
        super().__post_init__()
        if self.use_liger_kernel:
            self.liger_kernel_config = without_fused_head(self.liger_kernel_config or {})
        self.check()

    def check(self) -> None:
        """Refuse what has no meaning; whoever changes settings calls it again.

        Raises:
            ValueError: as at construction.
        """
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.reference == "cache":
            self.reference, self.precompute_ref_log_probs = "auto", True
        self._check_values()
        objective = self.build_objective()
        self._check_moving(objective)
        if self.precompute_ref_log_probs:
            self._check_cacheable(objective)
        if self.unpair and objective.kind is not UNPAIRED:
            raise ValueError(
                f"unpair=True makes unpaired examples, and {', '.join(self.loss_type)} wants {objective.kind.wanted}"
            )

    def build_objective(self, kind: ExampleKind | None = None, columns: Collection[str] = ()) -> Objective:
        """The objective that these settings describe.

        Args:
            kind: the examples that there are, for losses that take several kinds (`sft`).
            columns: what the data say of them besides, such as `weights`.

        Raises:
            ValueError: see `objective.objective.build_objective`.
        """
        shared = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return build_objective(
            self.loss_type,
            self.loss_weights,
            self.loss_params,
            shared_params={name: value for name, value in shared.items() if value is not None},
            sft_weight=self.sft_weight,
            use_weighting=self.use_weighting,
            reference_free=self.reference_free,
            kind=UNPAIRED if self.unpair else kind,
            modifiers=self._modifiers(),
            columns=columns,
        )

    def _modifiers(self) -> list[Modifier]:
        """The modifiers that are asked for, in the order in which they are taken."""
        steps: list[TokenStep] = []
        if self.humanline:
            steps.append(Humanline(self.humanline_log_eps_p, self.humanline_log_eps_r))
        if self.use_token_weights:
            steps.append(ColumnWeights())
        if self.ld_alpha not in (None, 1):
            steps.append(LengthDesensitised(self.ld_alpha, self.ld_policy_only))
        elif self.ld_policy_only and self.ld_alpha is None:
            raise ValueError(
                "ld_policy_only=True says how ld_alpha weighs, and that is not set: give ld_alpha in [0, 1]"
            )
        modifiers: list[Modifier] = [TokenSums(steps)] if steps else []
        divergence = FDivergence(self.f_divergence_type, self.f_alpha_divergence_coef)
        return [*modifiers, divergence] if self.f_divergence_type != "reverse_kl" else modifiers

    def _check_moving(self, objective: Objective) -> None:
        """Refuse a reference that is to move and cannot, and settings of a move that never comes."""
        if not self.sync_ref_model:
            for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
                value, default = getattr(self, name), PreferenceConfig.__dataclass_fields__[name].default
                if value != default:
                    raise ValueError(f"{name}={value} is only used with sync_ref_model=True")
            return
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} is outside (0, 1]")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps={self.ref_model_sync_steps}: give at least 1")
        if not objective.needs_reference_model:
            raise ValueError(f"sync_ref_model=True, but {', '.join(self.loss_type)} needs no reference: leave it out")
        if self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model=True moves the reference, and precompute_ref_log_probs=True (or "
                "reference='cache') keeps what it says: choose one of them"
            )
        if self.reference not in ("auto", "copy"):
            raise ValueError(
                f"sync_ref_model=True moves a frozen copy of what trains, and reference={self.reference!r} is none: "
                "leave reference at 'auto'"
            )
        self.reference = "copy"

    def _check_cacheable(self, objective: Objective) -> None:
        """Refuse a cache that nothing would read, or that does not hold what the losses read."""
        losses = ", ".join(self.loss_type)
        if not objective.needs_reference_model:
            raise ValueError(f"precompute_ref_log_probs=True, but {losses} needs no reference: leave it out")
        if objective.reference_token_stats:
            raise ValueError(
                f"precompute_ref_log_probs=True keeps log-probs, and {losses} also reads the reference's "
                f"{', '.join(objective.reference_token_stats)} at every token: set precompute_ref_log_probs=False"
            )

    def _check_values(self) -> None:
        _check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        _check_choice("layout", self.layout, LAYOUTS)
        _check_choice("on_bad_rows", self.on_bad_rows, BAD_ROWS)
        if not re.fullmatch("adapter:.+", self.reference):
            _check_choice("reference", self.reference, REFERENCES)
        if self.loss_params is not None and not isinstance(self.loss_params, dict):
            raise ValueError(
                f"loss_params={self.loss_params!r} is no mapping: pass a dict, or JSON on the command line"
            )
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch={self.max_tokens_per_batch}: give at least 1, or None for none")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be above 0, and finite")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves no room for a prompt and a response token")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} must be at least 1, or None for no rounding"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is of the Trainer's cross-entropy, which is not "
                "computed here: set label_smoothing, which losses of preferences take"
            )
        if self.parallelism_config and (self.parallelism_config.sp_enabled or self.parallelism_config.cp_enabled):
            raise ValueError(
                "parallelism_config cuts sequences (sp_size or cp_size above 1), and scored tokens are found by their "
                "place in the whole row: leave it at 1; activation checkpointing and max_tokens_per_batch save memory"
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config.dispatch_batches=True would cut batches whose tensors differ in length"
            )
        refuse_uneven_batches(self.accelerator_config, self.world_size)
        # Left to itself, accelerate dispatches, and so cuts, the batches of streams.
        self.accelerator_config.dispatch_batches = False


def _is_fast_in_bf16(use_cpu: bool) -> bool:
    """Whether bf16 pays: on GPUs that have it, on CPUs with AMX; others emulate it, several times slower than fp32."""
    return torch.cpu._is_amx_tile_supported() if use_cpu else is_torch_bf16_gpu_available()


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is none of {', '.join(choices)}")
