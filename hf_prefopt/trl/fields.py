"""The fields of TRL's configurations that `PreferenceConfig` does not have, and what they do here.

A field has the same effect as in TRL, or it has no effect and logs a warning, or it raises an error.
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
    """The effect in this package of a field that only TRL has.

    Attributes:
        text: a description of the field, which is shown in the help, docs/from_trl.md, warnings and errors.
        is_idle: a function that returns True for values that are meant to have an effect, but have none here. They log
            a warning.
        is_refused: a function that returns True for values that raise an error.
    """

    text: str
    is_idle: Callable[[Any], bool] = _never
    is_refused: Callable[[Any], bool] = _never


TRL_FIELDS: Mapping[str, Meaning] = {
    "trust_remote_code": Meaning(
        "Whether to run the code that comes with models and tokenizers loaded by name. In PreferenceConfig: "
        "model_init_kwargs={'trust_remote_code': True}."
    ),
    "padding_free": Meaning(
        "No effect, as in TRL. layout='auto' avoids padding if that is exact for the model.", is_idle=bool
    ),
    "precompute_ref_batch_size": Meaning(
        "No effect: max_tokens_per_batch limits the batches in which the reference's log-probs are precomputed.",
        is_idle=_is_set,
    ),
    "pad_token": Meaning("No effect: padding is never read.", is_idle=_is_set),
    "padding_value": Meaning("No effect: padding is never read.", is_idle=_is_set),
    "max_completion_length": Meaning(
        "No effect, as in TRL without an encoder-decoder model. max_length bounds prompt and response together.",
        is_idle=_is_set,
    ),
    "generate_during_eval": Meaning(
        "Whether evaluations also generate text. Not supported: add hf_prefopt.callbacks.GenerationEvalCallback.",
        is_refused=bool,
    ),
    "is_encoder_decoder": Meaning("Whether the model is an encoder-decoder model. Not supported.", is_refused=bool),
    "discopop_tau": Meaning("τ of the loss discopop. In PreferenceConfig: loss_params={'discopop_tau': ...}."),
    "desirable_weight": Meaning(
        "λ_D, the weight of desirable responses. In PreferenceConfig: loss_params={'desirable_weight': ...}."
    ),
    "undesirable_weight": Meaning(
        "λ_U, the weight of undesirable responses. In PreferenceConfig: loss_params={'undesirable_weight': ...}."
    ),
    "cpo_alpha": Meaning(
        "The weight of the chosen responses' NLL. In PreferenceConfig: loss_params={'cpo_alpha': ...} for the loss "
        "cpo, sft_weight for other losses."
    ),
    "simpo_gamma": Meaning("γ of simpo, the target margin. In PreferenceConfig: loss_params={'gamma': ...}."),
    "alpha": Meaning(
        "α of AlphaPO; 0.0 means SimPO. In PreferenceConfig: loss_params={'alpha': ...} for the loss alphapo. Other "
        "losses raise an error: TRL computes (e^s)^(−α) from their summed log-probs s, which is infinite for s below "
        "−103 nats."
    ),
    "tpo_alpha": Meaning(
        "The weight of the gold responses' NLL. In PreferenceConfig: loss_params={'tpo_alpha': ...} for the losses tpo "
        "and tpo_l, the weight of sft_gold for other losses."
    ),
    "tpo_l_gamma": Meaning("γ of tpo_l, the target margin. In PreferenceConfig: loss_params={'gamma': ...}."),
}


def trl_field(name: str, default: Any) -> Any:
    """Return the dataclass field for a field that only TRL has. `TRL_FIELDS` provides the help text."""
    return field(default=default, metadata={"help": TRL_FIELDS[name].text})


def helped(text: str) -> dict[str, str]:
    """Return the metadata of a dataclass field: its help text.

    It is for fields that override the default or the help text of a field of `PreferenceConfig`.
    """
    return {"help": text}
