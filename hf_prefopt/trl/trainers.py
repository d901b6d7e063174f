"""TRL's trainers: subclasses of `PreferenceTrainer` with TRL's configurations and with TRL's order of arguments."""

import inspect
import os
from typing import Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedModel, set_seed

from hf_prefopt.reference.live import LiveReference
from hf_prefopt.trainer import PreferenceTrainer
from hf_prefopt.training.router import aux_loss_coef
from hf_prefopt.trl.configs import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, TPOConfig, TRLConfig

_DATA = ("data_collator", "train_dataset", "eval_dataset", "processing_class")
_STABLE = ("model", "ref_model", "args", *_DATA, "compute_metrics", "callbacks", "optimizers", "quantization_config")
_CONCATENATED = ("model", "args", *_DATA, "model_init", "callbacks", "optimizers", "preprocess_logits_for_metrics")


class TRLTrainer(PreferenceTrainer):
    """The base class of TRL's trainers.

    Attributes:
        config_class: the class of the trainer's configuration.
        method: the name of the method, such as "DPO", which is used in the model's tags and in the default folder.
        order: the names of the trainer's arguments, in the order of TRL.
        ref_model: the reference model if it is loaded as a separate module, otherwise `None`.
        aux_loss_enabled: whether the auxiliary loss of a mixture of experts is part of the loss.
    """

    args: TRLConfig
    config_class: ClassVar[type[TRLConfig]]
    method: ClassVar[str]
    __signature__: ClassVar[inspect.Signature]
    order: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        cls.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in cls.order])

    def __init__(self, *positional: Any, **named: Any):
        if len(positional) > len(self.order):
            raise TypeError(f"{type(self).__name__} takes {len(self.order)} arguments: {', '.join(self.order)}")
        by_place = dict(zip(self.order, positional, strict=False))
        if twice := by_place.keys() & named.keys():
            raise TypeError(f"{type(self).__name__}: {', '.join(twice)} is given twice, by position and by keyword")
        given = {name: value for name, value in {**by_place, **named}.items() if value is not None}
        args = given["args"] = self._checked(given.pop("args", None), given.get("model"))
        if args.trust_remote_code and (isinstance(given.get("model"), str) or "processing_class" not in given):
            args.model_init_kwargs = {"trust_remote_code": True, **cast(dict, args.model_init_kwargs or {})}
        set_seed(args.seed)  # before an adapter is initialized
        super().__init__(**given)
        cast(PreTrainedModel, self.model).add_model_tags(["hf_prefopt", self.method.lower()])

    @classmethod
    def _checked(cls, args: Any, model: Any) -> TRLConfig:
        """Return the configuration, after a check of its class.

        If `args` is `None`, return the default configuration. As in TRL, its output folder is named after the model.

        Raises:
            TypeError: `args` is a configuration of another class, such as TRL's own.
        """
        if args is None:
            name = model if isinstance(model, str | os.PathLike) else getattr(model, "name_or_path", "")
            return cls.config_class(f"{os.path.basename(os.fspath(name))}-{cls.method}")
        if not isinstance(args, cls.config_class):
            raise TypeError(
                f"args is a {type(args).__module__}.{type(args).__name__}, but {cls.__name__} takes the "
                f"{cls.config_class.__name__} of hf_prefopt.trl: change this import, too"
            )
        return args

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model if it is loaded as a separate module, otherwise `None`."""
        reference = self.reference
        return reference.model if isinstance(reference, LiveReference) and reference.is_separate else None

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the auxiliary loss of a mixture of experts is part of the loss.

        This follows TRL's `DPOTrainer`; TRL's other trainers compute the auxiliary loss only if the model's config has
        `output_router_logits=True`.
        """
        return aux_loss_coef(self.model, self.args.router_aux_loss_coef) > 0

    def create_model_card(  # type: ignore[override]  # TRL's signature
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """Create the model card as `PreferenceTrainer.create_model_card` does. Arguments have TRL's names and order."""
        super().create_model_card(model_name=model_name, dataset=dataset_name, tags=tags, **metadata)


class DPOTrainer(TRLTrainer):
    """TRL's `DPOTrainer`. See `PreferenceTrainer` for the arguments, and `DPOConfig` for the settings."""

    config_class, method, order = DPOConfig, "DPO", (*_STABLE, "peft_config")


class KTOTrainer(TRLTrainer):
    """TRL's `KTOTrainer`. See `PreferenceTrainer` for the arguments, and `KTOConfig` for the settings."""

    config_class, method, order = KTOConfig, "KTO", (*_STABLE, "peft_config")


class CPOTrainer(TRLTrainer):
    """TRL's `CPOTrainer`, for CPO, SimPO and AlphaPO.

    See `PreferenceTrainer` for the arguments, and `CPOConfig` for the settings.
    """

    config_class, method, order = CPOConfig, "CPO", (*_CONCATENATED, "peft_config", "compute_metrics")


class ORPOTrainer(TRLTrainer):
    """TRL's `ORPOTrainer`. See `PreferenceTrainer` for the arguments, and `ORPOConfig` for the settings."""

    config_class, method, order = ORPOConfig, "ORPO", (*_CONCATENATED, "peft_config", "compute_metrics")


class TPOTrainer(TRLTrainer):
    """TRL's `TPOTrainer`. See `PreferenceTrainer` for the arguments, and `TPOConfig` for the settings."""

    config_class, method = TPOConfig, "TPO"
    order = ("model", "args", *_DATA, "compute_metrics", "callbacks", "optimizers", "peft_config")
