"""The trainers of `hf_prefopt.trl`: TRL's arguments in TRL's order, its attributes,
and runs from raw data to a card.
"""

import inspect
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_prefopt import trl as ours
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged
from tests.trl.peers import METHODS, trl_trainer

PAIRS = [
    {"prompt": f"What is the capital of {country}?", "chosen": f" {capital}.", "rejected": " Once upon a time."}
    for country, capital in (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Peru", "Lima"))
]
DATA = dict.fromkeys(METHODS, PAIRS) | {"TPO": [{**row, "reference": row["chosen"] + " It is."} for row in PAIRS]}
# Metrics that each of TRL's trainers logs, except for those that docs/from_trl.md lists as not logged.
METRICS = {
    "DPO": {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"},
    "KTO": {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"},
    "CPO": {"rewards/chosen", "rewards/accuracies", "logps/chosen", "logps/rejected", "nll_loss"},
    "ORPO": {"rewards/margins", "logps/chosen", "nll_loss", "log_odds_ratio", "log_odds_chosen"},
    "TPO": {"rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/chosen"},
}


def model(**config):
    return tiny_model("qwen2", vocab_size=600, **config)


def make(method: str, folder, *positional, **settings):
    """Return a trainer of two steps on raw pairs; options that are not arguments of TRL's trainer are settings."""
    trainer_class = getattr(ours, f"{method}Trainer")
    given = {name: settings.pop(name) for name in trainer_class.order if name in settings}
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = getattr(ours, f"{method}Config")(output_dir=str(folder), max_steps=2, **{**quiet, **settings})
    data = {"train_dataset": Dataset.from_list(DATA[method]), "processing_class": tiny_tokenizer()}
    return trainer_class(*(positional or (model(),)), args=args, **{**data, **given})


@pytest.mark.parametrize("method", METHODS)
def test_the_arguments_are_trls_in_their_order(method):
    order = list(inspect.signature(trl_trainer(method).__init__).parameters)[1:]
    assert list(getattr(ours, f"{method}Trainer").order) == order
    assert list(inspect.signature(getattr(ours, f"{method}Trainer")).parameters) == order


@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_raw_pairs(method, tmp_path):
    """The defaults are TRL's, including gradient checkpointing and no dropout; KTO makes two examples of each pair."""
    data = Dataset.from_list(DATA[method])
    trainer = make(method, tmp_path, eval_dataset=data, eval_strategy="steps", eval_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    for name in METRICS[method]:
        assert len(logged(trainer, name)) == len(logged(trainer, f"eval_{name}")) == 2, name
    assert len(trainer.train_dataset) == (8 if method == "KTO" else 4)


def test_arguments_by_their_place(tmp_path):
    """The second argument of CPO is args; that of DPO is ref_model."""
    args = ours.CPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    data = Dataset.from_list(PAIRS)
    trainer = ours.CPOTrainer(model(), args, None, data, None, tiny_tokenizer())
    assert trainer.args is args
    assert len(trainer.train_dataset) == 4
    with pytest.raises(TypeError, match="args is given twice"):
        ours.CPOTrainer(model(), args, args=args)
    with pytest.raises(TypeError, match="takes 12 arguments"):
        ours.CPOTrainer(*[None] * 13)


def test_the_configuration_is_made_where_there_is_none(tmp_path, monkeypatch):
    """The default output folder has TRL's name."""
    monkeypatch.chdir(tmp_path)
    model().save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = ours.DPOTrainer("tiny", train_dataset=Dataset.from_list(PAIRS))
    assert trainer.args.output_dir == "tiny-DPO"
    assert trainer.args.beta == 0.1


def test_a_configuration_of_another_kind(tmp_path):
    """The configuration is TRL's own (with an unchanged import), or that of another method."""
    other = pytest.importorskip("trl").DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for args in (other, ours.KTOConfig(str(tmp_path), use_cpu=True, report_to="none")):
        with pytest.raises(TypeError, match="DPOTrainer takes the DPOConfig of hf_prefopt"):
            ours.DPOTrainer(model(), args=args)


def test_the_reference_model(tmp_path):
    """`ref_model` is the model that is passed, or None if the reference is the policy's own module, as in TRL."""
    given = model()
    assert make("DPO", tmp_path, model(), given).ref_model is given
    assert make("DPO", tmp_path).ref_model is None
    assert make("DPO", tmp_path, peft_config=LoraConfig(target_modules=["q_proj"])).ref_model is None
    assert make("CPO", tmp_path).ref_model is None


def test_an_adapter_is_drawn_from_the_seed(tmp_path):
    """As in TRL, the same `seed` gives the same adapter, whatever was drawn before."""
    first, again, other = (
        make("DPO", tmp_path, seed=seed, peft_config=LoraConfig(target_modules=["q_proj"])) for seed in (1, 1, 2)
    )
    drawn = [
        next(p for name, p in trainer.model.named_parameters() if "lora_A" in name) for trainer in (first, again, other)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_tags_and_the_card(tmp_path):
    """`push_to_hub(dataset_name=...)` passes its arguments to the card."""
    trainer = make("ORPO", tmp_path)
    assert trainer.model.model_tags == ["hf_prefopt", "orpo"]
    trainer.train()
    trainer.create_model_card("a name", "trl-lib/ultrafeedback_binarized", ["a-tag"])
    card = (tmp_path / "README.md").read_text()
    for part in ("# a name", "trl-lib/ultrafeedback_binarized", "a-tag", "orpo"):
        assert part in card


def test_code_of_a_model_is_only_run_where_it_is_asked_for(tmp_path):
    """`trust_remote_code` is passed to the loading of the model and its tokenizer."""
    model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    trainer = make("DPO", tmp_path, str(tmp_path / "tiny"), trust_remote_code=True, processing_class=None)
    assert trainer.args.model_init_kwargs == {"trust_remote_code": True}
    assert make("DPO", tmp_path, str(tmp_path / "tiny")).args.model_init_kwargs is None


def test_the_auxiliary_loss_of_experts_is_added(tmp_path):
    """The auxiliary loss is added by default, as in TRL's DPOTrainer;
    tests/training/test_router.py compares the numbers.
    """
    settings = {"vocab_size": 600, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    for coefficient, is_added in ((None, True), (0.0, False)):
        trainer = make("DPO", tmp_path, tiny_model("qwen3_moe", **settings), router_aux_loss_coef=coefficient)
        trainer.train()
        assert trainer.aux_loss_enabled == is_added
        assert any("aux_loss" in logs for logs in trainer.state.log_history) == is_added
    assert not make("DPO", tmp_path).aux_loss_enabled


def test_a_setting_of_trls_that_is_changed_too_late(tmp_path):
    trainer = make("CPO", tmp_path)
    trainer.args.cpo_alpha = 0.1
    with pytest.raises(ValueError, match=r"cpo_alpha=0\.1 was set after the trainer was created"):
        trainer.train()


def test_labeled_rows_stay_as_they_are(tmp_path, caplog):
    """KTO converts pairs to examples itself, and does not change examples."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(PAIRS)]
    with caplog.at_level(logging.WARNING, "hf_prefopt"):
        trainer = make("KTO", tmp_path, train_dataset=Dataset.from_list(rows))
    assert [row["labels"] for row in trainer.train_dataset] == [[True], [False], [True], [False]]
