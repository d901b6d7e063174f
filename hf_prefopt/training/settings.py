"""Apply changes made to the settings after the trainer was created, or raise an error for them.

Such changes come from a hyperparameter search, from the user's code, or from a callback.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.objective.objective import Objective


def own_names(config: type[PreferenceConfig] = PreferenceConfig) -> frozenset[str]:
    """Return the names of the settings that a configuration class adds to `TrainingArguments`."""
    return frozenset({field.name for field in fields(config)} - {field.name for field in fields(TrainingArguments)})


# Settings that cannot change between trials, because they affect the prepared data or the construction of the trainer.
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
    "checkpointing_keeps",
    "activation_offloading",
)


class OwnSettings(TrainerCallback):
    """A callback that remembers the settings that `PreferenceConfig` adds to `TrainingArguments`, and detects changes.

    It raises `ValueError` if one of these settings has changed since training began, because the losses, the reference
    and the data were made from the earlier values.

    Args:
        args: The configuration. The callback compares its later values with the current ones.

    Attributes:
        names: Names of these settings.
    """

    def __init__(self, args: PreferenceConfig):
        self._args, self.names = args, own_names(type(args))
        self._at_start = self._before_search = self._in_use = self._now()
        self._accumulation = args.gradient_accumulation_steps

    def _now(self) -> dict[str, Any]:
        """Return the current values. Lists and dicts are copied, because users may change them in place."""
        values = {name: getattr(self._args, name) for name in self.names}
        return {name: value.copy() if isinstance(value, list | dict) else value for name, value in values.items()}

    def refuse_changes(self) -> None:
        """Raise `ValueError` if a setting has changed since the trainer was created.

        Call this method only without `model_init`. In this case, a change would have no effect.
        """
        changed = [f"{name}={value!r}" for name, value in self._now().items() if value != self._at_start[name]]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} was set after the trainer was created, which is too late: create a new trainer, "
                "or pass model_init instead of model"
            )

    def on_train_begin(self, args, state, control, **_):
        """Check that the run has at least one step, and remember how many batches a step has."""
        if state.max_steps == 0:
            raise ValueError(
                "nothing is trained, because the run has 0 steps: set args.max_steps above 0, or to -1 with "
                "args.num_train_epochs above 0"
            )
        self._accumulation = args.gradient_accumulation_steps

    def on_step_begin(self, args, state, control, **_):
        """Check the settings before each step."""
        self._refuse_unused()
        if args.gradient_accumulation_steps != self._accumulation:
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} was set during training, which began "
                f"with {self._accumulation}, so the losses of a step would have wrong weights: set it before train()"
            )

    def on_prediction_step(self, args, state, control, **_):
        """Check the settings in an evaluation, which may be called at any time."""
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        now = self._now()
        if now != self._in_use:
            changed = ", ".join(f"{name}={now[name]!r}" for name in now if now[name] != self._in_use[name])
            raise ValueError(
                f"{changed} was set after the losses were made from the settings, so it has no effect: create a new "
                "trainer, or, for a value that changes during training, register a loss with a parameter `progress` "
                "or `epoch`"
            )

    def refuse_late_changes(self) -> None:
        """Raise `ValueError` if a setting that affects the trainer's construction or prepared data has changed.

        Otherwise, the current values of all settings become the values from which later changes are detected.
        """
        for name in SETTLED:
            value, before = getattr(self._args, name), self._at_start[name]
            if value != before:
                raise ValueError(
                    f"{name}={value!r} comes too late: the trainer and its data were created with {name}={before!r}; "
                    "create a trainer for each value"
                )
        self._in_use = self._now()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Return a context manager in which trials may change the settings. At its end, the settings are restored."""
        self._before_search = self._now()
        try:
            yield
        finally:
            self._set(self._before_search)
            self._in_use = self._before_search

    def take(self, values: Mapping[str, Any], is_space: bool) -> None:
        """Set the values of a trial without converting them, and reset all other settings.

        Other settings get the values that they had before the search. Only settings that `PreferenceConfig` adds to
        `TrainingArguments` are set and reset.

        Args:
            values: Values of the trial, keyed by the names of settings.
            is_space: True if `values` is the user's search space, in which every name must be a setting.

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
    """Return the evaluation loss, or the mean loss over several evaluation sets."""
    losses = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("_loss")]
    return sum(losses) / len(losses)


def _refuse_unknown(values: Mapping[str, Any], objective: Objective, args: PreferenceConfig | None) -> None:
    """Raise `ValueError` for a name that is not a setting. The Trainer would only log a warning."""
    for term in objective.terms:
        for name in (values.keys() & term.spec.defaults.keys()) - own_names():
            raise ValueError(
                f"the search sets {name}={values[name]!r}, which is a hyperparameter of {term.spec.name}, not a "
                f"setting: search over loss_params={{{name!r}: …}}"
            )
    for name in values if args is not None else ():
        if not hasattr(args, name):
            raise ValueError(f"the search sets {name}={values[name]!r}, but PreferenceConfig has no such field")
