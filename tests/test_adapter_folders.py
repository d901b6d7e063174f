"""Trained adapters, from a folder or added by transformers, and policies without trainable weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_prefopt import PreferenceTrainer
from hf_prefopt.loading import load_model, load_processing_class
from tests.reference.test_adapters import mean_chosen_logp
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_config, make_trainer, pairs, weights


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


DATA = {"train_dataset": pairs(4), "eval_dataset": pairs(4), "max_steps": 2, "learning_rate": 1e-2}


def plain(folder=None):
    return AutoModelForCausalLM.from_pretrained(folder) if folder else tiny_model()


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sft(base, tmp_path):
    """Create the folder of a trained LoRA adapter on the base model."""
    folder = tmp_path / "sft"
    perturbed(get_peft_model(plain(base), lora()), scale=0.05, seed=5).save_pretrained(folder)
    return folder


def by_folder(base, sft):
    return str(sft)


def loaded_by_peft(base, sft):
    return PeftModel.from_pretrained(plain(base), sft, is_trainable=True)


def loaded_by_transformers_to_train(base, sft):
    model = plain(base)
    model.load_adapter(str(sft), is_trainable=True)
    return model


@pytest.mark.parametrize("make", [by_folder, loaded_by_peft, loaded_by_transformers_to_train])
def test_an_sft_adapter_goes_on_training(make, base, sft, tmp_path):
    """Policy and reference start as the SFT model: the first loss is log 2, and later losses differ."""
    rows = random_rows(4, longest=10)
    expected = mean_chosen_logp(PeftModel.from_pretrained(plain(base), sft), rows)
    assert abs(expected - mean_chosen_logp(plain(base), rows)) > 0.1
    model = make(base, sft)
    trainer = PreferenceTrainer(
        model,
        args=make_config(tmp_path / "run", max_steps=2, learning_rate=1e-2),
        train_dataset=pairs(4),
        eval_dataset=pairs(4),
        processing_class=tiny_tokenizer(),
    )
    assert trainer.reference.description.startswith("a frozen copy")
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_logps/chosen"] == pytest.approx(expected, abs=1e-4)
    start = weights(trainer.model)
    trainer.train()
    moved = mean_chosen_logp(trainer.model, rows) - expected
    assert abs(moved) > 1e-3
    assert trainer.evaluate()["eval_rewards/chosen"] == pytest.approx(0.1 * moved, abs=2e-5)
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, start[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_folders_adapter_is_saved_again_for_its_base(base, sft, tmp_path):
    trainer = make_trainer(tmp_path / "run", load_model(str(sft), None), **DATA)
    trainer.train()
    trainer.save_model()
    config = json.loads(Path(tmp_path, "run", "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    again = PeftModel.from_pretrained(plain(base), tmp_path / "run")
    rows = random_rows(4, longest=10)
    assert mean_chosen_logp(again, rows) == pytest.approx(mean_chosen_logp(trainer.model, rows), abs=1e-4)


def test_a_folder_of_a_soft_prompt_is_refused_with_advice_that_works(base, tmp_path):
    prompt, folder = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), tmp_path / "prompt"
    perturbed(get_peft_model(plain(base), prompt), scale=0.3, seed=5).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"is a soft prompt \(PROMPT_TUNING\), .*prompt_encoder.requires_grad_"):
        load_model(str(folder), None)
    model = PeftModel.from_pretrained(plain(base), folder)
    expected = mean_chosen_logp(model, random_rows(4, longest=10))
    model.prompt_encoder.requires_grad_()
    trainer = make_trainer(tmp_path / "run", model, **DATA)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval_logps/chosen"] == pytest.approx(expected, abs=1e-4)
    trainer.train()
    moved = mean_chosen_logp(trainer.model, random_rows(4, longest=10)) - expected
    assert abs(moved) > 1e-3
    assert trainer.evaluate()["eval_rewards/chosen"] == pytest.approx(0.1 * moved, abs=2e-5)


def test_a_folder_under_model_init_kwargs(sft):
    """The dtype is that of the base model; adapters train in float32 if the base is bf16."""
    model = load_model(str(sft), {"dtype": "bfloat16"})
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_folder_on_a_quantized_base(tmp_path):
    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    tiny_model(hidden_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    perturbed(get_peft_model(plain(tmp_path / "base"), lora()), scale=0.05).save_pretrained(tmp_path / "sft")
    model = load_model(str(tmp_path / "sft"), None, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    assert model.get_base_model().is_loaded_in_4bit
    trainer = make_trainer(tmp_path, model, **DATA)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()


def test_the_tokenizer_of_an_adapter_is_its_own_or_the_bases(base, sft):
    """If the adapter has its own chat template, it is used."""
    model = load_model(str(sft), None)
    assert load_processing_class(model, None, str(sft)).name_or_path == str(base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(sft)
    assert load_processing_class(model, None, str(sft)).chat_template == tokenizer.chat_template


def test_an_adapter_of_no_base_is_refused(sft):
    config = json.loads(Path(sft, "adapter_config.json").read_text())
    Path(sft, "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name its base model"):
        load_model(str(sft), None)


def loaded_by_transformers(base, sft):
    return AutoModelForCausalLM.from_pretrained(sft)


def loaded_later(base, sft):
    model = plain(base)
    model.load_adapter(str(sft))
    return model


def added_by_transformers(base, sft):
    model = plain(base)
    model.add_adapter(lora(), "mine")
    return model


def beneath_peft(base, sft):
    return PeftModel.from_pretrained(plain(base), sft).get_base_model()


def with_a_module_to_save(base, sft):
    model = plain(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "mine")
    return model


@pytest.mark.parametrize(
    "make",
    [
        by_folder,
        loaded_by_peft,
        loaded_by_transformers,
        loaded_later,
        added_by_transformers,
        beneath_peft,
        with_a_module_to_save,
    ],
)
def test_a_second_adapter_beside_the_first_is_refused(make, base, sft, tmp_path):
    """Without the error, `get_peft_model` would discard the first adapter, or leave it frozen in the base model."""
    args, data = make_config(tmp_path / "run"), {"train_dataset": pairs(4), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match=r"so peft_config cannot be applied: remove peft_config .*merge_and_unload"):
        PreferenceTrainer(make(base, sft), args=args, peft_config=lora(), **data)


def merged(base, sft):
    return PeftModel.from_pretrained(plain(base), sft).merge_and_unload()


def unloaded(base, sft):
    return PeftModel.from_pretrained(plain(base), sft).unload()


def merged_from_a_folder(base, sft):
    return AutoPeftModelForCausalLM.from_pretrained(sft).merge_and_unload()


def deleted_by_transformers(base, sft):
    model = loaded_later(base, sft)
    model.delete_adapter("default")
    return model


@pytest.mark.parametrize("make", [merged, unloaded, merged_from_a_folder, deleted_by_transformers])
def test_a_model_whose_adapter_is_gone_takes_another(make, base, sft, tmp_path):
    """The error suggests a merge, which works: the merged model is the reference below the new adapter."""
    model = make(base, sft)
    expected = mean_chosen_logp(model, random_rows(4, longest=10))
    trainer = make_trainer(tmp_path / "run", model, peft_config=lora(), **DATA)
    metrics = trainer.evaluate()
    assert metrics["eval_logps/chosen"] == pytest.approx(expected, abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()


def test_an_adapter_folder_as_ref_model(base, sft, tmp_path):
    """DPO of a new adapter on the base, against the SFT adapter: rewards are β times
    the difference of the two models.
    """
    rows = random_rows(4, longest=10)
    reference = mean_chosen_logp(PeftModel.from_pretrained(plain(base), sft), rows)
    trainer = make_trainer(tmp_path / "run", with_lora(plain(base)), ref_model=str(sft), **DATA)
    expected = 0.1 * (mean_chosen_logp(plain(base), rows) - reference)
    assert trainer.evaluate()["eval_rewards/chosen"] == pytest.approx(expected, abs=2e-5)
    before = weights(trainer.reference.model)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.reference.model).items())


# -- nothing trains ----------------------------------------------------------------------------------------------------


def frozen(base, sft):
    return plain(base).requires_grad_(False)


def loaded_without_is_trainable(base, sft):
    return PeftModel.from_pretrained(plain(base), sft)


def a_fresh_adapter_beside_the_active_one(base, sft):
    model = PeftModel.from_pretrained(plain(base), sft)
    model.add_adapter("dpo", lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dpo." in name)
    return model


def merged_and_not_unloaded(base, sft):
    model = loaded_by_peft(base, sft)
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (frozen, "peft_config"),
        (loaded_without_is_trainable, "is_trainable=True"),
        (loaded_by_transformers, "is_trainable=True"),
        (loaded_later, "is_trainable=True"),
        (a_fresh_adapter_beside_the_active_one, "set_adapter"),
        (merged_and_not_unloaded, "unmerge_adapter"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"loss_type": "simpo"}])
def test_a_policy_of_which_nothing_trains_is_refused(make, cure, settings, base, sft, tmp_path):
    with pytest.raises(ValueError, match=f"no parameter of the policy .* is trained: .*{cure}"):
        make_trainer(tmp_path / "run", make(base, sft), **settings)
    with pytest.raises(ValueError, match="no parameter of the policy"):
        make_trainer(tmp_path / "run", model_init=lambda: make(base, sft), **settings)


def test_a_frozen_policy_can_be_evaluated(base, sft, tmp_path):
    """Without training data, no weight needs to be trainable."""
    trainer = make_trainer(tmp_path / "run", loaded_without_is_trainable(base, sft), train_dataset=None)
    expected = mean_chosen_logp(loaded_without_is_trainable(base, sft), random_rows(4, longest=10))
    assert trainer.evaluate(pairs(4))["eval_logps/chosen"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("make", [lambda model: model, lambda model: model.get_base_model()])
def test_a_reference_that_shares_what_trains_is_refused(make, tmp_path):
    """The base model below an adapter contains the adapter's layers, so freezing it
    as the reference would freeze the policy.
    """
    model = with_lora(tiny_model())
    with pytest.raises(ValueError, match=r"ref_model is the policy itself or shares .*training would change"):
        make_trainer(tmp_path, model, ref_model=make(model))


def test_the_base_beside_peft_config_is_no_reference(tmp_path):
    """The base and the policy are the same object, which gets the adapter's layers."""
    base = tiny_model()
    with pytest.raises(ValueError, match=r"shares .* trainable parameters"):
        make_trainer(tmp_path, base, ref_model=base, peft_config=lora())


