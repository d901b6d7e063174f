"""Trackers that `report_to` names get the settings and every figure of a run. Recorders replace their packages."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest

from tests.tiny_models import tiny_model, with_lora
from tests.trainers import make_trainer, pairs

RUN = {"eval_dataset": pairs(3), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "loss_type": "simpo"}
NAMES = [*(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")), "logps/chosen", "loss"]


@pytest.fixture
def package(monkeypatch):
    """Puts a recorder in place of a package, with its modules."""

    def install(name, *modules, **attributes):
        recorder = MagicMock(name=name, **attributes)
        recorder.__spec__ = ModuleSpec(name, None)
        for module in (name, *modules):
            monkeypatch.setitem(sys.modules, module, recorder)
        return recorder

    return install


def check_settings(settings):
    """They have our own, as plain values."""
    assert settings["loss_type"] == ["simpo"] and settings["max_length"] == 1024
    assert json.loads(json.dumps(settings["loss_type"])) == settings["loss_type"]


def check_figures(logs):
    """Every value is a finite number."""
    assert all(isinstance(value, int | float) and math.isfinite(value) for log in logs for value in log.values())


def test_wandb_gets_the_curves_of_both_phases(package, tmp_path):
    wandb = package("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util", ConfigError=KeyError)
    trainer = make_trainer(tmp_path, with_lora(tiny_model()), report_to="wandb", **RUN)
    trainer.train()
    trainer.predict(pairs(3))
    check_settings(wandb.config.update.call_args.args[0])
    logs = [call.args[0] for call in wandb.log.call_args_list]
    check_figures(logs)
    assert {f"{phase}/{name}" for phase in ("train", "eval") for name in NAMES} <= {
        name for log in logs for name in log
    }
    assert [log["train/global_step"] for log in logs if "train/loss" in log] == [1, 2]
    assert "test/rewards/margins" in logs[-1]


def test_mlflow_gets_the_figures_under_their_names(package, tmp_path):
    mlflow = package("mlflow", __version__="2.20.0")
    mlflow.utils.validation.MAX_PARAM_VAL_LENGTH, mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 500, 100
    make_trainer(tmp_path, report_to="mlflow", **RUN).train()
    check_settings({name: value for call in mlflow.log_params.call_args_list for name, value in call.args[0].items()})
    logs = [call.kwargs["metrics"] for call in mlflow.log_metrics.call_args_list]
    check_figures(logs)
    steps = [call.kwargs["step"] for call in mlflow.log_metrics.call_args_list if "loss" in call.kwargs["metrics"]]
    assert steps == [1, 2] and {*NAMES, *(f"eval_{name}" for name in NAMES)} <= {name for log in logs for name in log}
