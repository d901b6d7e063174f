"""The record of a run: its numbers are those of the model, and its answers are from before and after training."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_prefopt.console import finish_run
from hf_prefopt.recording import BeforeAndAfter, record_run
from hf_prefopt.reporting.answers import greedy_answers, token_texts
from hf_prefopt.reporting.record import read_record
from tests.tiny_models import tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_trainer, pairs

TOKENIZER = tiny_tokenizer()


def text_pairs(count=12):
    """Return two pairs for each prompt."""
    return Dataset.from_list(
        [
            {
                "prompt": f"What is the capital of France? <b>{n // 2}</b>",
                "chosen": f"Paris é {n} <script>",
                "rejected": f"Rome, of course: {n}",
            }
            for n in range(count)
        ]
    )


def trained(folder, **settings):
    rows = text_pairs()
    options = {"train_dataset": rows, "eval_dataset": rows.select(range(6)), "eval_on_start": True, "max_steps": 4}
    model = settings.pop("model", None) or with_lora(tiny_model(vocab_size=512))
    trainer = make_trainer(folder, model, processing_class=TOKENIZER, **{**options, **settings})
    trainer.add_callback(BeforeAndAfter(trainer, prompts=2, max_new_tokens=5))
    trainer.train()
    trainer.evaluate()
    return trainer


def token_logps(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logps = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return np.array([logps[len(prompt) - 1 + at, token].item() for at, token in enumerate(response)])


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_tokens_and_margins_are_those_of_single_sequences(tmp_path, loss):
    """The log-ratios are relative to the model without its adapter, with or without
    a reference; fp32 error of 1e-4 nats.
    """
    trainer = trained(tmp_path, loss_type=loss)
    record = record_run(trainer, trainer.card_facts())
    model = trainer.model
    for pair in record.pairs:
        row = next(row for row in trainer.eval_dataset if row["row"] == pair["row"])
        sums = []
        for response, ids in zip(pair["responses"], row["response_ids"], strict=True):
            policy = token_logps(model, row["prompt_ids"], ids)
            with model.disable_adapter():
                base = token_logps(model, row["prompt_ids"], ids)
            assert "".join(text for text, _ in response["tokens"]) == TOKENIZER.decode(ids)
            assert sum(value for _, value in response["tokens"]) == pytest.approx((policy - base).sum(), abs=1e-4)
            sums.append((policy - base).sum())
        if loss == "dpo":  # the margin in the record is that of the loss's own rewards, here 0.1 · h
            assert pair["margin"] == pytest.approx(0.1 * (sums[0] - sums[1]), abs=1e-4)
    assert len(record.pairs) >= 4 and {pair["prompt"] for pair in record.pairs} <= set(text_pairs()["prompt"])


def test_shown_pairs_are_of_different_prompts_first(tmp_path):
    """Three prompts have two pairs each: the record shows three pairs of three
    prompts, then a second pair of the best prompt.
    """
    trainer = trained(tmp_path, learning_rate=3e-2)
    record = record_run(trainer, trainer.card_facts())
    for is_right in (True, False):
        side = [pair for pair in record.pairs if pair["is_right"] == is_right]
        prompts = [pair["prompt"] for pair in side]
        different = len(set(prompts))
        assert len(set(prompts[:different])) == different
        ranks = [abs(pair["margin"]) for pair in side]
        assert ranks[:different] == sorted(ranks[:different], reverse=True)
    assert len(record.pairs) >= 4


def test_an_answer_that_has_not_ended_says_so():
    """Greedy answers do not depend on their token limit. The test makes the last token of an answer the EOS."""
    model = tiny_model(vocab_size=512)
    prompt = TOKENIZER("What is")["input_ids"]
    (whole,) = greedy_answers(model, TOKENIZER, [prompt], 6)
    assert whole.endswith(" …")
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
    model.generation_config.eos_token_id = [511, ids[-1].item()]
    (ended,) = greedy_answers(model, TOKENIZER, [prompt], 6)
    assert not ended.endswith("…") and whole.startswith(ended[:1])


def test_prompts_are_counted_and_every_example_is_there(tmp_path):
    trainer = trained(tmp_path)
    record = record_run(trainer, trainer.card_facts())
    assert [entry["row"] for entry in record.examples] == list(range(6))
    assert [(entry["step"], entry["examples"], entry["prompts"]) for entry in record.accuracies] == [
        (0, 6, 3),
        (4, 6, 3),
    ]
    logs = trainer.state.log_history
    assert record.accuracies[-1]["value"] == pytest.approx(logs[-1]["eval_rewards/accuracies"])
    lengths = [[len(ids) for ids in row["response_ids"]] for row in trainer.eval_dataset]
    assert [entry["lengths"] for entry in record.examples] == lengths
    assert record.examples[0]["margin_before"] == 0.0 and record.run["sets"] == ["eval"]


def test_answers_are_of_the_untrained_and_of_the_trained_model(tmp_path):
    trainer = trained(tmp_path, learning_rate=3e-2)
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, BeforeAndAfter))
    prompts = [row["prompt_ids"] for row in trainer.eval_dataset][::2][:2]
    for name, context in (("after", torch.no_grad()), ("before", trainer.model.disable_adapter())):
        with context:
            alone = [greedy_answers(trainer.model, TOKENIZER, [prompt], 5)[0] for prompt in prompts]
        assert [answer[name] for answer in callback.answers] == alone
    assert callback.answers[0]["before"] != callback.answers[0]["after"]
    assert [answer["prompt"] for answer in callback.answers] == [text_pairs()["prompt"][0], text_pairs()["prompt"][2]]


def test_a_resumed_run_has_answers_of_the_base_or_none(tmp_path):
    """The base is the model with its adapter disabled; for a full model, the initial weights are not available."""
    for name, adapter in (("lora", True), ("full", False)):
        model = (lambda: with_lora(tiny_model(vocab_size=512))) if adapter else (lambda: tiny_model(vocab_size=512))
        options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-2}
        first = trained(tmp_path / name, model=model(), **options)
        second = make_trainer(
            tmp_path / name, model(), processing_class=TOKENIZER, train_dataset=text_pairs(), max_steps=4, **options
        )
        callback = BeforeAndAfter(second, prompts=2, max_new_tokens=5)
        second.add_callback(callback)
        second.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        (whole,) = (c for c in first.callback_handler.callbacks if isinstance(c, BeforeAndAfter))
        assert [a["before"] for a in callback.answers] == ([a["before"] for a in whole.answers] if adapter else [])


def test_a_finished_run_leaves_a_record_from_which_its_report_is_made(tmp_path, capsys):
    trainer = trained(tmp_path)
    trainer.save_model()
    capsys.readouterr()
    finish_run(trainer, dataset="someone/pairs")
    shown = capsys.readouterr().out
    assert "before" in shown and f"{tmp_path}/report.html" in shown
    record = read_record(tmp_path)
    assert record.answers and record.pairs and record.logs[0]["eval_loss"] == pytest.approx(0.693147)
    page, card = (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()
    assert "&lt;b&gt;0&lt;/b&gt;" in page and "<script" not in page
    assert "## Answers before and after training" in card and "![Training curves](curves.png)" in card
    assert "model-index" in card and "<b>" not in card and "learning_rate: 0.001" in card


def test_texts_of_the_data_are_not_pushed(tmp_path, monkeypatch):
    """Neither the record and report of this run nor those of an earlier run are pushed."""
    trainer = make_trainer(tmp_path, train_dataset=pairs(4), max_steps=1, push_to_hub=False)
    trainer.train()
    for name in ("record.jsonl", "report.html"):
        (tmp_path / name).write_text("of an earlier run")
    pushed = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **_: pushed.extend(path.name for path in tmp_path.iterdir()))
    trainer.args.push_to_hub = True
    finish_run(trainer)
    assert "README.md" in pushed and "record.jsonl" not in pushed and "report.html" not in pushed
    assert (tmp_path / "record.jsonl").exists() and "earlier" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("loss", ["kto", "qrpo", "plackett_luce", "sft", "orpo"])
def test_every_kind_of_examples_has_a_record_and_a_report(tmp_path, loss):
    trainer = make_trainer(tmp_path, with_lora(tiny_model()), loss_type=loss, max_steps=2)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    trainer.evaluate()
    finish_run(trainer)
    assert len(read_record(tmp_path).examples) == 8 and "<h2>Curves</h2>" in (tmp_path / "report.html").read_text()


def test_without_evaluation_there_are_curves_and_facts(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=pairs(4), max_steps=1)
    trainer.train()
    record = record_run(trainer, trainer.card_facts())
    assert record.logs and not record.examples and not record.pairs and not record.answers


def test_several_evaluation_sets_are_all_recorded(tmp_path):
    sets = {"a": pairs(3), "b": pairs(2, seed=1)}
    trainer = make_trainer(tmp_path, train_dataset=pairs(4), eval_dataset=sets, eval_on_start=True, max_steps=1)
    trainer.train()
    trainer.evaluate()
    record = record_run(trainer, trainer.card_facts())
    assert record.run["sets"] == ["eval_a", "eval_b"]
    assert [entry["set"] for entry in record.examples] == ["eval_a"] * 3 + ["eval_b"] * 2


def test_the_texts_of_tokens_are_the_text_and_no_character_is_broken():
    """Here, "é" and "→" are several bytes, which are separate tokens."""
    ids = TOKENIZER("Paris é → 12!", add_special_tokens=False)["input_ids"]
    pieces = token_texts(TOKENIZER, ids, [1.0] * len(ids))
    assert "".join(text for text, _ in pieces) == "Paris é → 12!"
    assert "\ufffd" not in "".join(text for text, _ in pieces) and len(pieces) < len(ids)
    assert sum(value for _, value in pieces) == len(ids)


def test_a_batch_of_answers_is_that_of_single_prompts():
    model = tiny_model(vocab_size=512).train()
    prompts = [TOKENIZER(text)["input_ids"] for text in ("What is", "The capital of France is Paris, of Italy")]
    together = greedy_answers(model, TOKENIZER, prompts, 6)
    assert together == [greedy_answers(model, TOKENIZER, [prompt], 6)[0] for prompt in prompts]
    assert model.training
