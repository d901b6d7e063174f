"""A row that is longer than the model's table of positions raises an error before training."""

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model

from hf_prefopt.data.check import check_lengths
from hf_prefopt.scoring.positions import position_limit, shortest_limit
from tests.scoring.families import build
from tests.scoring.tiny_configs import text_rows
from tests.tiny_models import tiny_model
from tests.trainers import logged, make_trainer

# Learned; learned after two unused ones; after the padding's; sinusoids; a mask; of an image-text model.
TABLES = {"gpt2": 256, "opt": 256, "biogpt": 256, "roberta": 255, "gptj": 256, "gpt_neo": 256, "bart": 256, "git": 256}


@pytest.mark.parametrize("model_type", TABLES)
def test_the_limit_is_the_longest_that_runs(model_type):
    model, limit = build(model_type), TABLES[model_type]
    assert position_limit(model) == limit
    ids = torch.randint(3, 270, (1, limit + 1))
    with torch.no_grad():
        model(input_ids=ids[:, :-1], attention_mask=torch.ones(1, limit), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones(1, limit + 1), use_cache=False)


@pytest.mark.parametrize("model_type", ["llama", "falcon", "bloom", "xglm", "qwen2_5_vl", "mamba", "gpt_neox"])
def test_computed_positions_have_no_limit(model_type):
    model = build(model_type)
    assert position_limit(model) is None
    ids = torch.randint(3, 270, (1, 300))
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification", "GPT2Model"])
def test_what_has_no_head_is_refused(kind, tmp_path):
    model = getattr(transformers, kind)(build("gpt2" if kind[0] == "G" else "llama").config)
    with pytest.raises(ValueError, match=f"{kind} has no language-model head"):
        make_trainer(tmp_path, model).train()


def test_virtual_tokens_take_positions():
    model = get_peft_model(build("gpt2"), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    assert position_limit(model) == 251
    assert shortest_limit(model, tiny_model(), None) == 251


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_the_first_row_that_is_too_long_is_named(streamed):
    rows = [{**row, "prompt_ids": [7] * length} for row, length in zip(text_rows(3), (3, 9, 4), strict=True)]
    rows = [{**row, "response_ids": [[5] * 6, [6] * 2]} for row in rows]
    dataset = Dataset.from_list([{key: row[key] for key in ("prompt_ids", "response_ids", "row")} for row in rows])
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    assert len(list(check_lengths(dataset, 15, "train"))) == 3
    with pytest.raises(ValueError, match=r"row 1 has 9 prompt tokens and 6 .* 14 positions: set max_length=14"):
        list(check_lengths(dataset, 14, "train"))


@pytest.mark.parametrize("short", ["policy", "reference"])
def test_a_trainer_says_so_before_training(short, tmp_path):
    """The error is also raised if only the reference has the table; the `max_length` that it suggests is sufficient."""
    row = {**text_rows(1)[0], "prompt_ids": [7] * 250}
    rows = Dataset.from_list([row])
    models = {"policy": tiny_model(), "reference": tiny_model(), short: build("gpt2")}
    arguments = {"model": models["policy"], "ref_model": models["reference"]}
    with pytest.raises(ValueError, match=r"train: row 0 has 250 prompt tokens .* set max_length=256"):
        make_trainer(tmp_path, **arguments, train_dataset=rows, max_length=None)


def kto_rows(*lengths):
    """Return rows with a prompt and a response of these lengths; each pair of lengths has its own prompt."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": [7 + row] * prompt,
                "response_ids": [[5] * response],
                "scored_masks": [[1] * response],
                "labels": [row % 2 == 0],
                "row": row,
            }
            for row, (prompt, response) in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("lengths", [[(200, 9), (5, 60), (4, 8)], [(200, 50), (197, 8), (4, 58)], [(9, 240), (17, 3)]])
def test_a_response_to_another_prompt_counts(lengths, tmp_path):
    """Each row has at most 256 positions, but the prompt of one row with the response of another row has more. With the
    `max_length` that the error suggests, such responses are cut, and training runs.
    """
    rows = kto_rows(*lengths)
    (prompt, response), *_ = sorted(
        ((p, r) for p, _ in lengths for _, r in lengths if (p, r) not in lengths), key=sum, reverse=True
    )
    assert prompt + response > 256 >= max(map(sum, lengths))
    said = rf".* row \d \({response} tokens\) .* row \d \({prompt} tokens\), .* 256 positions: set max_length=256"
    settings = {"model": build("gpt2"), "train_dataset": rows, "loss_type": "kto", "max_steps": 1}
    for longer in (None, 300):
        with pytest.raises(ValueError, match=said):
            make_trainer(tmp_path, **settings, max_length=longer)
    trainer = make_trainer(tmp_path, **settings, max_length=256, per_device_train_batch_size=len(lengths))
    trainer.train()
    assert len(logged(trainer, "loss")) == 1


def test_responses_to_other_prompts_that_fit_are_accepted(tmp_path):
    """The longest prompt and the longest response are in one row, so they are never combined with a mismatched one."""
    make_trainer(tmp_path, build("gpt2"), train_dataset=kto_rows((200, 56), (9, 50)), loss_type="kto", max_length=None)
    long, other, short = kto_rows((200, 9), (5, 3), (4, 8)).to_list()
    other["prompt_ids"] = long["prompt_ids"]
    other["response_ids"], other["scored_masks"] = [[5] * 56], [[1] * 56]
    rows = Dataset.from_list([long, other, short])
    make_trainer(tmp_path, build("gpt2"), train_dataset=rows, loss_type="kto", max_length=None)
