"""`PreferenceConfig`: all settings of a run. They are checked when the configuration is created."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from hf_prefopt.config_checks import REFERENCES, check_reference_settings, check_types, check_values, unread_settings
from hf_prefopt.config_docs import documented
from hf_prefopt.config_names import refuse_foreign_settings
from hf_prefopt.config_trainer import check_trainer_settings, greater_is_better, without_fused_head
from hf_prefopt.kinds import UNPAIRED, ExampleKind
from hf_prefopt.objective.build import build_objective
from hf_prefopt.objective.divergences import DIVERGENCES, FDivergence
from hf_prefopt.objective.objective import Objective
from hf_prefopt.objective.term import Modifier
from hf_prefopt.objective.token_sums import ColumnWeights, Humanline, LengthDesensitized, TokenStep, TokenSums

# The headings of the groups of settings, keyed by the first setting of each group.
GROUPS = {
    "loss_type": "Loss",
    "f_divergence_type": "Modifiers",
    "reference": "Reference",
    "model_init_kwargs": "Model",
    "max_length": "Data",
    "layout": "Speed and memory",
    "learning_rate": "Changed defaults of the Trainer",
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@documented(GROUPS)
@dataclass
class PreferenceConfig(TrainingArguments):
    """All settings of a run: the fields of `transformers.TrainingArguments`, and the following ones.

    Fields that TRL's `DPOConfig` also has have the same name and meaning here.

    Raises:
        ValueError: a field has an invalid value. The error is raised when the configuration is created.
        TypeError: a field does not exist. For names from other libraries, the message says what to use instead.
    """

    if TYPE_CHECKING:
        output_dir: str  # TrainingArguments replaces None with a name

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # there, it is annotated as an attribute
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "column_mapping",
        "liger_kernel_config",
        "loss_params",
        "model_init_kwargs",
    ]

    loss_type: list[str] = field(
        default_factory=lambda: ["dpo"],
        metadata=_help("The names or aliases of one or more losses; `list_losses()` returns all names."),
    )
    loss_weights: list[float] | None = field(default=None, metadata=_help("One weight per loss; 1 each by default."))
    beta: float | None = field(
        default=None, metadata=_help("β for all losses that have one; by default each loss's published value.")
    )
    label_smoothing: float | None = field(
        default=None, metadata=_help("Label smoothing ε for all losses that have it; by default each loss's own value.")
    )
    loss_params: dict | str | None = field(
        default=None,
        metadata=_help('Other hyperparameters, as a dict or JSON: flat for one loss, {"loss": {...}} for several.'),
    )
    sft_weight: float = field(
        default=0.0,
        metadata=_help("Add the chosen response's NLL per token, times this weight, to the loss (RPO's α)."),
    )
    use_weighting: bool = field(default=False, metadata=_help("Multiply the loss of each pair by its WPO weight."))
    reference_free: bool = field(
        default=False, metadata=_help("Compute losses without a reference, if they support this.")
    )
    temperature: float = field(
        default=1.0, metadata=_help("Divides the logits of policy and reference before log-probs are computed.")
    )

    f_divergence_type: str = field(
        default="reverse_kl",
        metadata=_help(
            f"f-DPO: the divergence, one of {', '.join(DIVERGENCES)}. The reward is f'(π/π_ref) instead of the "
            "log-ratio. Only for losses that depend on differences of rewards."
        ),
    )
    f_alpha_divergence_coef: float = field(
        default=0.5,
        metadata=_help(
            "α of alpha_divergence, as in TRL: f'(u) = (u^(α−1) − 1)/(α − 1). The paper's α is 1 minus this value."
        ),
    )
    ld_alpha: float | None = field(
        default=None,
        metadata=_help(
            "LD-DPO: the weight in [0, 1] of tokens beyond the length of the pair's shorter response; None or 1: off."
        ),
    )
    ld_policy_only: bool = field(default=False, metadata=_help("Apply ld_alpha only to the policy's log-probs."))
    humanline: bool = field(
        default=False,
        metadata=_help(
            "Clamp each token's log-ratio to [humanline_log_eps_p, humanline_log_eps_r]. The authors also copy the "
            "policy into the reference every few steps: sync_ref_model=True, ref_model_mixup_alpha=1.0."
        ),
    )
    humanline_log_eps_p: float = field(default=-1.0, metadata=_help("The lower bound of humanline, in nats."))
    humanline_log_eps_r: float = field(default=1.5, metadata=_help("The upper bound of humanline, in nats."))
    use_token_weights: bool = field(
        default=False, metadata=_help("Weight tokens by the columns chosen_token_weights and rejected_token_weights.")
    )

    use_win_rates: bool = field(
        default=False,
        metadata=_help(
            "Soft labels: the loss of a pair is p·ℓ(z) + (1 − p)·ℓ(−z), where p in [0, 1] is the pair's win_rate (a "
            "column). This equals label_smoothing = 1 − p for the pair. Only for dpo, dpo_norm and wpo; sppo always "
            "reads the column."
        ),
    )

    reference: str = field(
        default="auto",
        metadata=_help(
            f"The reference: {', '.join(REFERENCES)}. auto: the ref_model if one is passed; otherwise the base model, "
            "if a new adapter is trained; otherwise a frozen copy of the initial trainable weights. cache: like auto, "
            "with precompute_ref_log_probs=True."
        ),
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata=_help("Compute the reference's log-probs once, before training, and cache them on disk."),
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata=_help("The folder of the log-prob cache, shared by all runs; by default inside Hugging Face's cache."),
    )
    hub_base_model: str | None = field(
        default=None,
        metadata=_help(
            "The base model's name on the Hub, for adapter_config.json and the model card. Set it if the model was "
            "loaded from a folder."
        ),
    )
    sync_ref_model: bool = field(
        default=False, metadata=_help("TR-DPO: move the reference toward the policy every ref_model_sync_steps steps.")
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=_help("α of θ_ref ← α·θ + (1 − α)·θ_ref when the reference moves; 1 copies the policy.")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=_help("The number of optimizer steps between two moves of the reference.")
    )

    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata=_help("Arguments of `from_pretrained`, as a dict or JSON, when the model is given by name."),
    )
    disable_dropout: bool | None = field(
        default=None,
        metadata=_help(
            "True: train without dropout. False: keep the dropout rates of the model and its adapters. None: disable "
            "the model's dropout and keep the adapter's (lora_dropout). The reference never uses dropout."
        ),
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata=_help(
            "Mixtures of experts: coefficient of the routers' load-balancing loss. 0 turns the loss off; None uses the "
            "model config's value. The loss is computed for each forward pass and weighted by the number of examples "
            "in the pass."
        ),
    )

    max_length: int | None = field(
        default=1024, metadata=_help("Maximum number of tokens of prompt and response together; None: no limit.")
    )
    column_mapping: dict | str | None = field(
        default=None,
        metadata=_help(
            'The column to read for each name, as a dict or JSON: {"prompt": "question", "chosen": "answer_a", '
            '"rejected": "answer_b"}. Many column layouts need no mapping. For other changes, use Dataset.map.'
        ),
    )
    remove_columns: list[str] | None = field(
        default=None,
        metadata=_help("Columns to ignore, such as a margin, or a column that only looks like context."),
    )
    text_as: str = field(
        default="text",
        metadata=_help(
            "How to treat plain text in the columns prompt, chosen, rejected, completion and responses. text: train on "
            "it unchanged, without the chat template; messages: turn it into the messages of a conversation."
        ),
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata=_help(
            'Arguments of the chat template, as a dict or JSON: {"enable_thinking": false}. Arguments in a row\'s '
            "column chat_template_kwargs override them."
        ),
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=_help(
            "How to truncate rows that are too long. keep_start cuts the end of responses and keeps their EOS; "
            "keep_end cuts the start of the prompt, except BOS and system prompt, and removes whole turns first."
        ),
    )
    unpair: bool = field(
        default=False,
        metadata=_help("Split each pair into a desirable and an undesirable example, for losses such as KTO."),
    )
    on_bad_rows: str = field(
        default="error", metadata=_help("What to do with unusable rows: error or drop. Both report how many there are.")
    )
    dataset_num_proc: int | None = field(default=None, metadata=_help("The number of processes for tokenization."))
    group_by_prompt: bool = field(
        default=False,
        metadata=_help("Put all pairs of a prompt into the same batch, so that the prompt is computed once."),
    )
    show_first_batch: bool = field(
        default=False, metadata=_help("Print the first training row: its tokens and which of them are scored.")
    )

    layout: str = field(
        default="auto",
        metadata=_help(
            "shared: prefix sharing and packing; each prompt is computed once, without padding. around: the same, "
            "except that token mixers (attention, state space layers, convolutions) compute padded sequences, for "
            "models whose mixers need whole sequences. padded: one padded sequence per response. auto: the first of "
            "these that is exact for the model; the log says why earlier ones are not."
        ),
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=_help(
            "Maximum number of token positions per forward pass, which bounds peak memory. Larger batches are "
            "computed in several passes; the number of examples per step stays the same."
        ),
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata=_help("Round padded lengths up to a multiple of this number (layouts padded, around).")
    )

    checkpointing_keeps: str = field(
        default="nothing",
        metadata=_help(
            "With gradient_checkpointing, what each layer stores in addition to its input. attention: the outputs of "
            "attention, so that attention is not recomputed. This is faster for long sequences."
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=_help(
            "Keep activations in CPU memory between forward and backward pass. It needs a GPU, and copies cost time."
        ),
    )

    learning_rate: float = field(
        default=1e-6,
        metadata=_help(
            "The initial learning rate; adapters need 1e-5 to 2e-4 (`hf_prefopt train` uses 1e-4 for them)."
        ),
    )
    logging_steps: float = field(default=10, metadata=_help("Log every N steps; below 1: a fraction of all steps."))
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata=_help(
            "Replace NaN and infinite losses in the log by the mean of the other steps. The check makes the host wait "
            "for the device at every micro-batch. A loss that is not finite stops the run in any case."
        ),
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # None until __post_init__
        default=None, metadata=_help("bf16 autocast; by default on if the hardware is fast in bf16 and fp16 is off.")
    )

    ddp_find_unused_parameters: bool | None = field(
        default=None,
        metadata=_help(
            "Whether DDP searches the graph of every backward pass for parameters without a gradient; by default only "
            "if a forward pass of one token leaves some parameters unused."
        ),
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata=_help("Whether DDP broadcasts the first rank's buffers before every forward pass."),
    )
    accelerator_config: dict | str | None = field(
        default=None,
        metadata=_help(
            "Settings of accelerate, as a dict or a path. If a dict does not set non_blocking, non_blocking is True "
            "when batches are in pinned memory (dataloader_pin_memory), so that the GPU copies them asynchronously."
        ),
    )

    def __new__(cls, *args: Any, **settings: Any):
        """Raise `TypeError` for names of settings from other libraries. The message says what to use instead."""
        refuse_foreign_settings(settings, cls.__dataclass_fields__, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self):
        # Even if the CPU is the only device, TrainingArguments rejects bf16 unless use_cpu is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.accelerator_config is None or isinstance(self.accelerator_config, dict):
            self.accelerator_config = {"non_blocking": _is_pinned(self), **(self.accelerator_config or {})}
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _is_fast_in_bf16(self.use_cpu)
        self.greater_is_better = greater_is_better(self.metric_for_best_model, self.greater_is_better)
        super().__post_init__()
        if self.use_liger_kernel:
            self.liger_kernel_config = without_fused_head(self.liger_kernel_config or {})
        self.check()

    def check(self) -> None:
        """Check all settings and their combination. Call it again after changing settings.

        Raises:
            ValueError: a setting has an invalid value, or settings contradict each other.
        """
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.reference == "cache":
            self.reference, self.precompute_ref_log_probs = "auto", True
        check_types(self)
        check_values(self)
        for unread in unread_settings(self):
            self.refuse_unread(unread)
        check_trainer_settings(self)
        objective = self.build_objective()
        check_reference_settings(self, objective)
        if self.sync_ref_model:
            self.reference = "copy"
        if self.unpair and objective.kind is not UNPAIRED:
            raise ValueError(
                f"unpair=True makes unpaired examples, but {', '.join(self.loss_type)} needs {objective.kind.wanted}"
            )

    def refuse_unread(self, text: str) -> None:
        """Raise `ValueError` with this text, because a setting would have no effect."""
        raise ValueError(text)

    def build_objective(self, kind: ExampleKind | None = None, columns: Collection[str] = ()) -> Objective:
        """Return the objective that these settings describe.

        Args:
            kind: Kind of the examples in the data. It is needed for losses that support several kinds (`sft`).
            columns: Optional columns that the data have, such as `weights`.

        Raises:
            ValueError: see `objective.build.build_objective`.
        """
        return build_objective(
            **self.losses(),
            use_weighting=self.use_weighting,
            kind=UNPAIRED if self.unpair else kind,
            modifiers=self._modifiers(),
            columns=columns,
            use_win_rates=self.use_win_rates,
        )

    def losses(self) -> dict[str, Any]:
        """Return the arguments of `objective.build.build_objective` that these settings determine."""
        shared = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return {
            "loss_types": self.loss_type,
            "loss_weights": self.loss_weights,
            "loss_params": self.loss_params,
            "shared_params": {name: value for name, value in shared.items() if value is not None},
            "sft_weight": self.sft_weight,
            "reference_free": self.reference_free,
        }

    def _modifiers(self) -> list[Modifier]:
        """Return the modifiers that are switched on, in the order in which they are applied."""
        steps: list[TokenStep] = []
        if self.humanline:
            steps.append(Humanline(self.humanline_log_eps_p, self.humanline_log_eps_r))
        if self.use_token_weights:
            steps.append(ColumnWeights())
        if self.ld_alpha not in (None, 1):
            steps.append(LengthDesensitized(self.ld_alpha, self.ld_policy_only))
        elif self.ld_policy_only and self.ld_alpha is None:
            raise ValueError(
                "ld_policy_only=True only has an effect with ld_alpha, which is not set: set ld_alpha in [0, 1]"
            )
        modifiers: list[Modifier] = [TokenSums(steps)] if steps else []
        divergence = FDivergence(self.f_divergence_type, self.f_alpha_divergence_coef)
        return [*modifiers, divergence] if self.f_divergence_type != "reverse_kl" else modifiers


def _is_pinned(args: TrainingArguments) -> bool:
    """Return True if batches are in pinned memory, from which a GPU can copy asynchronously."""
    return args.dataloader_pin_memory and torch.cuda.is_available() and not args.use_cpu


def _is_fast_in_bf16(use_cpu: bool) -> bool:
    """Return True on GPUs that support bf16 and on CPUs with AMX. Emulated bf16 would be far slower than fp32."""
    return torch.cpu._is_amx_tile_supported() if use_cpu else is_torch_bf16_gpu_available()
