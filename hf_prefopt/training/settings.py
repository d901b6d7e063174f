"""Settings that change after the trainer is made, by a hyperparameter search or by hand: they take effect, or raise."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.objective.objective import Objective


def own_names(config: type[PreferenceConfig] = PreferenceConfig) -> frozenset[str]:
    """The settings that a configuration adds to the Trainer's."""
    return frozenset({field.name for field in fields(config)} - {field.name for field in fields(TrainingArguments)})


# What has shaped the prepared data or the trainer before any trial begins.
SETTLED = (
    "column_mapping",
    "remove_columns",
    "text_as",
    "chat_template_kwargs",
    "max_length",
    "truncation_mode",
    "unpair",
    "on_bad_rows",
    "dataset_num_proc",
    "pad_to_multiple_of",
    "show_first_batch",
    "model_init_kwargs",
    "precompute_ref_log_probs",
    "reference_cache_dir",
    "sync_ref_model",
    "hub_base_model",
)


class OwnSettings:
    """The settings that `PreferenceConfig` adds to the Trainer's, as they were when the trainer was made.

    Args:
        args: the configuration, which others change.

    Attributes:
        names: of the settings.
    """

    def __init__(self, args: PreferenceConfig):
        self._args, self.names = args, own_names(type(args))
        self._at_start = self._before_search = self._now()

    def _now(self) -> dict[str, Any]:
        return {name: getattr(self._args, name) for name in self.names}

    def refuse_changes(self) -> None:
        """Raise `ValueError` if any has changed since: without a `model_init` the change would have no effect."""
        changed = [f"{name}={value!r}" for name, value in self._now().items() if value != self._at_start[name]]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} was set after the trainer was made, which is too late: make a new trainer, "
                "or pass model_init in place of model"
            )

    def refuse_late_changes(self) -> None:
        """Raise `ValueError` if a setting has changed that shaped the trainer or its prepared data."""
        for name in SETTLED:
            value, before = getattr(self._args, name), self._at_start[name]
            if value != before:
                raise ValueError(
                    f"{name}={value!r} comes too late: the trainer and its data were made with {name}={before!r}; make "
                    "a trainer for each value"
                )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, trials change the settings; afterwards they are as before."""
        self._before_search = self._now()
        try:
            yield
        finally:
            self._set(self._before_search)

    def take(self, values: Mapping[str, Any], is_space: bool) -> None:
        """Set a trial's values as they are, without conversion; the others are those from before the search.

        Args:
            values: of our settings and of the Trainer's.
            is_space: whether a search space gave them, so that all names are the user's.

        Raises:
            ValueError: a value is invalid, or a name is not a setting.
        """
        self._set({**self._before_search, **{name: values[name] for name in values if name in self.names}})
        self._args.check()
        _refuse_unknown(values, self._args.build_objective(), self._args if is_space else None)

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self._args, name, value)


def evaluation_loss(metrics: Mapping[str, float]) -> float:
    """The loss of an evaluation, the mean of those of several evaluation sets."""
    losses = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("_loss")]
    return sum(losses) / len(losses)


def _refuse_unknown(values: Mapping[str, Any], objective: Objective, args: PreferenceConfig | None) -> None:
    """The Trainer would only warn of a name that is not a setting."""
    for term in objective.terms:
        for name in (values.keys() & term.spec.defaults.keys()) - own_names():
            raise ValueError(
                f"the search sets {name}={values[name]!r}, a hyperparameter of {term.spec.name} and no setting: search "
                f"loss_params={{{name!r}: …}}"
            )
    for name in values if args is not None else ():
        if not hasattr(args, name):
            raise ValueError(f"the search sets {name}={values[name]!r}, and PreferenceConfig has no such field")
