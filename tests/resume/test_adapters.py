"""Resuming restores each adapter under its name, for any number of active adapters, or raises an error."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs, weights

SETTINGS = {"train_dataset": pairs(8), "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}


def named(*names):
    """Return a model with active adapters of these names."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(list(names))
    return perturbed(model, 0.1)


@pytest.mark.parametrize("names", [("default", "other"), ("one", "two"), ("dpo",)], ids="+".join)
def test_a_resumed_run_with_these_adapters_is_the_uninterrupted_one(names, tmp_path):
    """The weights are bit-equal, and the same adapters are active."""
    whole = make_trainer(tmp_path, named(*names), **SETTINGS)
    whole.train()
    resumed = make_trainer(tmp_path, named(*names), **SETTINGS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    found, expected = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert resumed.model.active_adapters == list(names)


@pytest.mark.parametrize(
    ("written_by", "resumed_by", "message"),
    [
        (lambda: named("x"), lambda: named("y"), "has the adapters x, but the model has y"),
        (lambda: named("x"), lambda: named("x", "y"), "has the adapters x, but the model has x, y"),
        (tiny_model, lambda: with_lora(tiny_model()), r"has the adapters \(none\), but the model has default"),
        (
            lambda: with_lora(tiny_model()),
            tiny_model,
            "has the adapters default, but the policy of this run has no adapter",
        ),
    ],
    ids=["another name", "one more", "none before", "none now"],
)
def test_other_adapters_than_the_checkpoint_has_are_refused(written_by, resumed_by, message, tmp_path):
    """Without the error, the Trainer would continue with an untrained adapter and another adapter's optimizer state."""
    make_trainer(tmp_path, written_by(), **SETTINGS).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, resumed_by(), **SETTINGS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_model_that_was_replaced_after_construction_is_refused(tmp_path):
    """Without the error, the Trainer's optimizer would have the new model's
    parameters, but the losses the old model's.
    """
    trainer = make_trainer(tmp_path, **SETTINGS)
    trainer.model = tiny_model(seed=3)
    with pytest.raises(ValueError, match="was replaced after construction: create a new trainer"):
        trainer.train()
