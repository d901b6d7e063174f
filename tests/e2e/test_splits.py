"""Which splits the recipes train on and evaluate."""

import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from tests.trainers import make_config

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def splits(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import splits

    yield splits
    sys.modules.pop("splits")


def named(*names: str) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict({"from": [name]}) for name in names})


@pytest.mark.parametrize(
    ("names", "asked", "taken"),
    [
        (("train", "test", "validation"), "test", "test"),
        (("train", "validation", "dev"), "test", "validation"),
        (("train", "valid"), "test", "valid"),
        (("eval", "train"), "test", "eval"),
        (("train", "dev"), "test", "dev"),
        (("train", "test", "test_prefs"), "test_prefs", "test_prefs"),
        (("test", "validation"), "test", "validation"),  # the test split is what is trained on
        (("train",), "test", None),
        (("train", "test_sft"), "test", None),
    ],
)
def test_the_usual_names_are_found(names, asked, taken, splits):
    trained = "train" if "train" in names else "test"
    found = splits.evaluation_split(named(*names), asked, trained)
    assert (found and found["from"][0]) == taken


def test_a_split_that_somebody_asked_for_and_is_not_there_is_an_error(splits):
    data = named("train_prefs", "test_prefs")
    with pytest.raises(ValueError, match=r"no split 'train' to train on: .* train_prefs, test_prefs; .*train_split"):
        splits.training_split(data, "train")
    with pytest.raises(ValueError, match="no split 'held_out' to evaluate: there are train_prefs, test_prefs"):
        splits.evaluation_split(data, "held_out", "train_prefs")


def test_without_one_nothing_is_evaluated_and_one_line_says_so(splits, tmp_path, capsys):
    training = make_config(tmp_path, eval_on_start=True, eval_strategy="epoch")
    splits.without_evaluation(training)
    assert (training.eval_on_start, training.eval_strategy) == (False, "no")
    (line,) = capsys.readouterr().out.splitlines()
    assert "without evaluation" in line
    best = make_config(tmp_path, eval_strategy="epoch", load_best_model_at_end=True, save_strategy="epoch")
    with pytest.raises(ValueError, match="load_best_model_at_end=True"):
        splits.without_evaluation(best)
