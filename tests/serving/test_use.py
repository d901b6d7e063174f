"""The instructions that a finished run prints: the Python code in the card runs as printed, and so does the merge."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import IA3Config, LoraConfig

from hf_prefopt import PreferenceTrainer
from hf_prefopt.commands import main
from hf_prefopt.console import finish_run
from hf_prefopt.reporting.serve_command import serve_command
from hf_prefopt.serving.kept_rows import FILE
from tests.scoring.tiny_configs import text_rows, tiny_config
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_config, pairs


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def finished_run(base, output, peft_config, rows):
    tiny_tokenizer().save_pretrained(base)
    args = make_config(output, max_steps=2, learning_rate=1e-2, model_init_kwargs={"dtype": "float32"})
    trainer = PreferenceTrainer(str(base), args=args, train_dataset=rows, eval_dataset=rows, peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    finish_run(trainer)
    return trainer


@pytest.fixture(params=["adapter", "full", "images"])
def run(request, tmp_path, capsys):
    """Finish a run on a base model in a folder: an adapter, a full model, or an adapter on an image-text model."""
    torch.manual_seed(0)
    if request.param == "images":
        config = tiny_config("gemma3", text_config={"vocab_size": 600})
        model = transformers.Gemma3ForConditionalGeneration._from_config(config)
    else:
        model = tiny_model(vocab_size=600)
    model.save_pretrained(tmp_path / "base")
    rows = Dataset.from_list(text_rows(10, longest=10))
    return finished_run(tmp_path / "base", tmp_path / "run", None if request.param == "full" else lora(), rows)


def answer(model, tokenizer):
    messages = [{"role": "user", "content": "What is 12 times 12?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=128, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_cards_python_runs_as_printed(run):
    """The code prints the answer of the trained model in memory."""
    card = Path(run.args.output_dir, "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, {})
    assert shown.getvalue().rstrip("\n") == answer(run.model, run.processing_class).rstrip("\n")


def test_the_printed_commands(run, tmp_path, capsys):
    """The merge runs as printed, with the rows that the run has saved; the card has
    the serving command of the terminal.
    """
    capsys.readouterr()
    finish_run(run)
    shown = capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / FILE).read_text())
    assert len(kept["rows"]) == 8 and kept["name"] == "held-back rows" and kept["quantized"] is None
    assert f"hf_prefopt chat {tmp_path / 'run'}" in shown and "vllm serve" in shown
    assert "vllm serve" in (tmp_path / "run" / "README.md").read_text()
    merges = re.findall(r"hf_prefopt (merge .*)", shown)
    assert len(merges) == (getattr(run.model, "peft_config", None) is not None)
    for command in merges:
        assert main(shlex.split(command)) == 0
        assert "check on 8 held-back rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (None, "vllm serve me/aligned"),
        (lora(), "vllm serve a/base --enable-lora --lora-modules aligned=me/aligned"),
        (lora(r=40), "vllm serve a/base --enable-lora --lora-modules aligned=me/aligned --max-lora-rank 64"),
        (lora(rank_pattern={"q_proj": 256}), "… --max-lora-rank 256"),
        (lora(use_dora=True), "merge"),
        (lora(r=1024), "merge"),
        (lora(bias="all"), "merge"),
        (lora(modules_to_save=["lm_head"]), "merge"),
        (lora(target_modules=["q_proj", "embed_tokens"]), "merge"),
        (lora(target_parameters=["mlp.experts.down_proj"]), "merge"),
        (IA3Config(target_modules=["k_proj"]), "merge"),
    ],
)
def test_what_vllm_cannot_load_beside_a_base_is_merged_first(adapter, expected):
    command = serve_command("me/aligned", "a/base", adapter)
    if expected == "merge":
        assert command == "hf_prefopt merge me/aligned --to aligned-merged\nvllm serve aligned-merged"
    else:
        assert command.endswith(expected.removeprefix("…"))


def test_training_rows_are_kept_where_nothing_is_evaluated(tmp_path):
    trainer = PreferenceTrainer(
        tiny_model(), args=make_config(tmp_path, max_steps=1), train_dataset=pairs(3), processing_class=tiny_tokenizer()
    )
    trainer.train()
    finish_run(trainer)
    kept = json.loads((tmp_path / FILE).read_text())
    assert kept["name"] == "training rows" and len(kept["rows"]) == 3
