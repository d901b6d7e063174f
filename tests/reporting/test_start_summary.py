"""The lines that describe a run when training begins: at most fourteen, on the first rank, and also in the card."""

import logging
import operator

import pytest
from transformers import TrainerState

from hf_prefopt.data.layouts import PaddedCollator
from hf_prefopt.data.summary import DataSummary
from hf_prefopt.kinds import KINDS
from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.reporting.data_texts import _LONGER, content_texts, data_texts, size_text
from hf_prefopt.reporting.start_summary import (
    MOST_LINES,
    TOPICS,
    StartSummary,
    batch_text,
    loss_texts,
    model_text,
)
from hf_prefopt.training.scorer import Scorer
from tests.tiny_models import tiny_model, with_lora
from tests.trainers import make_config, make_trainer, pairs


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "hf_prefopt.reporting.start_summary"]


def test_a_run_says_what_it_is(caplog, tmp_path):
    """Losses have their registered names and resolved defaults, in the order of the
    configuration; sft_weight adds a loss.
    """
    losses = {"loss_type": ["simpo", "sigmoid"], "loss_weights": [0.5, 1.0], "sft_weight": 0.1, "label_smoothing": 0.2}
    trainer = make_trainer(
        tmp_path,
        with_lora(tiny_model()),
        max_steps=1,
        loss_params={"sigmoid": {"beta": 0.3}},
        eval_dataset=pairs(3),
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        optim="sgd",
        **losses,
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    rows = [(len(row["prompt_ids"]), *map(len, row["response_ids"])) for row in trainer.train_dataset]
    tokens, prompts, scored = (
        sum(column) for column in zip(*((2 * p + c + r, p, c + r) for p, c, r in rows), strict=True)
    )
    computed, padded = prompts + scored, 0
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        padded += 4 * max(p + response for p, *responses in (first, second) for response in responses)
    positions = f"{computed:,} of {padded:,} padded positions computed ({padded / computed:.1f}× fewer)"
    longer, equal = (100 * sum(is_so(*row[1:]) for row in rows) / 8 for is_so in (operator.gt, operator.eq))
    data = [
        f"data: {tokens:,} tokens, {scored:,} of them scored; sharing prompts saves {100 * prompts / tokens:.0f}%",
        f"data: the chosen response is longer in {longer:.1f}% of pairs ({equal:.1f}% equal): the accuracy of "
        f'"the longer one is better" is {longer + equal / 2:.1f}%',
    ]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert said(caplog) == [
        f"model: LlamaForCausalLM, {trained:,} of {total:,} parameters train (LORA r=4), float32",
        "model: adapter_config.json names no base model: set hub_base_model (owner/name) so that others can "
        "load the adapter",
        "loss: 0.5 × simpo, beta=2.0, gamma=None, gamma_beta_ratio=None, label_smoothing=0.2",
        "loss: 1 × dpo, beta=0.3, label_smoothing=0.2",
        "loss: 0.1 × sft",
        "reference: the base model, the adapter switched off",
        f"layout: shared, each prompt is computed once, and no padding; {positions} in the first 8 rows",
        "attention: PyTorch's (sdpa), one response at a time",
        "data: train 8 rows → 8 pairs of 8 prompts, eval 3 rows → 3 pairs of 3 prompts",
        *data,
        "batch: 4 rows a step (2 per device × 2 accumulated), 1 steps",
        "optimizer: sgd, learning rate 0.001 (constant), weight decay 0, gradients clipped at 1",
    ]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| layout | shared, each prompt is computed once, and no padding; {positions} in the first 8 rows |" in card


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layout": "around"}, True),
        ({"layout": "padded"}, False),
        ({"data_collator": PaddedCollator(0)}, False),
        ({"train_dataset": pairs().to_iterable_dataset()}, False),
        ({"loss_type": "kto", "precompute_ref_log_probs": True}, True),
        ({"train_sampling_strategy": "batch_rebalance", "max_tokens_per_batch": 40}, True),
    ],
    ids=["around", "padded", "collator", "stream", "kto", "pieces"],
)
def test_positions_are_those_of_the_first_rows(settings, says, tmp_path):
    """Said where the layout saves any, once, also by a second run. Nothing is read twice from a stream."""
    if "precompute_ref_log_probs" in settings:
        settings = {**settings, "reference_cache_dir": str(tmp_path / "cache")}
    trainer = make_trainer(tmp_path, max_steps=1, **settings)
    for _ in range(2):
        trainer.train()
        assert trainer.summary.as_dict()["layout"].count(" padded positions computed (1.") == says


