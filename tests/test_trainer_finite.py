"""A run with a loss, gradient or weights that are not finite stops, names the cause, and saves no damaged state."""

from pathlib import Path

import pytest
import torch

from hf_prefopt import PreferenceConfig
from hf_prefopt.losses import register_loss, registry
from hf_prefopt.reporting import finite
from hf_prefopt.reporting.finite import Seen
from tests.tiny_models import tiny_model
from tests.trainers import logged, make_config, make_trainer, pairs, with_column

# Rows in order, two per step: row 5 is in step 3.
IN_ORDER = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "train_dataset": pairs(8)}
NEVER_LOGGED = {"logging_strategy": "no"}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))

    @register_loss("fails_in_row_5")
    def fails_in_row_5(policy_chosen_logps, policy_rejected_logps, rows, value=float("nan")):
        losses = 0.01 * (policy_rejected_logps - policy_chosen_logps)
        return losses + torch.where(rows == 5, value, 0.0)

    @register_loss("has_no_gradient_at_0")
    def has_no_gradient_at_0(policy_chosen_logps, policy_rejected_logps):
        return (policy_chosen_logps - policy_chosen_logps).abs().sqrt()


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("when", [{}, NEVER_LOGGED, {"logging_steps": 3}, {"logging_nan_inf_filter": True}])
def test_a_loss_of_one_example_stops_the_run(value, when, tmp_path):
    """The error names the step in which it happened, even if logs are rare."""
    settings = {"loss_type": "fails_in_row_5", "loss_params": {"value": value}, **IN_ORDER, **when}
    trainer = make_trainer(tmp_path, **settings)
    with pytest.raises(FloatingPointError, match=f"^step 3: the loss fails_in_row_5 is {value} for row 5 of") as error:
        trainer.train()
    assert "its formula" in str(error.value)
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))


