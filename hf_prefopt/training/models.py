"""Load the parts from which a trainer is built: the policy, the reference if one was passed, and the tokenizer."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftConfig, PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.endings import stop_tokens
from hf_prefopt.loading import load_model, load_processing_class
from hf_prefopt.policy import sample_of, under_adapter, with_adapter
from hf_prefopt.reference.choose import check_reference
from hf_prefopt.scoring.positions import shortest_limit
from hf_prefopt.training.arguments import check_loading
from hf_prefopt.training.preference_data import PreferenceData
from hf_prefopt.training.trainable import check_trainable


@dataclass(frozen=True)
class Models:
    """The models of a trainer; load them with `load_models`.

    Attributes:
        args: Settings of the trainer.
        policy: The policy; `None` if `model_init` creates it.
        model_init: Function that creates the policy; `None` if `policy` is set.
        reference: The reference that the user passed. A reference given by name is loaded only if the losses need a
            reference. Otherwise this is still the name, and `check` raises an error.
        name: Name or path from which the policy was loaded.
    """

    args: PreferenceConfig
    policy: PreTrainedModel | PeftModel | None
    model_init: Callable[..., PreTrainedModel | PeftModel] | None
    reference: nn.Module | None
    name: str | None

    def check(self, optimizer: Optimizer | None, trains: bool) -> None:
        """Check the policy. A model from `model_init` is checked only when it is created.

        Args:
            optimizer: The user's optimizer.
            trains: True if there is training data.

        Raises:
            ValueError: no parameter of the policy is trained; the optimizer was not created for the trained
                parameters; or the setting `reference` is incompatible with the models.
        """
        if self.policy is not None:
            check_trainable(self.policy, optimizer, trains)
            needs_reference = self.args.build_objective().needs_reference_model
            check_reference(self.args.reference, self.policy, self.reference, needs_reference)

    def processing_class(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """Load the tokenizer or the processor that was saved with the policy."""
        model = self.policy
        if model is None:
            assert self.model_init is not None, "there is a model or a model_init"
            model = sample_of(self.model_init)
        return load_processing_class(model, _init_kwargs(self.args), self.name)

    def data(self, processing_class: Any) -> PreferenceData:
        """Return the object that prepares datasets for these models.

        Args:
            processing_class: A tokenizer, or a processor that has one.
        """
        policy = self.policy
        embeddings = _fewest_embeddings(policy, self.reference) if policy is not None else None
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        limit = shortest_limit(policy, self.reference)
        return PreferenceData(self.args, tokenizer, embeddings, stop_tokens(policy), limit)


def _fewest_embeddings(*models: nn.Module | None) -> int | None:
    """Return the smallest number of token embeddings in any of the models; `None` if no number is known."""
    layers = [model.get_input_embeddings() for model in models if isinstance(model, PreTrainedModel | PeftModel)]
    counts = [getattr(layer, "num_embeddings", None) for layer in layers]
    return min((count for count in counts if count is not None), default=None)


def load_models(
    args: PreferenceConfig,
    model: str | os.PathLike | PreTrainedModel | PeftModel | None,
    ref_model: nn.Module | str | os.PathLike | None,
    model_init: Callable[..., PreTrainedModel] | None,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    processing_class: Any,
) -> Models:
    """Load the models that were passed by name, and add a new adapter to the policy if there is a `peft_config`.

    The arguments are those of `PreferenceTrainer`. A reference that the losses do not need is not loaded.

    Raises:
        ValueError: there are loading options, but no model was passed by name.
    """
    check_loading(args, (model, ref_model), quantization_config, processing_class)
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    needs_reference, kwargs = args.build_objective().needs_reference_model, _init_kwargs(args)
    if isinstance(ref_model, str | os.PathLike) and needs_reference:
        ref_model = load_model(os.fspath(ref_model), kwargs, quantization_config)
    reference = cast("nn.Module | None", ref_model)
    if name is not None:
        model = load_model(name, kwargs, quantization_config)
    if model is not None:
        policy = with_adapter(cast(PreTrainedModel, model), peft_config)
        return Models(args, policy, model_init, reference, name)
    assert model_init is not None, "there is a model or a model_init"
    return Models(args, None, under_adapter(model_init, peft_config), reference, name)


def _init_kwargs(args: PreferenceConfig) -> dict[str, Any] | None:
    """Return `model_init_kwargs` with the type of a dict. `PreferenceConfig` has already parsed it if it was JSON."""
    return cast("dict[str, Any] | None", args.model_init_kwargs)
