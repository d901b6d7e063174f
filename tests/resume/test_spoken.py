"""The values of `--resume_from_checkpoint` on a command line, where everything is text."""

import pytest

from tests.trainers import logged, make_trainer, pairs

SETTINGS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}


def steps(folder, said: str | bool | None) -> tuple[list[int], list[float]]:
    """Return the steps that a resumed run has logged, and their losses."""
    trainer = make_trainer(folder, train_dataset=pairs(6), **SETTINGS)
    trainer.train(resume_from_checkpoint=said)
    assert trainer.state.global_step == 6
    return [entry["step"] for entry in trainer.state.log_history if "loss" in entry], logged(trainer, "loss")


@pytest.mark.parametrize("said", ["true", "True", "last", "auto", True])
def test_the_newest_whole_checkpoint_is_taken(said, tmp_path):
    """The last checkpoint is incomplete, as after a kill during its write. The
    losses are those of the uninterrupted run.
    """
    whole = steps(tmp_path, None)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    written = [(tmp_path / f"checkpoint-{step}" / "scheduler.pt") for step in (4, 6)]
    before = [file.stat().st_mtime_ns for file in written]
    assert steps(tmp_path, said) == whole
    kept, again = (file.stat().st_mtime_ns - then for file, then in zip(written, before, strict=True))
    assert kept == 0 < again  # step 4 was not repeated, and step 6 was


@pytest.mark.parametrize("said", ["false", False, None, ""])
def test_a_run_may_start_without(said, tmp_path):
    whole = steps(tmp_path, None)
    first = (tmp_path / "checkpoint-2" / "scheduler.pt").stat().st_mtime_ns
    assert steps(tmp_path, said) == whole
    assert (tmp_path / "checkpoint-2" / "scheduler.pt").stat().st_mtime_ns > first


def test_where_there_is_none_that_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no complete checkpoint to resume from"):
        steps(tmp_path, "true")


def test_half_a_checkpoint_stays_an_error(tmp_path):
    steps(tmp_path, None)
    half = tmp_path / "checkpoint-6"
    (half / "trainer_state.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"checkpoint-6: not a complete checkpoint.*resume_from_checkpoint=.*checkpoint-4"
    ):
        steps(tmp_path, str(half))
