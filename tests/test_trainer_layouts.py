"""A run has the same results in every layout, with any token budget, and with any grouping of the pairs of a prompt.

There are two optimizer steps in fp32 with plain SGD. Gradients agree to rounding (1e-5
relative, tests/scoring) and change weights of order 0.3 by lr · |gradient| ≤ 1e-2 · 10 in each
step, so weights agree to 2 · 1e-5 · 0.1 = 2e-6; the logged losses, of order 1, agree to 1e-5.
"""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model

from hf_prefopt import PreferenceConfig, PreferenceTrainer
from tests.scoring.architectures import architecture
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer

WEIGHTS, LOSSES = 2e-6, 1e-5


def rows_with_shared_prompts(count: int = 12) -> list[dict]:
    """Return rows in which every third row has the prompt, and the chosen response, of the row before it."""
    rows = random_rows(count)
    for before, row in zip(rows[::3], rows[1::3], strict=True):
        row["prompt_ids"] = before["prompt_ids"]
        row["response_ids"][0] = before["response_ids"][0]
        row["scored_masks"] = [[1] * len(ids) for ids in row["response_ids"]]
    return rows


def make_trainer(output_dir, model=None, rows=None, **settings) -> PreferenceTrainer:
    dataset = Dataset.from_list(rows or rows_with_shared_prompts())
    config = {
        "output_dir": output_dir,
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return PreferenceTrainer(
        model if model is not None else perturbed(with_lora(tiny_model())),
        args=PreferenceConfig(**config | settings),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )


def run(output_dir, **settings):
    """Return (losses of the steps, trained weights, evaluation) of a run."""
    trainer = make_trainer(output_dir, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    evaluation = {k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "per_second" not in k}
    return np.array(losses), weights, {k: v for k, v in evaluation.items() if "time" not in k}


def assert_same_run(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=LOSSES)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=WEIGHTS)
    assert one[2].keys() == other[2].keys()
    for name, value in one[2].items():
        assert other[2][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss", ["dpo", "simpo", "kto_pair", "wpo", "sampo", "tdpo2"])
def test_all_layouts_train_alike(tmp_path, loss):
    padded = run(tmp_path, loss_type=loss, layout="padded")
    for layout in ("shared", "around"):
        assert_same_run(padded, run(tmp_path, loss_type=loss, layout=layout))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapt", [with_lora, lambda model: model], ids=["lora", "full"])
def test_a_hybrid_trains_alike(tmp_path, adapt, reentrant):
    """The model has convolutions and attention; checkpointing is compared with the padded layout without it."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    padded = run(tmp_path, model=adapt(architecture("lfm2")), layout="padded")
    assert_same_run(padded, run(tmp_path, model=adapt(architecture("lfm2")), layout="auto", **checkpointing))


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("loss", ["dpo", "kto_pair", "sampo", "tdpo2"])
def test_a_token_budget_changes_nothing_but_memory(tmp_path, layout, loss):
    """70 positions are one or two of the six examples of a batch; with accumulation,
    there are pieces and micro-batches.
    """
    whole = run(tmp_path, loss_type=loss, layout=layout)
    assert_same_run(whole, run(tmp_path, loss_type=loss, layout=layout, max_tokens_per_batch=70))
    accumulated = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 70}
    assert_same_run(whole, run(tmp_path, loss_type=loss, layout=layout, **accumulated))


def test_a_token_budget_is_kept(tmp_path, monkeypatch):
    """No forward has more positions than the budget (each single row has fewer), and there are more forwards."""
    from hf_prefopt.training import scorer as module

    seen, score = [], module.score

    def watched(model, batch, *others, **asked):
        seen.append(batch["input_ids"].numel())
        return score(model, batch, *others, **asked)

    monkeypatch.setattr(module, "score", watched)
    make_trainer(tmp_path, max_tokens_per_batch=120).train()
    assert len(seen) > 2 and max(seen) <= 120


def test_grouping_by_prompt_shares_its_tokens(tmp_path, monkeypatch):
    """All 12 rows are in one step, so the order has no effect on the step; with two
    rows per batch, there are fewer positions.
    """
    together = {"per_device_train_batch_size": 12, "max_steps": 1}
    assert_same_run(run(tmp_path, **together), run(tmp_path, **together, group_by_prompt=True))

    def positions(**settings):
        trainer = make_trainer(tmp_path, per_device_train_batch_size=2, **settings)
        trainer.scorer.settle()
        return sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())

    assert positions(group_by_prompt=True) < positions()


def test_predictions_stand_in_the_order_of_the_rows(tmp_path):
    """The rewards of predict() equal those of each row predicted alone, also if
    prompts are merged and batches are split.
    """
    trainer = make_trainer(tmp_path, max_tokens_per_batch=100)
    trainer.train()
    together = trainer.predict(trainer.eval_dataset).predictions
    alone = [trainer.predict(trainer.eval_dataset.select([row])).predictions[0] for row in range(12)]
    np.testing.assert_allclose(together, np.array(alone), rtol=1e-4, atol=1e-5)


def test_the_layout_falls_back_with_a_reason_or_refuses(tmp_path, caplog):
    """With "auto", a message has the reason; a named layout raises an error before the first step."""
    trainer = make_trainer(tmp_path, model=architecture("bloom"))
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.evaluate()
    said = [record.message for record in caplog.records if record.message.startswith("layout: ")]
    assert len(said) == 1 and said[0].startswith("layout: around, each prompt is computed once")
    assert "not shared because its attention does not use" in said[0] and "(BloomForCausalLM)" in said[0]
    with pytest.raises(ValueError, match="layout='shared' is not exact for this model"):
        make_trainer(tmp_path, model=architecture("bloom"), layout="shared").train()


def test_a_layout_that_nothing_takes(tmp_path, caplog):
    """Soft prompts precede every sequence: the message has both reasons, and naming "around" raises an error."""

    def soft_prompt():
        return get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

    trainer = make_trainer(tmp_path, model=soft_prompt(), max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.layout == "padded"
    assert "layout: padded, not shared because prompt-learning" in caplog.text
    assert "not around because prompt-learning" in caplog.text
    with pytest.raises(ValueError, match=r"layout='around' is not exact for this model: prompt-learning adapters put"):
        make_trainer(tmp_path, model=soft_prompt(), layout="around").train()


def test_layout_shared_raises_from_the_error_of_the_forward(tmp_path, monkeypatch):
    error = RuntimeError("no such kernel")

    def refusing(*_, **__):
        raise error

    monkeypatch.setattr("hf_prefopt.scoring.attention.segment_attention", refusing)
    with pytest.raises(ValueError, match=r"RuntimeError: no such kernel.*choose layout='auto'") as raised:
        make_trainer(tmp_path, layout="shared").train()
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_activation_checkpointing_changes_nothing(tmp_path, checkpointing):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    assert_same_run(run(tmp_path), run(tmp_path, **settings))


def test_a_reference_model_that_cannot_share_decides_for_both(tmp_path, caplog):
    """The policy could share prompts, but its explicit reference could not: both use
    the same batch, so it is padded.
    """
    rows = Dataset.from_list(random_rows(4))
    trainer = PreferenceTrainer(
        tiny_model(),
        ref_model=architecture("bloom"),
        args=PreferenceConfig(output_dir=tmp_path, use_cpu=True, bf16=False, disable_tqdm=True),
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    with caplog.at_level(logging.WARNING):
        assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert "interface (BloomForCausalLM)" in caplog.text


def test_noise_on_embeddings_needs_the_padded_layout(tmp_path, caplog):
    """NEFTune's noise is uniform in ±α/√(L·d), where L is the length of the embedded
    row: it is smaller for a row of several sequences.
    """
    trainer = make_trainer(tmp_path, neftune_noise_alpha=5.0, max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.layout == "padded" and "layout: padded, because NEFTune" in caplog.text
    with pytest.raises(ValueError, match=r"layout='shared' is not exact for this model: NEFTune"):
        make_trainer(tmp_path, neftune_noise_alpha=5.0, layout="shared").train()
