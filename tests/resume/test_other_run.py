"""A run that is resumed with other rows, another order or another optimizer logs a warning or raises an error."""

import pytest

from tests.trainers import make_trainer, pairs

SETTINGS = {"train_dataset": pairs(8), "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, **SETTINGS).train()
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({}, None),
        ({"optim": "adamw_torch"}, None),
        ({"train_dataset": pairs(8, seed=7)}, "a different dataset (8 rows"),
        ({"train_dataset": pairs(9)}, "now 9 rows"),
        ({"seed": 7}, "a different seed (42, now 7)"),
        ({"data_seed": 7}, "a different seed (42, now 7)"),
        ({"seed": 7, "ignore_data_skip": True}, None),
    ],
    ids=["the same", "the same optimizer by another kernel", "data", "one row more", "seed", "data_seed", "no skip"],
)
def test_other_rows_are_warned_of(checkpoint, settings, warning, tmp_path, caplog):
    make_trainer(tmp_path, **{**SETTINGS, **settings}).train(resume_from_checkpoint=checkpoint)
    assert ("was written by a run with a different" in caplog.text) is (warning is not None)
    assert (warning or "") in caplog.text


def test_another_optimizer_is_refused(checkpoint, tmp_path):
    """Without the error, SGD would search for its momentum in Adam's state."""
    with pytest.raises(ValueError, match=r"has the state of optim='adamw_torch'.* this run has optim='sgd'"):
        make_trainer(tmp_path, optim="sgd", **SETTINGS).train(resume_from_checkpoint=checkpoint)
