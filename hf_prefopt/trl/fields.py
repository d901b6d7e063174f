"""What becomes of each field that TRL's configurations have and `PreferenceConfig` does not: one table.

A field is used, or it changes nothing and a warning says so, or it raises an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _never(value: Any) -> bool:
    return False


def _is_set(value: Any) -> bool:
    return value is not None


@dataclass(frozen=True)
class Meaning:
    """What a field of TRL's does here.

    Attributes:
        text: for the help, the page docs/from_trl.md, warnings and errors.
        is_idle: whether a value changes nothing.
        is_refused: whether a value raises an error.
    """

    text: str
    is_idle: Callable[[Any], bool] = _never
    is_refused: Callable[[Any], bool] = _never


TRL_FIELDS: Mapping[str, Meaning] = {
    "trust_remote_code": Meaning(
        "Whether models and tokenizers that are loaded by name may bring code of their own: model_init_kwargs="
        "{'trust_remote_code': True}."
    ),
    "padding_free": Meaning(
        "No effect, as in TRL. layout='auto' computes no padding where that is exact for the model.", is_idle=bool
    ),
    "precompute_ref_batch_size": Meaning(
        "No effect: that pass takes as many responses as fit into max_tokens_per_batch positions.",
        is_idle=_is_set,
    ),
    "activation_offloading": Meaning(
        "Whether to keep activations in the CPU's memory until the backward. Not done here: "
        "gradient_checkpointing=True keeps fewer of them, and max_tokens_per_batch bounds them.",
        is_refused=bool,
    ),
    "pad_token": Meaning("No effect: what padding holds is never read.", is_idle=_is_set),
    "padding_value": Meaning("No effect: what padding holds is never read.", is_idle=_is_set),
    "max_completion_length": Meaning(
        "No effect, as in TRL without an encoder-decoder model. max_length bounds prompt and response together.",
        is_idle=_is_set,
    ),
    "generate_during_eval": Meaning(
        "Whether an evaluation also generates. Not done here: add hf_prefopt.callbacks.GenerationEvalCallback.",
        is_refused=bool,
    ),
    "is_encoder_decoder": Meaning(
        "Whether the model is an encoder-decoder model, which cannot be trained here.", is_refused=bool
    ),
    "discopop_tau": Meaning("τ of the loss discopop: loss_params={'discopop_tau': ...}."),
    "desirable_weight": Meaning("λ_D, of desirable responses: loss_params={'desirable_weight': ...}."),
    "undesirable_weight": Meaning("λ_U, of undesirable responses: loss_params={'undesirable_weight': ...}."),
    "cpo_alpha": Meaning(
        "Weight of the chosen responses' NLL: loss_params={'cpo_alpha': ...} of the loss cpo, sft_weight beside others."
    ),
    "simpo_gamma": Meaning("γ of simpo, the target margin: loss_params={'gamma': ...}."),
    "alpha": Meaning(
        "α of AlphaPO, 0.0 for SimPO: loss_params={'alpha': ...} of the loss alphapo. Beside another loss an error: "
        "TRL takes e^(−α·s) of summed log-probs s there, which is infinite for responses below −103 nats."
    ),
    "tpo_alpha": Meaning(
        "Weight of the gold responses' NLL: loss_params={'tpo_alpha': ...} of the losses tpo and tpo_l, the weight of "
        "sft_gold beside others."
    ),
    "tpo_l_gamma": Meaning("γ of tpo_l, the target margin: loss_params={'gamma': ...}."),
}


def trl_field(name: str, default: Any) -> Any:
    """A dataclass field that only TRL has, with its help."""
    return field(default=default, metadata={"help": TRL_FIELDS[name].text})


def helped(text: str) -> dict[str, str]:
    """The metadata of a dataclass field that `PreferenceConfig` has, too, with another default or another help."""
    return {"help": text}