# -- optimizers --------------------------------------------------------------------------------------------------------


def trainer_with(optimizer_of, folder, model, **settings):
    args, data = make_config(folder, max_steps=1), {"train_dataset": pairs(4), "processing_class": tiny_tokenizer()}
    return PreferenceTrainer(model, args=args, optimizers=(optimizer_of(model), None), **data, **settings)


def over_everything(model):
    return AdamW(model.parameters(), lr=1e-2)


def over_another_model(model):
    return AdamW(tiny_model().parameters())


def over_what_is_frozen(model):
    return AdamW([p for p in model.parameters() if not p.requires_grad] or [torch.nn.Parameter(torch.zeros(1))])


def over_all_but_one_that_was_replaced(model):
    """Return an optimizer over all parameters except one that was replaced, as `resize_token_embeddings` does."""
    embedding = model.get_input_embeddings().weight
    others = [p for p in model.parameters() if p is not embedding]
    return AdamW([*others, torch.nn.Parameter(embedding.detach().clone())])


@pytest.mark.parametrize(
    ("optimizer_of", "model", "settings"),
    [
        (over_everything, tiny_model, {"peft_config": lora()}),
        (
            over_everything,
            lambda: tiny_model("qwen2"),
            {"peft_config": LoraConfig(bias="all", target_modules=["q_proj"])},
        ),
        (over_another_model, tiny_model, {}),
        (over_what_is_frozen, lambda: with_lora(tiny_model()), {}),
        (over_all_but_one_that_was_replaced, tiny_model, {}),
    ],
)
def test_an_optimizer_of_other_parameters_is_refused(optimizer_of, model, settings, tmp_path):
    with pytest.raises(ValueError, match=r"optimizers: the AdamW lacks .* of the .* trained parameters"):
        trainer_with(optimizer_of, tmp_path, model(), **settings)


