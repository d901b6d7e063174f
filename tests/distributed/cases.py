"""The training runs that every engine and one process run in the same way.

Every case has a global batch of four examples, in two micro-batches, over seven rows: one process gets two rows at a
time, and each of two processes gets one. The second step has only three rows, so the data loader gives one rank a row
that it has already seen. Gradients are clipped to norm 1. The optimizer is plain gradient descent, which is linear in
the gradient: Adam would turn the sign of a rounding error into a full step.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.tiny_models import QUANTIZABLE, perturbed, tiny_model, with_lora

GLOBAL_BATCH = 4
DESCENT = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 2,
}


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        name: the name in the table.
        settings: settings of `PreferenceConfig`, in addition to `DESCENT`.
        lora: whether an adapter (not a fresh one) trains, or all weights.
        model: settings of the model's config. adapter: settings of the adapter.
        four_bits: settings of the `BitsAndBytesConfig` of a 4-bit model; `None` for a model that is not quantized.
        rows: the training data. streams: whether the dataset is a stream.
        ref_model: an explicit reference, "given" as a model or "by name".
        seed: seed of the difference between policy and reference when training begins.
        resumes: whether the run is also resumed from its second checkpoint, in a new trainer.
        row_by_row: whether each forward has one row for any number of ranks: an
            auxiliary loss is a mean over the tokens of a forward.
    """

    name: str
    settings: dict[str, Any]
    lora: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    four_bits: dict[str, Any] | None = None
    rows: int = 7
    ref_model: str | None = None
    seed: int = 1
    streams: bool = False
    resumes: bool = False
    row_by_row: bool = False

    def build_model(self) -> nn.Module:
        """Return the policy, which is the same on every rank. An adapter is not
        zero, so that every loss has margins.
        """
        model = tiny_model(**self.model) if self.four_bits is None else self._quantized()
        return perturbed(with_lora(model, **self.adapter), 0.1, self.seed) if self.lora else model

    def _quantized(self) -> PreTrainedModel:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **self.four_bits)
        model = tiny_model(**self.model)
        weights = model.state_dict()
        return type(model).from_pretrained(None, config=model.config, state_dict=weights, quantization_config=config)

    def build_reference(self, folder: Path) -> nn.Module | str:
        """Return the explicit reference or its saved folder: it differs from the
        policy and from the policy's base model.
        """
        model = perturbed(tiny_model(**self.model), 0.1, seed=3)
        if self.ref_model == "given":
            return model
        model.save_pretrained(folder)
        return str(folder)

    def merged_settings(self, world_size: int) -> dict[str, Any]:
        """Return the settings of a rank."""
        merged = {**DESCENT, **self.settings}
        if self.row_by_row:
            merged["gradient_accumulation_steps"] = GLOBAL_BATCH // world_size
        share = GLOBAL_BATCH // (merged["gradient_accumulation_steps"] * world_size)
        return {**merged, "per_device_train_batch_size": share, "per_device_eval_batch_size": share}


def _case(loss: str, layout: str, lora: bool, name: str = "", **settings: Any) -> Case:
    own = {
        key: settings.pop(key)
        for key in ("model", "adapter", "four_bits", "rows", "ref_model", "seed", "streams", "resumes", "row_by_row")
        if key in settings
    }
    has_own = loss == "simpo" or "ref_model" in own
    reference = {"reference": "adapter_off"} if lora and not has_own else {}
    name = ", ".join(filter(None, (loss, layout, "LoRA" if lora else "full", name)))
    return Case(name, {"loss_type": loss, "layout": layout, **reference, **settings}, lora, **own)


