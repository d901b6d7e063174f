"""A run that is killed at any moment and started again ends like an uninterrupted run, bit for bit.

`python -m tests.resume.killed_runs 20` tests this for random moments.
"""

import json
import random

import pytest

from hf_prefopt.training.checkpoints import is_complete, last_complete_checkpoint
from tests.resume.killed_runs import kill_twice, result, run
from tests.trainers import make_trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the result of a run that is not killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


@pytest.mark.parametrize(
    "moment",
    [
        "between the micro-batches of step 5",
        pytest.param("writing trainer_state.json", marks=pytest.mark.nightly),
        pytest.param("writing optimizer.pt", marks=pytest.mark.nightly),
    ],
)
def test_a_killed_run_ends_as_the_whole_one(moment, whole, tmp_path):
    """The run is killed at its last such moment, and again after resuming: weights
    and the loss's running mean are equal.
    """
    moments = json.loads((whole / "moments.json").read_text())
    last = len(moments) - 1 - moments[::-1].index(moment)
    first_code, _ = kill_twice(tmp_path, last, random.Random(moment))
    assert first_code == -9
    assert result(tmp_path) == result(whole)


def test_half_a_checkpoint_is_passed_over(tmp_path):
    """Checkpoints are sorted by number, not by name. A checkpoint that lacks its
    last file, or has half of it, is ignored.
    """
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not is_complete(tmp_path / "checkpoint-12")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_half_a_checkpoint_is_refused_with_the_whole_one_named(tmp_path):
    """Without the error, the Trainer would load the weights and start at step 0 without a message."""
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    for step, state in ((3, "{}"), (4, "{")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    with pytest.raises(
        ValueError, match=r"checkpoint-4: not a complete checkpoint.*resume_from_checkpoint=.*checkpoint-3"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
