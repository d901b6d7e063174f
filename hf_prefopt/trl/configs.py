"""TRL's configurations: `PreferenceConfig` with the fields and defaults of TRL 1.16.

`trl.fields` describes the fields that only TRL has, and `trl.losses` translates each `loss_type` to losses here.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.config_docs import default_of, documented
from hf_prefopt.kinds import ExampleKind
from hf_prefopt.losses import get_loss
from hf_prefopt.objective.objective import AsLogged, Objective
from hf_prefopt.trl.fields import TRL_FIELDS, helped, trl_field
from hf_prefopt.trl.losses import CPO, KTO, ORPO, TPO, Translation, translated
from hf_prefopt.trl.metrics import of_dpo, renamed, renamed_per_token

logger = logging.getLogger(__name__)

_OFFLOADING = "Whether to keep activations in CPU memory between forward and backward pass. It needs a GPU."
_MULTIPLE = "Round padded lengths up to a multiple of this number (layout padded). auto does not round."
_BETA = "β of the losses."
_SMOOTHING = "ε of the losses that support label smoothing. Values other than 0.0 need such a loss."


@dataclass
class TRLConfig(PreferenceConfig):
    """The base class of TRL's configurations: `PreferenceConfig` with additional fields and other defaults."""

    # The hyperparameters of losses for which TRL's configuration has a field.
    HYPERPARAMETERS: ClassVar[tuple[str, ...]] = ()

    beta: float = field(default=0.1, metadata=helped(_BETA))
    disable_dropout: bool = field(
        default=True, metadata=helped("Whether to disable dropout in the model and its adapters.")
    )
    gradient_checkpointing: bool = field(
        default=True, metadata=helped("Whether to recompute activations in the backward pass.")
    )
    trust_remote_code: bool = trl_field("trust_remote_code", False)

    def __post_init__(self):
        for name in TRL_FIELDS.keys() & {own.name for own in fields(self)}:
            self._check_trl_field(name)
        super().__post_init__()

    def _check_trl_field(self, name: str) -> None:
        meaning, value = TRL_FIELDS[name], getattr(self, name)
        if meaning.is_refused(value):
            raise ValueError(f"{name}={value!r}: {meaning.text}")
        if meaning.is_idle(value):
            logger.warning("%s=%r: %s", name, value, meaning.text)

    def check(self) -> None:
        """Check the settings as `PreferenceConfig.check` does, but only warn about fields that no loss uses.

        Raises:
            ValueError: `loss_params` is set, which TRL does not have, or `PreferenceConfig.check` raises it.
        """
        super().check()
        if self.loss_params is not None:
            raise ValueError(
                f"loss_params={self.loss_params!r} is not a field of TRL's {type(self).__name__}: set its fields "
                f"({', '.join(self.HYPERPARAMETERS) or 'beta'}), or use PreferenceConfig"
            )
        for name in set(self.HYPERPARAMETERS) - self.used_hyperparameters():
            value = getattr(self, name)
            if value != default_of(type(self).__dataclass_fields__[name]):
                self.refuse_unread(f"{name}={value!r} is not used by loss_type={', '.join(self.loss_type)}")

    def used_hyperparameters(self) -> set[str]:
        """Return names of hyperparameters, including those in `HYPERPARAMETERS` that the selected losses use."""
        raise NotImplementedError

    def refuse_unread(self, text: str) -> None:
        """Log a warning about a setting that has no effect. Like TRL, accept it."""
        logger.warning("no effect: %s", text)

    def build_objective(self, kind: ExampleKind | None = None, columns: Collection[str] = ()) -> Objective:
        """Build the objective as `PreferenceConfig.build_objective` does, but log metrics under TRL's names."""
        objective = super().build_objective(kind, columns)
        objective.as_logged = self.as_logged(objective)
        return objective

    def as_logged(self, objective: Objective) -> AsLogged:
        """Return a function that converts the metrics of this objective to TRL's names and conventions."""
        return renamed