# One loss of each type: over single examples; over the batch, unpaired, with mismatched responses; without a reference;
# of lists; with a running mean.
LOSSES = ("dpo", "kto", "simpo", "plackett_luce", "bco_pair", "kto_pair")
# With these settings, KTO's baseline is above 0 in every step and in the evaluation, so that it has an effect.
SEEDS = {("kto", "shared"): 7, ("kto", "padded"): 5}
EVERY_LOSS = [
    _case(loss, layout, lora=(number + shift) % 2 == 0, seed=SEEDS.get((loss, layout), 1))
    for number, loss in enumerate(LOSSES)
    for shift, layout in enumerate(("shared", "padded"))
]
CHECKPOINTED = {"gradient_checkpointing": True}
BUDGET = {"max_tokens_per_batch": 45, "gradient_accumulation_steps": 1, "rows": 10}
# With an epsilon as large as the gradients, Adam is as smooth as plain descent. It has a state to resume.
RESUMED = {"optim": "adamw_torch", "adam_epsilon": 0.01, "learning_rate": 0.01, "num_train_epochs": 2, "resumes": True}
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}
# Models whose layers need whole sequences, and one with a load-balancing loss.
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        **{"mlp_only_layers": [0, 1], "num_experts": 4},
        **{f"linear_num_{part}_heads": 2 for part in ("key", "value")},
        **{f"linear_{part}_head_dim": 8 for part in ("key", "value")},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        **{"num_local_experts": 0, "shared_intermediate_size": 64},
    },
}
HYBRIDS = {name: {"model_type": name, **config} for name, config in HYBRIDS.items()}
MAMBA_EXPERTS = {**HYBRIDS["granitemoehybrid"], "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4}
# In two of the layers nothing trains, so they run once for policy and reference.
THREE_LAYERS = {"num_hidden_layers": 3}
UPPER = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2]}
MORE = [
    _case("dpo", "shared", False, "tied head", model={"tie_word_embeddings": True}),
    _case("dpo", "shared", True, "copy of a trained adapter", reference="copy"),
    _case("dpo", "shared", True, "adapted head", adapter={"target_modules": ["q_proj", "lm_head"]}),
    _case("dpo", "shared", True, "upper layers", model=THREE_LAYERS, adapter=UPPER),
    _case("dpo", "padded", True, "upper layers, checkpointed", model=THREE_LAYERS, adapter=UPPER, **CHECKPOINTED),
    _case("dpo", "shared", False, "checkpointed", **CHECKPOINTED),
    _case("kto_pair", "padded", True, "checkpointed", **CHECKPOINTED),
    _case("dpo", "shared", False, "token budget", **BUDGET),
    _case("kto", "shared", True, "token budget", **BUDGET, seed=29),
    _case("dpo", "padded", True, "a rank without a row", rows=5),
    _case("dpo", "shared", True, "a stream", streams=True, max_steps=2),
    _case("bco_pair", "shared", False, "resumed", **RESUMED),
    _case("bco_pair", "padded", True, "resumed", **RESUMED),
    _case("bco", "shared", True, "resumed", **RESUMED),
    _case("dpo", "shared", False, "moving reference, resumed", **RESUMED, **MOVING),
    _case("dpo", "around", False, "checkpointed", **CHECKPOINTED),
    _case("kto", "around", True, seed=5),
    _case("dpo", "around", False, "gated delta net", model=HYBRIDS["qwen3_next"]),
    _case("dpo", "around", True, "gated delta net, checkpointed", model=HYBRIDS["qwen3_next"], **CHECKPOINTED),
    _case("dpo", "around", False, "short convolution", model=HYBRIDS["lfm2"]),
    _case("kto", "around", True, "short convolution", model=HYBRIDS["lfm2"], seed=5),
    _case("dpo", "around", True, "Mamba-2", model=HYBRIDS["granitemoehybrid"]),
    # Its config adds the auxiliary loss with a coefficient of 0.001.
    _case("dpo", "around", True, "Mamba-2 and experts", model=MAMBA_EXPERTS, row_by_row=True),
    _case("dpo", "around", False, "Mamba-2 and experts", model=MAMBA_EXPERTS, router_aux_loss_coef=0.0),
    _case("dpo", "shared", False, "own logits", model={"model_type": "modernbert-decoder"}),
    _case("dpo", "padded", True, "own logits", model={"model_type": "modernbert-decoder"}),
    _case("dpo", "shared", False, "auxiliary loss", model=EXPERTS, row_by_row=True, router_aux_loss_coef=0.5),
    _case("dpo", "around", True, "auxiliary loss", model=EXPERTS, row_by_row=True, router_aux_loss_coef=0.5),
    _case("tdpo2", "shared", False),
    _case("tdpo2", "padded", True),
    _case("tdpo2", "padded", False, "explicit reference", ref_model="given"),
    _case("dpo", "padded", False, "explicit reference by name", ref_model="by name"),
    _case("dpo", "shared", False, "cached reference", precompute_ref_log_probs=True),
    _case("kto", "padded", True, "cached reference", precompute_ref_log_probs=True, seed=5),
    _case("dpo", "shared", True, "4 bits, resumed", model=QUANTIZABLE, four_bits={}, **RESUMED),
    _case(
        "dpo",
        "shared",
        True,
        "4 bits stored as fp32, resumed",
        model=QUANTIZABLE,
        four_bits={"bnb_4bit_quant_storage": torch.float32},
        **RESUMED,
    ),
]
CASES = {case.name: case for case in EVERY_LOSS + MORE}
assert len(CASES) == len(EVERY_LOSS) + len(MORE)

