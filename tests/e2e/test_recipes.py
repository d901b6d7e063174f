"""Every recipe runs like a user's run, on a tiny random model, and writes the files that it announces."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub import REPOSITORY, hub
from tests.tiny_models import QUANTIZABLE, tiny_model
from tests.tokenizers import tiny_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
ADAPTER, WHOLE_MODEL = "adapter_model.safetensors", "model.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Save a tiny Llama with its tokenizer, like a model on the Hub."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **QUANTIZABLE}
    tiny_model(**sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory) -> Path:
    """Write sixteen training pairs and four held-out pairs, as `train` and `test` in one folder."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, count in (("train", 16), ("test", 4)):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            for row in range(count):
                pair = {"prompt": f"Is {row} even? ", "chosen": "I can help you.", "rejected": "I'm sorry."}
                file.write(json.dumps(pair) + "\n")
    return folder


def run_recipe(name: str, output: Path, model: Path, data: Path, *options: str, **environment: str) -> str:
    """Run a recipe with its own YAML file on a tiny model with few steps and rows, and return its output."""
    command = [sys.executable, str(RECIPES / f"{name}.py"), "--config", str(RECIPES / f"{name}.yaml")]
    shared = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    small = ["--max_steps=2", "--logging_steps=1", "--train_rows=16", "--eval_rows=4", "--max_length=128"]
    run = in_a_process([*command, *shared, *small, *options], RECIPES.parent, data.parent / "cache", **environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout + run.stderr


def in_a_process(command: list[str], cwd: Path, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command with the package in this tree, without a network, in a wide terminal."""
    settings = {"PYTHONPATH": str(RECIPES.parent), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    settings |= {**os.environ, **settings, "HF_DATASETS_CACHE": str(cache), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, cwd=cwd)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, model_folder, data_folder):
    """The stand-in for the Hub after a run that pushes, the run's output folder, and what it printed."""
    folder = tmp_path_factory.mktemp("pushed")
    with hub() as server:
        online = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0"}
        options = ("--push_to_hub", "--hub_model_id", REPOSITORY)
        return server, folder, run_recipe("dpo_lora", folder, model_folder, data_folder, *options, **online)


def assert_left(folder: Path, weights: str, printed: str) -> None:
    """Weights, card and curves are in the output folder, and the end of the run says so."""
    assert (folder / weights).stat().st_size > 0
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(folder / "README.md")
    assert "dpo" in card.data.tags and "arXiv:2305.18290" in card.text and "reward accuracy" in card.text
    for said in ("before", "after", "0.6931", "reward accuracy", "Next steps", str(folder / "curves.png")):
        assert said in printed


def test_recipe_leaves_weights_card_and_curves(pushed):
    _, folder, printed = pushed
    assert_left(folder, ADAPTER, printed)


@pytest.mark.nightly
@pytest.mark.parametrize(("recipe", "weights"), [("dpo_lora", ADAPTER), ("dpo_full", WHOLE_MODEL), ("qlora", ADAPTER)])
def test_every_recipe_leaves_weights_card_and_curves(recipe, weights, tmp_path, model_folder, data_folder):
    """Without a push."""
    assert_left(tmp_path, weights, run_recipe(recipe, tmp_path, model_folder, data_folder))


def test_an_adapter_is_pushed_with_its_card_and_curves(pushed):
    """To a stand-in for the Hub, which then has the very files of the output folder."""
    server, folder, _ = pushed
    assert set(server.created) == {REPOSITORY}
    for name in (ADAPTER, "adapter_config.json", "tokenizer.json", "README.md", "curves.png"):
        assert server.files[name] == (folder / name).read_bytes(), name
    assert f'"{REPOSITORY}"' in server.files["README.md"].decode()


def test_command_line_overrides_the_yaml_and_a_loss_of_ones_own_is_registered(tmp_path, model_folder, data_folder):
    """A file with three lines registers the loss. Its name works on the command line, in the logs and in the card, also
    beside another loss; the table has the downstream check.
    """
    own = tmp_path / "own.py"
    own.write_text(
        "from hf_prefopt import register_loss\n"
        '@register_loss("likelier")\n'
        "def likelier(policy_chosen_logps, policy_rejected_logps, beta=0.1):\n"
        "    return (1 - beta * (policy_chosen_logps - policy_rejected_logps)).relu()\n"
    )
    losses = ("--losses_from", str(own), "--loss_type", "likelier", "sft", "--loss_weights", "1", "0.1")
    options = (*losses, "--beta", "0.5", "--gsm8k_problems", "2")
    printed = run_recipe("dpo_lora", tmp_path, model_folder, data_folder, *options)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"likelier", "sft"} <= set(card.data.tags) and "0.1 × **sft**" in card.text
    assert "none, the loss needs none" in card.text
    assert "GSM8K exact match" in printed


def test_a_data_set_of_one_file_is_trained_on_and_a_column_may_be_left_out(tmp_path, model_folder):
    """There is no evaluation split, and the recipe is told to ignore a column that looks like context."""
    data = tmp_path / "one"
    data.mkdir()
    pair = {"prompt": "Is 2 even? ", "chosen": "I can help you.", "rejected": "I'm sorry.", "question": "Is 3 odd?"}
    (data / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 16)
    printed = run_recipe("dpo_lora", tmp_path / "out", model_folder, data, "--remove_columns", "question")
    assert "training without evaluation" in printed
    assert (tmp_path / "out" / ADAPTER).stat().st_size > 0


def test_a_script_ends_with_one_line_at_a_mistake(tmp_path):
    """The exit code is 1, without a traceback."""
    run = in_a_process([sys.executable, str(RECIPES / "dpo_lora.py")], cwd=tmp_path, cache=tmp_path)
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("error: the dataset is missing")
    assert "Traceback" not in run.stderr


@pytest.mark.nightly
def test_a_script_shows_where_a_mistake_comes_from(tmp_path):
    """`test_commands` asks the command itself."""
    command = [sys.executable, str(RECIPES / "dpo_lora.py"), "--traceback"]
    run = in_a_process(command, cwd=tmp_path, cache=tmp_path)
    assert run.returncode == 1 and "Traceback" in run.stderr and "_refuse_missing" in run.stderr
