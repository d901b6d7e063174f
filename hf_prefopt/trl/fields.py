"""The fields of TRL's configurations that `PreferenceConfig` does not have, and what they do here.

A field is used, has no effect and logs a warning, or raises an error.
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
    """What a field from TRL does here.

    Attributes:
        text: the text for the help, docs/from_trl.md, warnings and errors.
        is_idle: whether a value has no effect.
        is_refused: whether a value raises an error.
    """

    text: str
    is_idle: Callable[[Any], bool] = _never
    is_refused: Callable[[Any], bool] = _never


TRL_FIELDS: Mapping[str, Meaning] = {
    "trust_remote_code": Meaning(
        "Whether to run the code that comes with models and tokenizers loaded by name: model_init_kwargs="
        "{'trust_remote_code': True}."
    ),
    "padding_free": Meaning(
        "No effect, as in TRL. layout='auto' avoids padding if that is exact for the model.", is_idle=bool
    ),
    "precompute_ref_batch_size": Meaning(
        "No effect: max_tokens_per_batch bounds the batches of that pass.",
        is_idle=_is_set,
    ),
    "pad_token": Meaning("No effect: padding is never read.", is_idle=_is_set),
    "padding_value": Meaning("No effect: padding is never read.", is_idle=_is_set),
    "max_completion_length": Meaning(
        "No effect, as in TRL without an encoder-decoder model. max_length bounds prompt and response together.",
        is_idle=_is_set,
    ),
    "generate_during_eval": Meaning(
        "Whether evaluations also generate. Not supported: add hf_prefopt.callbacks.GenerationEvalCallback.",
        is_refused=bool,
    ),
    "is_encoder_decoder": Meaning("Whether the model is an encoder-decoder model. Not supported.", is_refused=bool),
    "discopop_tau": Meaning("τ of the loss discopop: loss_params={'discopop_tau': ...}."),
    "desirable_weight": Meaning("λ_D, of desirable responses: loss_params={'desirable_weight': ...}."),
    "undesirable_weight": Meaning("λ_U, of undesirable responses: loss_params={'undesirable_weight': ...}."),
    "cpo_alpha": Meaning(
        "Weight of the chosen responses' NLL: loss_params={'cpo_alpha': ...} for the loss cpo, sft_weight for others."
    ),
    "simpo_gamma": Meaning("γ of simpo, the target margin: loss_params={'gamma': ...}."),
    "alpha": Meaning(
        "α of AlphaPO, 0.0 for SimPO: loss_params={'alpha': ...} for the loss alphapo. An error with other losses, for "
        "which TRL computes e^(−α·s) from summed log-probs s, which is infinite below −103 nats."
    ),
    "tpo_alpha": Meaning(
        "Weight of the gold responses' NLL: loss_params={'tpo_alpha': ...} for the losses tpo and tpo_l, the weight of "
        "sft_gold for others."
    ),
    "tpo_l_gamma": Meaning("γ of tpo_l, the target margin: loss_params={'gamma': ...}."),
}


def trl_field(name: str, default: Any) -> Any:
    """A dataclass field that only TRL has, with its help text."""
    return field(default=default, metadata={"help": TRL_FIELDS[name].text})


def helped(text: str) -> dict[str, str]:
    """The metadata of a field that overrides the default or help text of a field of `PreferenceConfig`."""
    return {"help": text}
