"""Collect the facts of a run for the model card and the closing report."""

from collections.abc import Iterable, Mapping, Sized
from dataclasses import MISSING, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
import yaml
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, TrainerState

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.folders import name_of
from hf_prefopt.objective.term import Term
from hf_prefopt.reporting.card import CardFacts, LossFacts
from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.results import evaluated_sets, last_evaluation, results_of
from hf_prefopt.reporting.serve_command import serve_command
from hf_prefopt.scoring.forward import base_causal_lm

_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "bf16",
    "seed",
)
_SETUP = ("model", "layout", "attention", "batch")
NOTHING_TRAINED = "nothing was trained: the run made no step, so the model is the one that it started from"


def card_facts(
    args: PreferenceConfig,
    model: PreTrainedModel | PeftModel,
    terms: Iterable[Term],
    reference: str | None,
    state: TrainerState,
    rows: Mapping[str, Any],
    model_name: str | None = None,
    datasets: Iterable[str] = (),
    setup: Mapping[str, str] = MappingProxyType({}),
    record: RunRecord | None = None,
) -> CardFacts:
    """Collect the facts of a run for the model card.

    Args:
        model: Policy, without an engine's wrapper.
        terms: Losses of the objective.
        reference: Description of the reference in a few words; `None` if the losses need no reference.
        state: State of the Trainer. Its logs contain the evaluations.
        rows: Datasets whose numbers of rows are shown, keyed by purpose, such as `{"training rows": dataset}`.
        model_name: Title of the card. Default: the name of the repository or of the output folder.
        datasets: Names or folders of the data. The trainer only knows the rows, so the caller passes the names.
        setup: Texts of the start summary, keyed by topic. Topics that other sections of the card cover are ignored.
        record: Record of the run; `None` if the run has not ended.
    """
    repository = args.hub_model_id or str(args.output_dir)
    adapter = model.active_peft_config if isinstance(model, PeftModel) else None
    base_model = args.hub_base_model or model.config._name_or_path or "a model made in memory"
    counts = {name: f"{len(dataset):,}" for name, dataset in rows.items() if isinstance(dataset, Sized)}
    return CardFacts(
        model_name=model_name or name_of(repository),
        base_model=base_model,
        losses=[_loss_facts(term) for term in terms],
        is_adapter=adapter is not None,
        model_class=_own_class(base_causal_lm(model)),
        serve=serve_command(repository, base_model, adapter),
        repository=repository,
        reference=reference or "none, the loss needs none",
        datasets=list(datasets),
        data={"datasets": ", ".join(f"`{name}`" for name in datasets), **counts},
        setup={topic: text for topic, text in setup.items() if topic in _SETUP},
        hyperparameters=_hyperparameters(args, model, state.global_step),
        metrics=last_evaluation(state.log_history),
        configuration=configuration(args),
        has_curves=record is not None and Path(args.output_dir, "curves.png").is_file(),
        **(_of_record(record) if record is not None else {"warnings": untrained(state)}),
    )


def untrained(state: TrainerState) -> tuple[str, ...]:
    """Return a warning if no step was made."""
    return () if state.global_step else (NOTHING_TRAINED,)


def _of_record(record: RunRecord) -> dict[str, Any]:
    """Return the fields of the card that come from the record of the run."""
    seconds = record.run.get("seconds")
    time = f", {seconds / 60:.1f} minutes" if seconds else ""
    return {
        "results": results_of(record, evaluated_sets(record)[0]),
        "answers": record.answers,
        "hardware": f"{record.run.get('hardware', '')}{time}",
        "warnings": tuple(record.run.get("warnings", ())),
    }


def _own_class(model: PreTrainedModel) -> str | None:
    """Return the name of a model's class if `AutoModelForCausalLM` would load another class. Otherwise, return None."""
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    is_public = hasattr(transformers, type(model).__name__)  # False for a class whose code is part of the checkpoint
    return type(model).__name__ if is_public and loaded is not type(model) else None


def configuration(args: PreferenceConfig) -> str:
    """Return the settings that differ from their defaults, as YAML text for a configuration file."""
    chosen = {}
    for setting in fields(args):
        if setting.init and setting.name not in _NOT_SHARED:
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            value = getattr(args, setting.name)
            value = getattr(value, "value", value)
            if setting.name == "output_dir" and Path(value).is_absolute():
                continue  # An absolute path is valid only on this machine.
            if value != getattr(default, "value", default) and _is_plain(value):
                chosen[setting.name] = value
    return yaml.safe_dump(chosen, sort_keys=True, allow_unicode=True) if chosen else ""


# Settings that are not shown, because they are secrets or specific to one machine.
_NOT_SHARED = ("hub_token", "push_to_hub_token", "logging_dir", "local_rank", "deepspeed", "resume_from_checkpoint")


def _is_plain(value: Any) -> bool:
    """Return True if YAML can represent a value without tags for Python types."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)


def _loss_facts(term: Any) -> LossFacts:
    spec = term.spec
    return LossFacts(spec.name, spec.description, spec.paper, term.weight, term.hyperparameters)


def _hyperparameters(args: PreferenceConfig, model: Any, steps: int) -> dict[str, Any]:
    """Return the settings that affect the result, the number of optimizer steps, and the settings of an adapter."""
    settings = {name: getattr(args, name) for name in _ARGUMENTS}
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}
    settings["processes"] = args.world_size
    settings["optimizer steps"] = steps
    if isinstance(model, PeftModel):
        adapter = model.active_peft_config
        settings["adapter"] = adapter.peft_type.value
        for name in ("r", "lora_alpha", "lora_dropout"):
            if hasattr(adapter, name):
                settings[name] = getattr(adapter, name)
        targets = getattr(adapter, "target_modules", None)
        settings["target_modules"] = ", ".join(sorted(targets)) if isinstance(targets, set | list) else targets
    return settings
