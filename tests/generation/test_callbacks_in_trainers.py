"""Samples and win rates in transformers' Trainer and in ours: the results are right, and training does not change."""

import io
import math
import random

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import EarlyStoppingCallback

from hf_prefopt.callbacks import SampleGenerationsCallback, WinRateCallback
from hf_prefopt.generation import partners
from hf_prefopt.generation.answers import generate_answers, prompt_ids
from tests.generation.any_trainer import PROMPTS, TRAINERS, plain_trainer, policy, preference_trainer
from tests.tiny_models import perturbed, tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged, weights


def longer(prompt, first, second):
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def alone(model, prompt):
    """Return a greedy answer from the model's own `generate`, on this prompt alone."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([prompt_ids(prompt, tokenizer)])
    output = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS.keys())
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_the_same_bits_with_and_without_the_callbacks(make, checkpointing, tmp_path):
    """The run has dropout, sampled answers, a judge that draws random numbers, and activation checkpointing."""

    def judge(prompt, first, second):
        return float(len(first) > len(second))

    found = []
    for generates in (False, True):
        steps = {"max_steps": 4, "eval_steps": 1, "gradient_checkpointing": checkpointing}
        trainer = make(tmp_path / str(generates), policy(), **steps)
        if generates:
            sampled = {"max_new_tokens": 4, "temperature": 1.0}
            trainer.add_callback(SampleGenerationsCallback(trainer, PROMPTS, **sampled))
            trainer.add_callback(WinRateCallback(trainer, PROMPTS, judge, **sampled))
        trainer.train()
        found.append((weights(trainer.model), logged(trainer, "loss"), trainer))
    (plain, losses, _), (generated, others, last) = found
    assert losses == others and all(torch.equal(plain[name], generated[name]) for name in plain)
    assert len(logged(last, "eval_win_rate")) == 4


@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS.keys())
def test_policy_and_reference_are_the_adapter_on_and_off(make, tmp_path):
    """The answers equal those of each model alone, generated prompt by prompt."""
    trainer = make(tmp_path, policy(), **({"reference": "adapter_off"} if make is preference_trainer else {}))
    console = Console(record=True, width=120, file=io.StringIO())
    callback = SampleGenerationsCallback(trainer, PROMPTS, max_new_tokens=6, console=console)
    trainer.add_callback(callback)
    trainer.evaluate()
    base = policy(adapter=False)
    for prompt, row in zip(PROMPTS, callback.rows, strict=True):
        assert row["reference"] == alone(base, prompt) and row["policy"] == alone(trainer.model, prompt)
    assert any(row["reference"] != row["policy"] for row in callback.rows)
    shown = console.export_text()
    assert "Answers at step 0" in shown and "under the sea" in shown


@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS.keys())
def test_a_reference_that_is_passed(make, tmp_path):
    """All weights of the policy train."""
    trainer, other = make(tmp_path, policy(adapter=False)), perturbed(policy(adapter=False), 0.2)
    callback = SampleGenerationsCallback(trainer, PROMPTS, reference=other, max_new_tokens=6)
    trainer.add_callback(callback)
    trainer.evaluate()
    assert [row["reference"] for row in callback.rows] == [alone(other, prompt) for prompt in PROMPTS]


def test_our_trainers_own_reference_is_taken(tmp_path):
    """The reference is a frozen copy of the policy: after training, it still answers
    like the policy before training.
    """
    trainer = preference_trainer(tmp_path, policy(adapter=False), max_steps=3, learning_rate=0.1, eval_steps=3)
    before = [alone(policy(adapter=False), prompt) for prompt in PROMPTS]
    callback = SampleGenerationsCallback(trainer, PROMPTS, max_new_tokens=6)
    trainer.add_callback(callback)
    trainer.train()
    assert [row["reference"] for row in callback.rows] == before
    assert [row["policy"] for row in callback.rows] != before


def test_without_a_reference_is_an_error(tmp_path):
    trainer = plain_trainer(tmp_path, policy(adapter=False))
    for kind, more in ((SampleGenerationsCallback, ()), (WinRateCallback, (longer,))):
        with pytest.raises(ValueError, match="pass reference=model"):
            kind(trainer, PROMPTS, *more)
        with pytest.raises(ValueError, match="no prompt"):
            kind(trainer, [], *more)


def test_sharded_parameters_are_an_error_when_training_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(partners, "is_sharded", lambda parameter: True)
    trainer = plain_trainer(tmp_path, policy(), max_steps=1)
    trainer.add_callback(SampleGenerationsCallback(trainer, PROMPTS))
    with pytest.raises(ValueError, match="shards the model's parameters"):
        trainer.train()
    assert trainer.state.global_step == 0


class TestWinRate:
    @staticmethod
    def run(tmp_path, judge, prompts=PROMPTS):
        trainer = plain_trainer(tmp_path, policy())
        trainer.add_callback(WinRateCallback(trainer, prompts, judge, max_new_tokens=6))
        return {k: v for k, v in trainer.evaluate().items() if "win_rate" in k}

    def test_a_judge_of_places_gives_ties(self, tmp_path):
        """The judge prefers the first answer in both orders: each prompt counts ½, and no verdict is consistent."""
        found = self.run(tmp_path, lambda prompt, first, second: 1)
        assert found["eval_win_rate"] == 0.5 and found["eval_win_rate/consistent"] == 0

    def test_by_hand(self, tmp_path):
        """Wins of 1, ½ and 0 on three prompts: the rate is ½, with Wilson's interval for n = 3."""
        answers = {}
        self.run(tmp_path, lambda prompt, first, second: answers.setdefault(str(prompt), [first]) and 0.5)
        policys = {prompt: texts[0] for prompt, texts in answers.items()}
        places = {str(prompt): place for place, prompt in enumerate(PROMPTS)}

        def judge(prompt, first, second):
            share = (1.0, 0.5, 0.0)[places[str(prompt)]]
            return share if first == policys[str(prompt)] else 1 - share

        found = self.run(tmp_path, judge)
        z = 1.959964
        half = z * math.sqrt(0.25 / 3 + z**2 / 36) / (1 + z**2 / 3)
        assert found["eval_win_rate"] == pytest.approx(0.5) and found["eval_win_rate/prompts"] == 3
        assert found["eval_win_rate/low"] == pytest.approx(0.5 - half, abs=1e-6)
        assert found["eval_win_rate/high"] == pytest.approx(0.5 + half, abs=1e-6)
        assert found["eval_win_rate/consistent"] == 1

    def test_a_prompt_that_comes_twice_counts_once(self, tmp_path):
        """Wins of 1 and 1 on one prompt and 0 on another: the rate is ½ of two prompts, not ⅔ of three."""
        kept = {}

        def judge(prompt, first, second):
            policy_first = kept.setdefault((prompt, frozenset((first, second))), first) == first
            wins = prompt == PROMPTS[0]
            return float(policy_first == wins)

        found = self.run(tmp_path, judge, [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
        assert found["eval_win_rate"] == 0.5 and found["eval_win_rate/prompts"] == 2

    @pytest.mark.parametrize("verdict", [2, -1, None, "first"])
    def test_a_verdict_that_is_none(self, tmp_path, verdict):
        with pytest.raises(ValueError, match="the judge returned"):
            self.run(tmp_path, lambda *_: verdict)


def test_modes_and_random_numbers_are_as_they_were():
    """Each module has its previous mode, even a module in evaluation mode inside a model in training mode."""
    model = policy().train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    use_cache, before = model.config.use_cache, (random.getstate(), np.random.get_state(), torch.get_rng_state())
    generate_answers(model, tiny_tokenizer(), [[5, 6]], {"max_new_tokens": 3, "do_sample": True})
    assert modes == [module.training for module in model.modules()] and model.config.use_cache == use_cache
    assert before[0] == random.getstate() and torch.equal(before[2], torch.get_rng_state())
    assert (before[1][1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("metric", ["eval_rewards/margins", "eval_rewards/accuracies"])
def test_transformers_own_early_stopping_watches_margins_and_accuracies(metric, tmp_path):
    """No evaluation reaches the required improvement, so training stops `patience` evaluations after the first one."""
    trainer = preference_trainer(
        tmp_path,
        tiny_model(vocab_size=600),
        num_train_epochs=5,
        eval_steps=1,
        metric_for_best_model=metric,
        greater_is_better=True,
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e3))
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_metric == max(logged(trainer, metric))