def test_it_comes_before_a_cache_is_filled(caplog, tmp_path, monkeypatch):
    """The lines come before the cache is filled, when stopping the run costs little."""
    seen = []
    monkeypatch.setattr(Scorer, "fill_cache", lambda *_: seen.append(len(said(caplog))) or True)
    monkeypatch.setattr(Scorer, "release_reference", lambda *_: None)
    settings = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path), "max_steps": 1}
    trainer = make_trainer(tmp_path, eval_dataset={"train": pairs(2), "held": pairs(3)}, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    sizes = (
        "train 8 rows → 8 pairs of 8 prompts",
        "eval train 2 rows → 2 pairs of 2 prompts",
        "eval held 3 rows → 3 pairs of 3 prompts",
    )
    assert seen[0] == 10 and f"data: {', '.join(sizes)}" in said(caplog)


def test_an_evaluation_alone_says_its_layout_once(caplog, tmp_path):
    trainer = make_trainer(tmp_path, layout="padded", eval_dataset=pairs(2))
    with caplog.at_level(logging.WARNING):
        trainer.evaluate()
        trainer.evaluate()
    assert said(caplog) == ["layout: padded, requested by layout='padded'"]


def test_many_losses_are_folded():
    """The seven other topics, one of which has three lines, leave five lines for the losses."""
    summary = StartSummary()
    for topic in TOPICS:
        summary.say(topic, topic)
    summary.say("loss", *(f"loss {n}" for n in range(9)))
    summary.say("data", "a", "b", "c")
    lines = summary.lines()
    assert len(lines) == MOST_LINES == 14 and lines[9:12] == ["data: a", "data: b", "data: c"]
    assert lines[1:6] == ["loss: loss 0", "loss: loss 1", "loss: loss 2", "loss: loss 3", "loss: and 5 more"]
    assert summary.as_dict()["loss"].count("loss ") == 9


def test_a_later_word_replaces_an_earlier_one():
    summary = StartSummary()
    summary.say("layout", "padded")
    summary.say("layout", "shared")
    assert summary.lines() == ["layout: shared"]
    with pytest.raises(KeyError, match="'weather' is not one of model, loss"):
        summary.say("weather", "fair")


def test_other_ranks_are_silent(caplog, tmp_path):
    summary, args, state = StartSummary(), make_config(tmp_path), TrainerState(is_world_process_zero=False)
    with caplog.at_level(logging.WARNING):
        summary.on_train_begin(args, state, None)
        assert said(caplog) == []
        state.is_world_process_zero = True
        summary.on_train_begin(args, state, None)
    assert len(said(caplog)) == 2


def test_modifiers_are_said(tmp_path):
    config = make_config(tmp_path, ld_alpha=0.5, f_divergence_type="forward_kl", reference_free=False)
    (text,) = loss_texts(config.build_objective())
    assert text.startswith("1 × dpo, beta=0.1, label_smoothing=0.0, ld_alpha=0.5, f_divergence_type=")
    (text,) = loss_texts(make_config(tmp_path, reference_free=True).build_objective())
    assert text.endswith(", reference_free=True")


@pytest.mark.parametrize("name", list_losses())
def test_every_loss_has_one_line_with_all_its_hyperparameters(name, tmp_path):
    (text,) = loss_texts(make_config(tmp_path, loss_type=name).build_objective())
    assert all(f", {parameter}={value!r}" in text for parameter, value in get_loss(name).defaults.items())
    assert "\n" not in text


def test_facts_that_a_tiny_run_does_not_have(tmp_path):
    rows = pairs(2)
    stream = rows.to_iterable_dataset()
    assert data_texts({"train": stream, "eval": None}) == ["train a stream"]
    assert data_texts({"train": stream}, streams={stream: "pairs"}) == ["train a stream of pairs"]
    args = make_config(tmp_path, max_tokens_per_batch=4096)
    assert batch_text(args, TrainerState(max_steps=1000)) == (
        "2 rows a step (2 per device), pieces of at most 4,096 tokens, 1,000 steps"
    )
    args.bf16 = True
    model = tiny_model()
    count = f"{sum(p.numel() for p in model.parameters()):,}"
    assert (
        model_text(model, args) == f"LlamaForCausalLM, {count} of {count} parameters train, float32 under bf16 autocast"
    )


def test_what_a_data_set_says_by_kind():
    lengths = {"comparisons": 4, "longer": 0.5, "as_long": 0.25}
    pairs = DataSummary("pairs", rows=9, examples=9, prompts=1, tokens=100, tokens_by_row=80, tokens_by_prompt=60)
    counts = {"rows": 12, "bad": 1, "no_room": 1, "tie": 1, "responses_cut": 1}
    assert size_text(pairs, counts) == "12 rows → 9 pairs of 1 prompt (3 rows dropped, 1 response cut)"
    assert size_text(pairs, {}) == "9 rows → 9 pairs of 1 prompt"
    assert content_texts(pairs) == [
        "100 tokens, 0 of them scored; sharing prompts saves 20% (40% with group_by_prompt)"
    ]
    assert content_texts(pairs, by_prompt=True) == ["100 tokens, 0 of them scored; sharing prompts saves 40%"]
    labels = DataSummary("unpaired examples", desirable=3, undesirable=1, **lengths)
    assert content_texts(labels)[1:] == [
        "a desirable response is longer than an undesirable one in 50.0% of cases (25.0% equal): the accuracy of "
        '"the longer one is better" is 62.5%',
        "3 desirable and 1 undesirable",
    ]
    assert set(_LONGER) == {kind.name for kind in KINDS} - {"scored responses"}  # none of these are compared
