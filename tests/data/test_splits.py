"""The splits that the recipes use for training and evaluation."""

import pytest

from hf_prefopt.data import splits


@pytest.mark.parametrize(
    ("names", "asked", "trained"),
    [
        (("train", "train_prefs", "test"), "train", "train"),
        (("train_sft", "test_sft"), "train", "train_sft"),
        (("train_prefs", "train_sft", "train_gen", "test_prefs"), "train", "train_prefs"),
        (("data",), "train", "data"),
        (("train", "filtered"), "filtered", "filtered"),
    ],
)
def test_the_split_to_train_on(names, asked, trained):
    assert splits.training_split(names, asked) == trained


@pytest.mark.parametrize(
    ("names", "asked", "taken"),
    [
        (("train", "test", "validation"), "test", "test"),
        (("train", "validation", "dev"), "test", "validation"),
        (("train", "valid"), "test", "valid"),
        (("train", "val"), "test", "val"),
        (("eval", "train"), "test", "eval"),
        (("train", "dev"), "test", "dev"),
        (("train", "test", "test_prefs"), "test_prefs", "test_prefs"),
        (("test", "validation"), "test", "validation"),  # the test split is used for training
        (("train",), "test", None),
        (("train", "test_sft"), "test", None),
        (("train_prefs", "test", "test_sft", "test_prefs"), "test", "test_prefs"),
        (("train_prefs", "test"), "test", "test"),
        (("train_sft", "validation_sft"), "test", "validation_sft"),
    ],
)
def test_the_usual_names_are_found(names, asked, taken):
    trained = next((name for name in names if name.startswith("train")), "test")
    assert splits.evaluation_split(names, asked, trained) == taken


@pytest.mark.parametrize("names", [("train_a", "train_b"), ("easy", "hard"), ("test",), ()])
def test_where_several_may_be_meant_they_are_listed(names):
    with pytest.raises(ValueError, match=f"has .*{', '.join(names)}: name one with --dataset_train_split"):
        splits.training_split(names, "train")


def test_a_split_that_somebody_asked_for_and_is_not_there_is_an_error():
    names = ("train_prefs", "test_prefs")
    with pytest.raises(ValueError, match=r"no split 'other' to train on: .* train_prefs, test_prefs: .*train_split"):
        splits.training_split(names, "other")
    with pytest.raises(
        ValueError, match="dataset_test_split=held_out: the dataset has the splits train_prefs, test_prefs"
    ):
        splits.evaluation_split(names, "held_out", "train_prefs")


def test_other_splits_are_named():
    assert splits.describe_splits(("train", "test"), "train", "test") is None
    line = splits.describe_splits(("train_prefs", "train_sft", "test_prefs"), "train_prefs", "test_prefs")
    assert line == "Splits: train_prefs is trained on, test_prefs is evaluated; not used: train_sft."
