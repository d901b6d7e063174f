"""The lines that say, at the start of training, which losses run with which hyperparameters."""

import logging

import pytest

from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.reporting.losses import loss_lines
from tests.training import make_config, make_trainer


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hf_prefopt.reporting.losses"]


def test_a_run_says_its_losses_once(caplog, tmp_path):
    """Names as they are registered, defaults resolved, in the order of the configuration; sft_weight is a loss, too."""
    losses = {"loss_type": ["simpo", "sigmoid"], "loss_weights": [0.5, 1.0], "sft_weight": 0.1, "label_smoothing": 0.2}
    trainer = make_trainer(tmp_path, max_steps=1, loss_params={"sigmoid": {"beta": 0.3}}, **losses)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert said(caplog) == [
        "loss: 0.5 × simpo, beta=2.0, gamma=None, gamma_beta_ratio=None, label_smoothing=0.2",
        "loss: 1 × dpo, beta=0.3, label_smoothing=0.2",
        "loss: 0.1 × sft",
    ]


def test_modifiers_are_said(tmp_path):
    config = make_config(tmp_path, ld_alpha=0.5, f_divergence_type="forward_kl", reference_free=False)
    (line,) = loss_lines(config.build_objective())
    assert line.startswith("loss: 1 × dpo, beta=0.1, label_smoothing=0.0, ld_alpha=0.5, f_divergence_type=")
    (line,) = loss_lines(make_config(tmp_path, reference_free=True).build_objective())
    assert line.endswith(", reference_free=True")


def test_other_ranks_are_silent(caplog, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.state.is_world_process_zero = False
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "SayLosses")
    with caplog.at_level(logging.WARNING):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert said(caplog) == []
        trainer.state.is_world_process_zero = True
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("name", list_losses())
def test_every_loss_has_one_line_with_all_its_hyperparameters(name, tmp_path):
    (line,) = loss_lines(make_config(tmp_path, loss_type=name).build_objective())
    assert all(f", {parameter}={value!r}" in line for parameter, value in get_loss(name).defaults.items())
    assert "\n" not in line
