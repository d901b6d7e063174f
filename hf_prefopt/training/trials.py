"""Trials of a hyperparameter search: whatever of our settings they change takes effect, or is refused."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.objective.objective import Objective
from hf_prefopt.training.stepping import SteppingTrainer
from hf_prefopt.training.trainable import refuse_frozen, refuse_stale_optimizer

OWN = tuple({field.name for field in fields(PreferenceConfig)} - {field.name for field in fields(TrainingArguments)})
# What has shaped the prepared data or the trainer itself before any trial begins.
SETTLED = (
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
)


def settings_of(args: PreferenceConfig) -> dict[str, Any]:
    """The settings that `PreferenceConfig` adds to the Trainer's, by name."""
    return {name: getattr(args, name) for name in OWN}


def set_all(args: PreferenceConfig, values: Mapping[str, Any]) -> None:
    """Set settings as they are given, with no conversion."""
    for name, value in values.items():
        setattr(args, name, value)


class TryingTrainer(SteppingTrainer):
    """A Trainer whose `hyperparameter_search` may search its own settings, too: β, the loss, the reference, ….

    With a `model_init`, `train()` takes over the settings as they are in `args` when it begins, those of a trial or
    those that were set by hand. How a model is prepared for them is the subclass's: `_adopt`.
    """

    _configured: dict[str, Any]
    _before_search: dict[str, Any]

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        **search: Any,
    ):
        """As the Trainer's; each trial starts from the settings before the search, which are there again after it.

        Args:
            compute_objective: from the metrics of an evaluation to what is searched for; by default the loss, or the
                mean of the losses of several evaluation sets.

        Raises:
            ValueError: a trial's settings are refused as in a `PreferenceConfig`, do not suit the data, or have shaped
                what is there already, such as the prepared data; or the loss would be maximized.
        """
        if compute_objective is None and direction != "minimize":
            raise ValueError(f"direction={direction!r} needs compute_objective: by default the loss is minimized")
        self._before_search = settings_of(self.args)
        try:
            return super().hyperparameter_search(
                hp_space, compute_objective or evaluation_loss, n_trials, direction, **search
            )
        finally:
            set_all(self.args, self._before_search)

    def train(self, *arguments: Any, **options: Any):
        """As the Trainer's.

        Raises:
            ValueError: settings of ours have been changed since the trainer was made, and there is no `model_init`, so
                they would not act; nothing trains; or the optimizer holds other parameters than those that train.
        """
        if self.model_init is None:
            now = settings_of(self.args)
            changed = [f"{name}={now[name]!r}" for name, value in self._configured.items() if now[name] != value]
            if changed:
                raise ValueError(
                    f"{', '.join(changed)} was set after the trainer was made, which is too late: make a new trainer, "
                    "or pass model_init in place of model"
                )
            refuse_frozen(self.model)
            if not isinstance(self.optimizer, AcceleratedOptimizer):
                refuse_stale_optimizer(self.model, self.optimizer)
        return super().train(*arguments, **options)

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's, which converts a value to the type of the one before it: ours are set as they are."""
        if trial is None or self.hp_search_backend is None:
            super()._hp_search_setup(trial)
        else:
            asks = self.hp_search_backend == HPSearchBackend.OPTUNA
            values = self.hp_space(trial) if asks else trial
            others = {name: value for name, value in values.items() if name not in OWN}
            # A space is asked once: it may draw at random.
            space, self.hp_space = self.hp_space, lambda _: others
            super()._hp_search_setup(trial if asks else others)
            self.hp_space, self._trial = space, trial
            set_all(self.args, {**self._before_search, **{name: values[name] for name in values if name in OWN}})
            self.args.check()
            _refuse_unknown(values, self.args.build_objective(), self.args if asks else None)
        if self.model_init is not None:
            self._take_over_settings()

    def _take_over_settings(self) -> None:
        """Check the settings, and make anew what hangs on them: the objective, the reference, the scoring."""
        self.args.check()
        for name, value in self._configured.items():
            if name in SETTLED and getattr(self.args, name) != value:
                raise ValueError(
                    f"{name}={getattr(self.args, name)!r} comes too late: the trainer and its data were made with "
                    f"{name}={value!r}; make a trainer for each value"
                )
        self._fit_objective()
        self._adopt(self.model)


def evaluation_loss(metrics: Mapping[str, float]) -> float:
    """The loss of an evaluation, the mean of those of several evaluation sets."""
    losses = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("_loss")]
    return sum(losses) / len(losses)


def _refuse_unknown(values: Mapping[str, Any], objective: Objective, args: PreferenceConfig | None) -> None:
    """The Trainer would skip a name that is no setting; a backend that asks no space passes names of its own along."""
    for term in objective.terms:
        for name in (values.keys() & term.spec.defaults.keys()) - set(OWN):
            raise ValueError(
                f"the search sets {name}={values[name]!r}, a hyperparameter of {term.spec.name} and no setting: search "
                f"loss_params={{{name!r}: …}}"
            )
    for name in values if args is not None else ():
        if not hasattr(args, name):
            raise ValueError(f"the search sets {name}={values[name]!r}, and PreferenceConfig has no such field")
