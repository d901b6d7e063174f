"""The training data of the recipes: mixtures, held-out rows, and limits that apply only to the demo's data."""

import json
import sys
from pathlib import Path

import pytest

from hf_prefopt import get_loss, list_losses
from hf_prefopt.data.held_out import prompt_keys_of
from hf_prefopt.recipe.data import _without_evaluation, load_pairs
from tests.e2e.typed import read
from tests.trainers import make_config

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def load(tmp_path):
    """Return the rows that a command line selects, and the parsed settings."""

    def loaded(*options: str):
        fixed = ["--model_name_or_path", "m", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"]
        recipe = read(*fixed, *options)
        return *load_pairs(recipe.data, recipe.training), recipe

    return loaded


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Create a folder with two splits, and a file with other columns."""
    folder, other = tmp_path / "pairs", tmp_path / "other.jsonl"
    folder.mkdir()
    for split, count in (("train", 12), ("test", 3)):
        rows = [{"prompt": f"{split} {n // 2}? ", "chosen": "Yes.", "rejected": "No."} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"asked": f"other {n}?", "good": "Yes.", "bad": "No."} for n in range(8)]
    other.write_text("\n".join(map(json.dumps, rows)))
    return {"folder": str(folder), "file": str(other)}


MAPPING = {"question": "asked", "chosen": "good", "rejected": "bad"}


def test_a_mixture_on_the_command_line(load, files, capsys):
    entry = {"path": files["file"], "weight": 0.5, "column_mapping": MAPPING}
    train, test, recipe = load("--datasets", files["folder"], json.dumps(entry), "--seed", "7")
    assert [(source.name, len(source.rows), source.weight) for source in train.sources] == [
        (files["folder"], 12, 1.0),
        (files["file"], 8, 0.5),
    ]
    assert train.seed == 7 and train.sources[1].column_mapping == MAPPING
    assert [(source.name, len(source.rows)) for source in test.sources] == [(files["folder"], 3)]
    assert recipe.data_names == [files["folder"], files["file"]]
    assert f"Evaluated are splits of {files['folder']}." in capsys.readouterr().out


def test_a_mixture_in_a_yaml_file_with_a_share_held_out(load, files, tmp_path):
    config = tmp_path / "mixture.yaml"
    config.write_text(
        f"datasets:\n  - path: {files['folder']}\n    fraction: 1\n    columns: [prompt, chosen, rejected]\n"
        f"  - path: {files['file']}\n    fraction: 3\n"
        f"    column_mapping: {json.dumps(MAPPING)}\ntest_split_size: 0.2\n"
    )
    train, test, *_ = load("--config", str(config))
    assert [source.fraction for source in train.sources] == [1, 3]
    sizes = [sum(len(source.rows) for source in mixture.sources) for mixture in (train, test)]
    assert sum(sizes) == 20 and sizes[1] in (4, 5)  # a fifth of 20 rows, with whole prompts of one or two rows


def test_a_share_is_held_out_in_place_of_a_split(load, files, capsys):
    train, test, *_ = load("--dataset_name", files["folder"], "--test_split_size", "0.25")
    keys = [set(prompt_keys_of(part, None, None, "text").tolist()) for part in (train, test)]
    assert not keys[0] & keys[1] and (len(train), len(test)) == (8, 4)  # whole prompts of two rows
    printed = capsys.readouterr().out
    assert "4 rows are held out to evaluate, 8 are trained on" in printed
    assert "Splits: train is trained on; not used: test." in printed


REFUSED = {
    "beside a name": (
        ["--dataset_name", "x", "--datasets", "y"],
        'dataset_name=x cannot be combined with --datasets.*"path": "x"',
    ),
    "rows of a mixture": (["--datasets", "y", "--train_rows", "3"], "train_rows=3 cannot be combined with --datasets"),
    "a split of a mixture": (
        ["--datasets", "y", "--dataset_train_split", "a"],
        'dataset_train_split=a cannot be combined with --datasets.*"split": "a"',
    ),
    "an unknown key": (["--datasets", '{"path": "y", "ratio": 2}'], "has no use for 'ratio': path, name, .*weight"),
    "no path": (["--datasets", '{"weight": 2}'], "has no path"),
    "broken JSON": (["--datasets", '{"path": '], "is neither a path nor JSON"),
    "two ways to evaluate": (
        ["--dataset_name", "x", "--test_split_size", "0.1", "--dataset_test_split", "a"],
        "holds rows out, and dataset_test_split=a names a split",
    ),
    "a missing file": (["--datasets", "/nowhere/rows.jsonl"], "rows.jsonl: there is no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_an_error(name, load):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        load(*options)


@pytest.mark.parametrize("recipe", ["dpo_lora.yaml", "configs/simpo.yaml", "configs/kto.yaml"])
def test_the_demos_limits_are_not_those_of_other_data(recipe, load, files, capsys):
    train, _, recipe = load("--config", str(RECIPES / recipe), "--dataset_name", files["folder"])
    assert recipe.data.train_rows is None and recipe.data.eval_rows is None and len(train) == 12
    assert recipe.training.max_length == 1024
    assert f"of {files['folder']} all rows are taken" in capsys.readouterr().out


def test_limits_of_the_command_line_and_of_a_users_own_file_stay(load, files, tmp_path, capsys):
    options = ["--dataset_name", files["folder"], "--train_rows", "5", "--max_length", "64"]
    train, _, recipe = load("--config", str(RECIPES / "dpo_lora.yaml"), *options)
    assert len(train) == 5 and recipe.training.max_length == 64
    own = tmp_path / "own.yaml"
    own.write_text("dataset_name: mine\ntrain_rows: 4\nmax_length: 77\n")
    train, _, recipe = load("--config", str(own), "--dataset_name", files["folder"])
    assert len(train) == 4 and recipe.training.max_length == 77 and "not used" not in capsys.readouterr().out


def test_a_mixture_replaces_the_demos_data(load, files):
    train, *_ = load("--config", str(RECIPES / "dpo_lora.yaml"), "--datasets", files["folder"])
    assert [source.name for source in train.sources] == [files["folder"]]


def test_the_files_of_losses_are_written_and_others_stay(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(RECIPES / "configs"))
    import write

    (tmp_path / "mine.yaml").write_text("loss_type: [dpo]\n")
    monkeypatch.setattr(write, "FOLDER", tmp_path)
    write.main()
    sys.modules.pop("write")
    assert (tmp_path / "mine.yaml").read_text() == "loss_type: [dpo]\n"
    assert "registered loss: mine.yaml" in capsys.readouterr().out
    for name in filter(is_ours, list_losses()):
        file = RECIPES / "configs" / f"{name}.yaml"
        assert (tmp_path / file.name).read_text() == file.read_text()


def test_without_one_nothing_is_evaluated_and_one_line_says_so(tmp_path, capsys):
    training = make_config(tmp_path, eval_on_start=True, eval_strategy="epoch")
    _without_evaluation(training)
    assert (training.eval_on_start, training.eval_strategy) == (False, "no")
    (line,) = capsys.readouterr().out.splitlines()
    assert "without evaluation" in line
    best = make_config(tmp_path, eval_strategy="epoch", load_best_model_at_end=True, save_strategy="epoch")
    with pytest.raises(ValueError, match="load_best_model_at_end=True"):
        _without_evaluation(best)


def is_ours(name: str) -> bool:
    """Return whether the package has registered a loss, and not another test."""
    return get_loss(name).function.__module__.startswith("hf_prefopt.")
