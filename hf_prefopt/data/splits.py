"""Select the splits of a dataset for training and evaluation."""

from collections.abc import Collection

# Usual names of held-out splits, in order of preference.
HELD_BACK = ("test", "validation", "valid", "val", "dev", "eval")


def training_split(splits: Collection[str], name: str, option: str = "--dataset_train_split") -> str:
    """Return the split for training: the split `name` if it exists.

    If there is no split "train" and `name` is "train", return `train_prefs`, or the only split whose name starts with
    "train". A dataset with only one split is trained on, unless the split has the usual name of a held-out split.

    Args:
        splits: Names of all splits.
        name: Requested split.
        option: The option that names the split, for errors.

    Raises:
        ValueError: If there is no such split, or several splits match.
    """
    if name in splits:
        return name
    alike = [split for split in splits if split.startswith("train")] if name == "train" else []
    if name == "train" and len(splits) == 1:
        alike = [split for split in splits if split not in HELD_BACK]
    if "train_prefs" in alike:
        return "train_prefs"
    if len(alike) != 1:
        raise ValueError(f"no split {name!r} to train on: {_what_there_is(splits)}: name one with {option}")
    return alike[0]


def evaluation_split(splits: Collection[str], name: str, trained: str) -> str | None:
    """Return the split `name`, or a split with a usual name (`HELD_BACK`) if there is no split `name`.

    Return None if neither exists. The default name "test" stands for any usual name: if the training split is
    `train_prefs`, names with the same ending, such as `test_prefs`, take precedence even over `test`.

    Args:
        splits: Names of all splits.
        name: Requested split.
        trained: The split for training, which is never returned.

    Raises:
        ValueError: If there is no split `name` and `name` is not a usual name, so the user must have chosen it.
    """
    if name not in (*splits, *HELD_BACK):
        raise ValueError(
            f"dataset_test_split={name}: {_what_there_is(splits)}: "
            + ("name another one" if len(splits) > 1 else "to hold out part of it, pass test_split_size=0.05 instead")
        )
    ending = trained.removeprefix("train") if trained.startswith("train") else ""
    usual = (*[f"{held}{ending}" for held in HELD_BACK], *HELD_BACK)
    names = (*usual, name) if name == "test" else (name, *usual)
    return next((known for known in names if known in splits and known != trained), None)


def _what_there_is(splits: Collection[str]) -> str:
    kinds = ("no splits", "only the split ", "the splits ")
    return f"the dataset has {kinds[min(len(splits), 2)]}{', '.join(splits)}"


def describe_splits(splits: Collection[str], trained: str, evaluated: str | None) -> str | None:
    """Describe which splits are used; None if they are `train` and `test` and there are no other splits."""
    others = [split for split in splits if split not in (trained, evaluated)]
    if trained == "train" and evaluated in (None, "test") and not others:
        return None
    said = f"Splits: {trained} is trained on" + (f", {evaluated} is evaluated" if evaluated else "")
    return said + (f"; not used: {', '.join(others)}." if others else ".")
