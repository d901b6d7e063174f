"""Select the splits of a dataset for training and evaluation."""

from collections.abc import Collection

# Usual names of held-out splits; the first one found is used.
HELD_BACK = ("test", "validation", "valid", "val", "dev", "eval")


def training_split(splits: Collection[str], name: str, option: str = "--dataset_train_split") -> str:
    """Return the split for training.

    If there is no split `name` and `name` is "train", return the only split, the only split whose name starts with
    "train", or `train_prefs`.

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
    """Return the split `name`, or else a split with a usual name; None if there is none.

    "test" accepts every usual name. For `train_prefs`, names such as `test_prefs` take precedence.

    Args:
        splits: Names of all splits.
        name: Requested split.
        trained: The split for training, which is never returned.

    Raises:
        ValueError: If there is no split `name`, and the user chose this name (it is not a usual name).
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