def test_nothing_is_saved_of_a_ruined_run(tmp_path):
    """Checkpoints before the step are kept, and that of the step is not written, even if nothing was logged."""
    trainer = make_trainer(
        tmp_path, loss_type="fails_in_row_5", save_strategy="steps", save_steps=1, **IN_ORDER, **NEVER_LOGGED
    )
    with pytest.raises(FloatingPointError, match=r"^step 3"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_never_logs_is_looked_at_now_and_then(tmp_path, monkeypatch):
    """The number of stored micro-batches is bounded: after four of them, the run is checked."""
    monkeypatch.setattr(finite, "_KEPT", 4)
    trainer = make_trainer(tmp_path, loss_type="fails_in_row_5", max_steps=100, **IN_ORDER, **NEVER_LOGGED)
    with pytest.raises(FloatingPointError, match=r"^step 3"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_the_loss_of_several_is_named(tmp_path):
    trainer = make_trainer(tmp_path, loss_type=["dpo", "fails_in_row_5", "ipo"], **IN_ORDER)
    with pytest.raises(FloatingPointError, match=r"^step 3: the loss fails_in_row_5 is nan for row 5 of"):
        trainer.train()


@pytest.mark.parametrize("batches", [(1, 4), (4, 1), (2, 2)])
def test_the_row_is_named_however_a_step_is_cut(batches, tmp_path):
    size, accumulation = batches
    settings = {**IN_ORDER, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, loss_type="fails_in_row_5", **settings)
    with pytest.raises(FloatingPointError, match=r"^step 2: .* row 5 of"):
        trainer.train()


@pytest.mark.parametrize("loss", ["dpo", "kto_pair", "sampo", "plackett_luce", "kto"])
def test_ruined_weights_are_named_as_the_cause(loss, tmp_path):
    """The policy's weights are NaN, so the error names its log-probs and not the loss."""
    trainer = make_trainer(tmp_path, loss_type=loss, layout="padded", max_steps=1)
    trainer.scorer.settle()  # which would reject such a model
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"^step 1: the loss .* policy_.* the model's weights are not finite"):
        trainer.train()


@pytest.mark.parametrize(("column", "value"), [("weights", torch.inf), ("margins", torch.nan)])
def test_data_that_are_not_finite_are_named_as_the_cause(column, value, tmp_path):
    """Normally, such a dataset raises an error at construction; here, the number appears later."""
    sound = with_column(pairs(8), column, lambda row: 1.0)
    broken = with_column(pairs(8), column, lambda row: value if row == 3 else 1.0)
    with pytest.raises(ValueError, match="row 3"):
        make_trainer(tmp_path, **{**IN_ORDER, "train_dataset": broken})
    trainer = make_trainer(tmp_path, **{**IN_ORDER, "train_dataset": sound})
    trainer.train_dataset = broken
    with pytest.raises(FloatingPointError, match=rf"^step 2: .* row 3 of the dataset: .*not finite \({column}\)"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    """A gradient that is not finite stops the run even if the loss is 0."""
    trainer = make_trainer(tmp_path, loss_type="has_no_gradient_at_0", **IN_ORDER)
    with pytest.raises(FloatingPointError, match="gradient's norm is nan"):
        trainer.train()


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_a_gradient_ruins_are_not_saved(steps, tmp_path):
    """Weights are also checked after the last step, which no forward pass follows."""
    settings = {"loss_type": "has_no_gradient_at_0", "max_steps": 1, "max_grad_norm": 0.0}
    saving = {"save_strategy": "steps", "save_steps": steps}
    trainer = make_trainer(tmp_path, **settings, **saving, **IN_ORDER, **NEVER_LOGGED)
    with pytest.raises(FloatingPointError, match=r"the weights of .* are not finite, but all losses are finite"):
        trainer.train()
    assert checkpoints(tmp_path) == []


def test_an_evaluation_stops_too(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="fails_in_row_5", **IN_ORDER)
    with pytest.raises(FloatingPointError, match=r"^evaluation at step 0: the loss fails_in_row_5 is nan for row 5 of"):
        trainer.evaluate(pairs(8))
    assert trainer.evaluate(pairs(5))["eval_loss"] > -1e3


def test_a_run_is_looked_at_before_it_is_evaluated(tmp_path):
    """If training has failed, the error is that of training, and not that of the evaluation."""
    settings = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": pairs(8), **IN_ORDER, **NEVER_LOGGED}
    trainer = make_trainer(tmp_path, loss_type="fails_in_row_5", **settings)
    with pytest.raises(FloatingPointError, match=r"^step 3"):
        trainer.train()


def test_after_an_error_a_trainer_can_train_again(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="fails_in_row_5", **IN_ORDER)
    with pytest.raises(FloatingPointError):
        trainer.train()
    for parameter, sound in zip(trainer.model.parameters(), tiny_model().parameters(), strict=True):
        parameter.data.copy_(sound.data)
    trainer.train_dataset = pairs(4)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_filter_of_the_trainer_is_off(tmp_path):
    """The filter would read the loss of every micro-batch, and log 0 for a loss that is NaN."""
    assert make_config(tmp_path).logging_nan_inf_filter is False
    assert PreferenceConfig(output_dir=str(tmp_path), logging_nan_inf_filter=True).logging_nan_inf_filter is True


def test_of_a_loss_over_the_batch_the_example_with_the_bad_input_is_named():
    """If one NaN makes all losses NaN, the example with this input is named. If the
    losses are finite, no input is named.
    """
    losses = torch.tensor([torch.nan] * 3)
    inputs = {"policy_logps": torch.tensor([-1.0, torch.nan, -2.0]), "ref_logps": torch.tensor([-1.0, -2.0, -1.0])}
    alone, text = Seen(torch.tensor([7, 8, 9]), inputs, {"kto": losses, "": losses}).finding()
    assert not alone and "row 8 of" in text and "policy_logps are not finite there" in text
    finding = Seen(torch.tensor([7]), {"margins": torch.tensor([torch.inf])}, {"": torch.zeros(1)}).finding()
    assert finding is None


def test_many_rows_are_counted():
    losses = torch.full((20,), torch.nan)
    _, text = Seen(torch.arange(20), {}, {"dpo": losses, "": losses}).finding()
    assert "rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more of" in text


@pytest.mark.parametrize(("weight", "count"), [(0.0, 1), (1.0, 0)])
def test_a_gradient_of_zero_is_warned_of_once(weight, count, tmp_path, caplog):
    rows = with_column(pairs(8), "weights", lambda row: weight)
    make_trainer(tmp_path, tiny_model(), train_dataset=rows).train()
    assert caplog.text.count("is exactly 0, so the step does not change the model") == count