@dataclass
class OneLossConfig(TRLConfig):
    """A configuration with a single `loss_type`. The table `LOSSES` translates it to losses of this package."""

    LOSSES: ClassVar[Mapping[str, Translation]]

    def losses(self) -> dict[str, Any]:
        """Return the losses as `PreferenceConfig.losses` does, translated by `LOSSES`."""
        return super().losses() | translated(self.LOSSES, self)

    def used_hyperparameters(self) -> set[str]:
        """See `TRLConfig.used_hyperparameters`."""
        this = self.LOSSES[self.loss_type[0]]
        return {*this.params.values(), *filter(None, [this.nll_weight]), *(["alpha"] if this.bent else [])}


class _PerToken:
    """A mixin for the configurations of TRL's experimental trainers.

    If the loss averages over tokens, these trainers log the responses' log-probs per token.
    """

    def as_logged(self, objective: Objective) -> AsLogged:
        """See `TRLConfig.as_logged`."""
        return renamed_per_token if objective.terms[0].spec.is_average_loss else renamed


@documented({"loss_type": "TRL's fields"})
@dataclass
class DPOConfig(TRLConfig):
    """TRL's `DPOConfig`: the fields of `PreferenceConfig` with TRL's defaults, and the following fields.

    Raises:
        ValueError: a field has an invalid value. The error is raised at construction.
    """

    HYPERPARAMETERS: ClassVar[tuple[str, ...]] = ("discopop_tau",)

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata=helped("One or more losses; TRL's names are aliases of the names here."),
    )
    label_smoothing: float = field(default=0.0, metadata=helped(_SMOOTHING))
    discopop_tau: float = trl_field("discopop_tau", 0.05)
    pad_to_multiple_of: int | str | None = field(  # type: ignore[assignment]  # "auto" becomes None
        default="auto", metadata=helped(_MULTIPLE)
    )
    padding_free: bool = trl_field("padding_free", False)
    precompute_ref_batch_size: int | None = trl_field("precompute_ref_batch_size", None)
    activation_offloading: bool = field(default=False, metadata=helped(_OFFLOADING))
    pad_token: str | None = trl_field("pad_token", None)

    def __post_init__(self):
        self.pad_to_multiple_of = _multiple(self.pad_to_multiple_of)
        super().__post_init__()

    def losses(self) -> dict[str, Any]:
        """Return the losses as `PreferenceConfig.losses` does.

        If no loss has a β, TRL's default β is left out, because `build_objective` rejects unused hyperparameters.
        """
        given, specs = super().losses(), [get_loss(name) for name in self.loss_type]
        if self.beta == DPOConfig.beta and not any("beta" in spec.defaults for spec in specs):
            given["shared_params"].pop("beta")
        own = {spec.name: {"discopop_tau": self.discopop_tau} for spec in specs if "discopop_tau" in spec.defaults}
        return given | {"loss_params": own}

    def used_hyperparameters(self) -> set[str]:
        """See `TRLConfig.used_hyperparameters`."""
        return {name for loss in self.loss_type for name in get_loss(loss).defaults}

    def as_logged(self, objective: Objective) -> AsLogged:
        """See `TRLConfig.as_logged`."""
        return of_dpo(self.beta)


@documented({"loss_type": "TRL's fields"})
@dataclass
class KTOConfig(OneLossConfig):
    """TRL's `KTOConfig`: the fields of `PreferenceConfig` with TRL's defaults, and the following fields.

    Raises:
        ValueError: a field has an invalid value. The error is raised at construction.
    """

    LOSSES: ClassVar[Mapping[str, Translation]] = KTO
    HYPERPARAMETERS: ClassVar[tuple[str, ...]] = ("desirable_weight", "undesirable_weight")

    loss_type: list[str] = field(default_factory=lambda: ["kto"], metadata=helped(f"One of {', '.join(KTO)}."))
    desirable_weight: float = trl_field("desirable_weight", 1.0)
    undesirable_weight: float = trl_field("undesirable_weight", 1.0)
    unpair: bool = field(
        default=True, metadata=helped("Split pairs into desirable and undesirable examples, as KTOTrainer does.")
    )
    pad_to_multiple_of: int | str | None = field(  # type: ignore[assignment]  # "auto" becomes None
        default="auto", metadata=helped(_MULTIPLE)
    )
    precompute_ref_batch_size: int | None = trl_field("precompute_ref_batch_size", None)
    activation_offloading: bool = field(default=False, metadata=helped(_OFFLOADING))

    def __post_init__(self):
        self.pad_to_multiple_of = _multiple(self.pad_to_multiple_of)
        super().__post_init__()