def over_one_layer(model):
    return AdamW(model.model.layers[0].parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("optimizer_of", "model"),
    [(over_everything, tiny_model), (over_everything, lambda: with_lora(tiny_model())), (over_one_layer, tiny_model)],
)
def test_an_optimizer_of_the_policy_trains_what_it_holds(optimizer_of, model, tmp_path):
    """The optimizer has all parameters, also frozen ones, or intentionally a part of them."""
    trainer = trainer_with(optimizer_of, tmp_path, model())
    before, held = weights(trainer.model), {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    meant = {name for name, p in trainer.model.named_parameters() if id(p) in held and p.requires_grad}
    assert changed and changed <= meant


@pytest.mark.parametrize(("name", "other"), [("default", None), ("dpo", None), ("default", "sft"), ("dpo", "default")])
def test_the_best_adapter_is_loaded_at_the_end_whatever_its_name(name, other, tmp_path):
    """The evaluation after training has the loss of the best checkpoint, even with
    another adapter that does not train.
    """
    model = get_peft_model(tiny_model(), lora(), adapter_name=name)
    if other:
        model.add_adapter(other, lora())
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.1}
    trainer = make_trainer(tmp_path, model, train_dataset=pairs(8), eval_dataset=pairs(6, seed=3), **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) != losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    trains = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert model.active_adapters == [name] and trains == {name}
