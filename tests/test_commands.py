"""`python -m hf_prefopt`: the output and the exit code of each command; an error is one line."""

import json
import runpy
import sys

import datasets
import huggingface_hub
import pytest

from hf_prefopt.commands import COMMANDS, main
from tests.data.helpers import chat_pair
from tests.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Create a folder with a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({**chat_pair(f"Paris, {n}."), "source": "x"}) for n in range(5)))
    return str(path)


def test_inspect_prints_and_writes_a_page(data, model, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", data, "--model", model, "--rows", "1", "--loss_type", "dpo", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert (
        "5 rows → 5 pairs of 1 prompt" in out and "⟦Paris, 0.<|im_end|>" in out and str(page) in out.replace("\n", "")
    )
    assert "Paris, 0." in page.read_text()


def test_settings_have_their_effect(data, model, capsys):
    options = [
        "--max_length",
        "none",
        "--remove_columns",
        "source",
        "--text_as",
        "messages",
        "--unpair",
        "--loss_type",
        "kto",
    ]
    assert main(["inspect", data, "--model", model, *options, "--rows", "2", "--no-color"]) == 0
    out = capsys.readouterr().out
    assert "max_length=None" in out and "5 desirable" in out and "About the row" not in out


def test_names_of_options_may_be_those_of_other_commands(data, model, capsys):
    """The data as in `train`, the model's short name, hyphens for underscores."""
    printed = []
    for words in (
        [data, "--model_name_or_path", model, "--max_length", "90"],
        [data, "--model", model, "--max-length=90"],
        ["--dataset_name", data, "--model-name-or-path", model, "--max-length", "90", "--dataset_train_split", "train"],
    ):
        assert main(["inspect", *words]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] and "max_length=90" in printed[0]


def test_a_problem_of_the_data_is_exit_code_1(data, model, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(chat_pair()) + "\n" + json.dumps({**chat_pair(), "chosen": []}))
    assert main(["inspect", str(bad), "--model", model]) == 1
    assert "1 of 2 rows cannot be used" in capsys.readouterr().out
    assert main(["inspect", str(bad), "--model", model, "--on_bad_rows", "drop"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "missing.jsonl"}, "error: missing.jsonl: there is no such file\n"),
        ({"data": "./missing"}, "error: ./missing: there is no such file or folder\n"),
        ({"data": "missing/set"}, "error: missing/set: no such file or folder, and not "),
        (
            {"model": "missing/model"},
            "error: --model_name_or_path missing/model: no folder with a tokenizer, and no ",
        ),
        (
            {"--split": "test"},
            "no split 'test' to train on: the dataset has only the split train: name one with --split",
        ),
        ({"--max_length": "1"}, "error: --max_length 1 leaves no room"),
        ({"--loss_type": "dppo"}, "did you mean dpo"),
        ({"--remove_columns": "chosen"}, "column `chosen` is missing"),
        ({"--html": "/dev/null/page.html"}, "error: --html /dev/null/page.html cannot be written: "),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(change, message, data, model, capsys, monkeypatch):
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    named = {"data": data, "model": model, **change}
    options = [word for name, value in named.items() if name.startswith("--") for word in (name, value)]
    assert main(["inspect", named["data"], "--model", named["model"], *options]) == 1
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message.removesuffix("\n") in line and "Traceback" not in printed.err


def test_a_traceback_is_shown_on_request(data, model):
    with pytest.raises(ValueError, match="max_length=1 leaves no room"):
        main(["inspect", data, "--model", model, "--max_length", "1", "--traceback"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_lenght", "8"], "unknown argument --max_lenght: did you mean --max_length?"),
        (["--max-lenght=8"], "unknown argument --max-lenght: did you mean --max_length?"),
        (["--zzz"], "unknown argument --zzz\n"),
        (["--max_length", "many"], "argument --max_length: 'many' is not a valid value"),
        (["--column_mapping", "{a"], "argument --column_mapping: {a is not a JSON object"),
    ],
)
def test_options_that_cannot_be_read(arguments, message, data, model, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", data, "--model", model, *arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and message in printed and len(printed.splitlines()) <= 3


def test_the_module_runs_and_lists_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_prefopt", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hf_prefopt", run_name="__main__")
    printed = capsys.readouterr().out
    assert not ended.value.code and all(f"\n  {name} " in printed for name in COMMANDS)
