"""`PreferenceConfig`: every setting of a run, checked when it is made."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from hf_prefopt.config_checks import REFERENCES, check_reference_settings, check_values, unread_settings
from hf_prefopt.config_docs import documented
from hf_prefopt.config_names import refuse_foreign_settings
from hf_prefopt.config_trainer import check_trainer_settings, greater_is_better, without_fused_head
from hf_prefopt.kinds import UNPAIRED, ExampleKind
from hf_prefopt.objective.build import build_objective
from hf_prefopt.objective.divergences import DIVERGENCES, FDivergence
from hf_prefopt.objective.objective import Objective
from hf_prefopt.objective.term import Modifier
from hf_prefopt.objective.token_sums import ColumnWeights, Humanline, LengthDesensitized, TokenStep, TokenSums

# The headings of the settings, by the first one beneath each.
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
    """Every setting of a run: those of `transformers.TrainingArguments`, and the following.

    Fields that TRL's `DPOConfig` has, too, have the same name and meaning.

    Raises:
        ValueError: at construction; names the field, its value and the valid values.
        TypeError: no such field; for other libraries' names it says what to write.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "column_mapping",
        "liger_kernel_config",
        "loss_params",
        "model_init_kwargs",
    ]

    loss_type: list[str] = field(
        default_factory=lambda: ["dpo"],
        metadata=_help("One or more losses by name or alias; `list_losses()` names them all."),
    )
    loss_weights: list[float] | None = field(default=None, metadata=_help("One weight per loss; 1 each by default."))
    beta: float | None = field(
        default=None, metadata=_help("β of every loss that has one; default: the loss's own published value.")
    )
    label_smoothing: float | None = field(
        default=None, metadata=_help("ε of every loss that has one; default: the loss's own.")
    )
    loss_params: dict | str | None = field(
        default=None,
        metadata=_help('Other hyperparameters, as a dict or JSON: flat for one loss, {"name": {...}} for several.'),
    )
    sft_weight: float = field(
        default=0.0,
        metadata=_help("Adds this times the chosen response's mean negative log-likelihood per token (RPO's α)."),
    )
    use_weighting: bool = field(default=False, metadata=_help("Multiply each pair's loss by its WPO weight."))
    reference_free: bool = field(
        default=False, metadata=_help("Leave the reference out of losses that can do without it.")
    )
    temperature: float = field(
        default=1.0, metadata=_help("Log-probs are those of logits / temperature, of policy and reference.")
    )

    f_divergence_type: str = field(
        default="reverse_kl",
        metadata=_help(
            f"f-DPO: the reward f'(π/π_ref) in place of the log-ratio; one of {', '.join(DIVERGENCES)}. For losses of "
            "differences of responses."
        ),
    )
    f_alpha_divergence_coef: float = field(
        default=0.5,
        metadata=_help("α of alpha_divergence, as in TRL: f'(u) = (u^(α−1) − 1)/(α − 1). The paper's α is 1 − this."),
    )
    ld_alpha: float | None = field(
        default=None,
        metadata=_help(
            "LD-DPO: the weight, in [0, 1], of tokens beyond the length of the pair's shorter response; None or 1: off."
        ),
    )
    ld_policy_only: bool = field(default=False, metadata=_help("Apply ld_alpha to the policy's log-probs only."))
    humanline: bool = field(
        default=False,
        metadata=_help(
            "Clamp each token's log-ratio to [humanline_log_eps_p, humanline_log_eps_r]. Its authors also copy the "
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
            "Soft labels: a pair's loss is p·ℓ(z) + (1 − p)·ℓ(−z), p its column win_rate (from 0 to 1), as if "
            "label_smoothing were 1 − p for each pair. For dpo, dpo_norm and wpo; sppo reads the column by itself."
        ),
    )

    reference: str = field(
        default="auto",
        metadata=_help(
            f"Where the reference comes from: {', '.join(REFERENCES)}. auto: the ref_model if one is passed; the "
            "adapter switched off if it is fresh; otherwise a frozen copy of what trains, as given. cache: auto with "
            "precompute_ref_log_probs."
        ),
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata=_help("Compute the reference's log-probs once, before training, and cache them on disk."),
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata=_help("The folder of that cache, which runs share; default: a folder in Hugging Face's cache."),
    )
    hub_base_model: str | None = field(
        default=None,
        metadata=_help(
            "The base model's name on the Hub, for adapter_config.json and the model card, where the model was loaded "
            "from a folder."
        ),
    )
    sync_ref_model: bool = field(
        default=False, metadata=_help("TR-DPO: move the reference toward the policy every ref_model_sync_steps steps.")
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=_help("α of θ_ref ← α·θ + (1 − α)·θ_ref when the reference moves; 1 copies the policy.")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=_help("Optimizer steps between two moves of the reference.")
    )

    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata=_help("Arguments of `from_pretrained`, as a dict or JSON, when the model is given by name."),
    )
    disable_dropout: bool | None = field(
        default=None,
        metadata=_help(
            "True: train without dropout; False: with the rates that the model and its adapters have; None: the "
            "model's own dropout is off, an adapter's (lora_dropout) stays. The reference never has any."
        ),
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata=_help(
            "Mixtures of experts: adds this times the load-balancing loss of the routers; 0: off; None: the model "
            "config's own. It is that of each forward, weighted by the forward's examples."
        ),
    )

    max_length: int | None = field(
        default=1024, metadata=_help("The most tokens of prompt and response together; None: no limit.")
    )
    column_mapping: dict | str | None = field(
        default=None,
        metadata=_help(
            'What columns hold, as a dict or JSON: {"prompt": "question", "chosen": "answer_a", "rejected": '
            '"answer_b"}. Many layouts are known without it; what it cannot say, Dataset.map can.'
        ),
    )
    remove_columns: list[str] | None = field(
        default=None,
        metadata=_help("Columns to leave out, such as a margin, or one that looks like context and is not."),
    )
    text_as: str = field(
        default="text",
        metadata=_help(
            "What text in the columns prompt, chosen, rejected, completion and responses becomes. text: it is trained "
            "on as it is, without the chat template; messages: it becomes the turns of a conversation."
        ),
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata=_help(
            'Arguments of the chat template, as a dict or JSON: {"enable_thinking": false}. Those of a row, in its '
            "column chat_template_kwargs, come first."
        ),
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=_help(
            "What is cut from a row that is too long: keep_start cuts the end of responses (their EOS stays), keep_end "
            "cuts the start of the prompt after BOS and system prompt, by whole turns where there are several."
        ),
    )
    unpair: bool = field(
        default=False,
        metadata=_help("Make two examples of each pair, a desirable and an undesirable one, for losses like KTO's."),
    )
    on_bad_rows: str = field(
        default="error", metadata=_help("What to do with unusable rows: error, or drop (both count them).")
    )
    dataset_num_proc: int | None = field(default=None, metadata=_help("The number of processes that tokenize."))
    group_by_prompt: bool = field(
        default=False,
        metadata=_help("Put all pairs of a prompt into the same batch, so that the prompt is computed once."),
    )
    show_first_batch: bool = field(
        default=False, metadata=_help("Print the first training row: its tokens, and which of them are scored.")
    )

    layout: str = field(
        default="auto",
        metadata=_help(
            "shared: each prompt is computed once, and no padding. around: the same, except that token mixers "
            "(attention, state space layers, convolutions) compute padded sequences, for models whose mixers need "
            "whole sequences. padded: one padded sequence per response. auto takes the first of these that is exact "
            "for the model, and logs why it did not take those before it."
        ),
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=_help(
            "The most token positions in a forward, and with them peak memory: batches are cut into pieces below "
            "it, and the number of examples per step stays the same."
        ),
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata=_help("Round padded lengths up to a multiple of this (layouts padded and around).")
    )

    learning_rate: float = field(default=1e-6, metadata=_help("The initial learning rate; adapters need 1e-5 to 2e-4."))
    logging_steps: float = field(default=10, metadata=_help("Log every N steps (below 1: a share of all steps)."))
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata=_help(
            "Log the mean of other steps in place of a NaN, for which the host waits for the device at every "
            "micro-batch. A loss that is not finite stops the run either way."
        ),
    )
    bf16: bool | None = field(
        default=None, metadata=_help("bf16 autocast; default: where the hardware is fast in it, without fp16.")
    )

    ddp_find_unused_parameters: bool | None = field(
        default=None,
        metadata=_help(
            "Whether DDP looks for parameters without a gradient, a walk over the graph of every backward; default: "
            "only where a forward of one token leaves some unused."
        ),
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata=_help("Whether DDP sends the first rank's buffers to the others before every forward."),
    )
    accelerator_config: dict | str | None = field(
        default=None,
        metadata=_help(
            "Settings of accelerate, as a dict or a path. Unless it is a path or sets it, non_blocking=True where "
            "dataloader_pin_memory lets a GPU copy batches without a wait."
        ),
    )

    def __new__(cls, *args: Any, **settings: Any):
        """Raise `TypeError` for a name that another library has for a setting, with what to write."""
        refuse_foreign_settings(settings, cls.__dataclass_fields__, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self):
        # TrainingArguments refuses bf16 on a CPU that it was not told of, even where there is nothing else.
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
        """Refuse what has no meaning; whoever changes settings calls it again.

        Raises:
            ValueError: as at construction.
        """
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.reference == "cache":
            self.reference, self.precompute_ref_log_probs = "auto", True
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
        """Raise `ValueError`: a setting would have no effect, as the text says."""
        raise ValueError(text)

    def build_objective(self, kind: ExampleKind | None = None, columns: Collection[str] = ()) -> Objective:
        """The objective that these settings describe.

        Args:
            kind: the examples that there are, for losses that take several kinds (`sft`).
            columns: what the data say of them besides, such as `weights`.

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
        """The losses that these settings name, as the arguments of `objective.build.build_objective` that say so."""
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
        """The modifiers that are asked for, in the order in which they are taken."""
        steps: list[TokenStep] = []
        if self.humanline:
            steps.append(Humanline(self.humanline_log_eps_p, self.humanline_log_eps_r))
        if self.use_token_weights:
            steps.append(ColumnWeights())
        if self.ld_alpha not in (None, 1):
            steps.append(LengthDesensitized(self.ld_alpha, self.ld_policy_only))
        elif self.ld_policy_only and self.ld_alpha is None:
            raise ValueError(
                "ld_policy_only=True says how ld_alpha weighs, and that is not set: give ld_alpha in [0, 1]"
            )
        modifiers: list[Modifier] = [TokenSums(steps)] if steps else []
        divergence = FDivergence(self.f_divergence_type, self.f_alpha_divergence_coef)
        return [*modifiers, divergence] if self.f_divergence_type != "reverse_kl" else modifiers


def _is_pinned(args: TrainingArguments) -> bool:
    """Whether batches wait in pinned memory, from which a GPU copies them by itself."""
    return args.dataloader_pin_memory and torch.cuda.is_available() and not args.use_cpu


def _is_fast_in_bf16(use_cpu: bool) -> bool:
    """Whether bf16 pays: on GPUs that have it, on CPUs with AMX; others emulate it, several times slower than fp32."""
    return torch.cpu._is_amx_tile_supported() if use_cpu else is_torch_bf16_gpu_available()
