"""A run that is resumed with another reference logs a warning; one with the same reference does not."""

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import make_trainer, pairs

WARNING = "by a run with another reference"
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def adapter_of_the_checkpoint(checkpoint):
    return PeftModel.from_pretrained(tiny_model(), checkpoint, is_trainable=True)


# How the model is created first, how it is created for the resumed run, other settings, and whether the reference
# differs.
RESUMED = {
    "the same adapter": (lambda: with_lora(tiny_model()), None, {}, False),
    "the same trained adapter": (lambda: perturbed(with_lora(tiny_model()), 0.1), None, {}, False),
    "the same model": (tiny_model, None, {}, False),
    "the same cached reference": (tiny_model, None, {"precompute_ref_log_probs": True}, False),
    "no reference": (tiny_model, AutoModelForCausalLM.from_pretrained, {"loss_type": "simpo"}, False),
    "a moving reference": (tiny_model, AutoModelForCausalLM.from_pretrained, {"sync_ref_model": True}, False),
    "the checkpoint's adapter": (lambda: with_lora(tiny_model()), adapter_of_the_checkpoint, {}, True),
    "the checkpoint's model": (tiny_model, AutoModelForCausalLM.from_pretrained, {}, True),
    "the checkpoint's model, cached": (
        tiny_model,
        AutoModelForCausalLM.from_pretrained,
        {"precompute_ref_log_probs": True},
        True,
    ),
    "another base": (lambda: with_lora(tiny_model()), lambda _: with_lora(tiny_model(seed=1)), {}, True),
}


@pytest.mark.parametrize("case", RESUMED)
def test_another_reference_is_noticed(case, tmp_path, caplog):
    first, second, settings, is_another = RESUMED[case]
    settings = {**RUN, **settings, "train_dataset": pairs(8), "reference_cache_dir": str(tmp_path / "cache")}
    if not settings.get("precompute_ref_log_probs"):
        del settings["reference_cache_dir"]
    make_trainer(tmp_path, first(), **settings).train()
    checkpoint = tmp_path / "checkpoint-2"
    model = first() if second is None else second(checkpoint)
    trainer = make_trainer(tmp_path, model.train(), **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    assert sum(WARNING in record.getMessage() for record in caplog.records) == is_another


def test_an_explicit_reference_may_be_another(tmp_path, caplog):
    settings = {**RUN, "train_dataset": pairs(8)}
    make_trainer(tmp_path, tiny_model(), ref_model=tiny_model(seed=1), **settings).train()
    trainer = make_trainer(tmp_path, tiny_model(), ref_model=tiny_model(seed=2), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum(WARNING in record.getMessage() for record in caplog.records) == 1