# The test suite runs all cases if they are fast. For slower engines it runs each loss, in both layouts, and settings
# that an engine may treat differently. `python -m tests.distributed.table --all-cases` runs all cases under all
# engines.
SOME = [
    "dpo, padded, full",
    "dpo, shared, LoRA, copy of a trained adapter",
    "kto, shared, full",
    "kto, padded, LoRA",
    "simpo, shared, LoRA",
    "simpo, padded, full",
    "plackett_luce, shared, full",
    "plackett_luce, padded, LoRA",
    "bco_pair, shared, full, resumed",
    "bco_pair, padded, LoRA, resumed",
    "kto_pair, padded, LoRA, checkpointed",
    "dpo, shared, full, token budget",
    "dpo, shared, full, moving reference, resumed",
    "dpo, shared, full, cached reference",
    "dpo, around, full, checkpointed",
    "kto, around, LoRA",
]
# Under engines that shard the weights, also cases that read the reference's weights.
SHARDED = [
    *SOME,
    "dpo, shared, LoRA, adapted head",
    "dpo, shared, LoRA, upper layers",
    "dpo, padded, LoRA, upper layers, checkpointed",
    "tdpo2, shared, full",
    "tdpo2, padded, LoRA",
    "tdpo2, padded, full, explicit reference",
    "dpo, padded, full, explicit reference by name",
]
# Models with special layers: token mixers that need whole sequences, log-probs from the model's own logits, routers.
MODELS = [
    "dpo, around, full, short convolution",
    "dpo, shared, full, own logits",
    "dpo, shared, full, auxiliary loss",
]
# The nightly tests run all of them.
EVERY_MODEL = [name for name, case in CASES.items() if "model_type" in case.model]
# DeepSpeed's ZeRO-3 raises a "tracing error" for this model. The cause may be that its Mamba-2 layers read weights of
# submodules in training mode and call the submodules in evaluation mode; this is not confirmed.
UNDER_ZERO3 = [name for name in EVERY_MODEL if "Mamba-2 and experts" not in name]
FEW = ["dpo, padded, full", "dpo, shared, LoRA, copy of a trained adapter", "bco, shared, LoRA, resumed"]
QLORA = "dpo, shared, LoRA, 4 bits, resumed"
# The cases of each engine, and the subset that every run of the test suite runs; the other cases are nightly.
ALL_OF = {
    "ddp": list(CASES),
    "zero1": FEW,
    "zero2": [*SOME, *EVERY_MODEL, QLORA],
    "zero3": [*SHARDED, *UNDER_ZERO3, QLORA],
    "zero3_offload": FEW,
    "fsdp2": [*SHARDED, *EVERY_MODEL, "dpo, shared, LoRA, 4 bits stored as fp32, resumed"],
}
# Every second case, and the moving reference, which the tests of resuming need.
_MOVING = "dpo, shared, full, moving reference, resumed"
IN_SUITE = {
    **ALL_OF,
    "ddp": [*SOME[::2], *MODELS],
    "zero2": [*SOME[1::2], _MOVING, QLORA],
    "zero3": [*SHARDED[::2], QLORA],
    "fsdp2": [*SHARDED[::2], *MODELS[:2], "dpo, shared, LoRA, 4 bits stored as fp32, resumed"],
}
assert all(_MOVING in IN_SUITE[engine] for engine in ("ddp", "zero2", "zero3", "fsdp2"))