@documented({"loss_type": "TRL's fields"})
@dataclass
class CPOConfig(_PerToken, OneLossConfig):
    """TRL's `CPOConfig`, for CPO, SimPO and AlphaPO.

    It has the fields of `PreferenceConfig` with TRL's defaults, and the following fields.

    Raises:
        ValueError: a field has an invalid value. The error is raised at construction.
    """

    LOSSES: ClassVar[Mapping[str, Translation]] = CPO
    HYPERPARAMETERS: ClassVar[tuple[str, ...]] = ("cpo_alpha", "simpo_gamma", "alpha")

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"], metadata=helped(f"One of {', '.join(CPO)}."))
    label_smoothing: float = field(default=0.0, metadata=helped(_SMOOTHING))
    cpo_alpha: float = trl_field("cpo_alpha", 1.0)
    simpo_gamma: float = trl_field("simpo_gamma", 0.5)
    alpha: float = trl_field("alpha", 0.0)
    max_completion_length: int | None = trl_field("max_completion_length", None)
    generate_during_eval: bool = trl_field("generate_during_eval", False)
    is_encoder_decoder: bool | None = trl_field("is_encoder_decoder", None)


@documented({"loss_type": "TRL's fields"})
@dataclass
class ORPOConfig(_PerToken, OneLossConfig):
    """TRL's `ORPOConfig`: the fields of `PreferenceConfig` with TRL's defaults, and the following fields.

    Raises:
        ValueError: a field has an invalid value. The error is raised at construction.
    """

    LOSSES: ClassVar[Mapping[str, Translation]] = ORPO

    loss_type: list[str] = field(
        default_factory=lambda: ["orpo"],
        metadata=helped("orpo, with the NLL of prompt and response (orpo_sequence here)."),
    )
    max_completion_length: int | None = trl_field("max_completion_length", None)
    padding_value: int | None = trl_field("padding_value", None)
    generate_during_eval: bool = trl_field("generate_during_eval", False)
    is_encoder_decoder: bool | None = trl_field("is_encoder_decoder", None)


@documented({"loss_type": "TRL's fields"})
@dataclass
class TPOConfig(_PerToken, OneLossConfig):
    """TRL's `TPOConfig`: the fields of `PreferenceConfig` with TRL's defaults, and the following fields.

    Raises:
        ValueError: a field has an invalid value. The error is raised at construction.
    """

    LOSSES: ClassVar[Mapping[str, Translation]] = TPO
    HYPERPARAMETERS: ClassVar[tuple[str, ...]] = ("tpo_alpha", "tpo_l_gamma")

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"], metadata=helped(f"One of {', '.join(TPO)}."))
    beta: float = field(default=0.01, metadata=helped(_BETA))
    label_smoothing: float = field(default=0.0, metadata=helped(_SMOOTHING))
    tpo_alpha: float = trl_field("tpo_alpha", 1.0)
    tpo_l_gamma: float = trl_field("tpo_l_gamma", 0.5)
    learning_rate: float = field(default=5e-7, metadata=helped("The initial learning rate."))


def _multiple(value: int | str | None) -> int | None:
    """Parse `pad_to_multiple_of`. The texts "auto", "none" and "null" mean that lengths are not rounded up.

    In TRL, "auto" means the same, except on AWS Trainium.
    """
    if not isinstance(value, str):
        return value
    return None if value.lower() in ("auto", "none", "null") else int(value)
