"""Tables and pictures are logged to the real trackers, in the same run as the metrics."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from hf_prefopt.callbacks import PictureCallback, SampleGenerationsCallback
from hf_prefopt.generation.trackers import log_table, markdown_table
from tests.generation.any_trainer import PROMPTS, TRAINERS, plain_trainer, policy


def watched(make, folder, **settings):
    """Train briefly, with a table of samples and a picture at each evaluation."""
    trainer = make(folder, policy(), max_steps=2, eval_steps=1, **settings)
    trainer.add_callback(SampleGenerationsCallback(trainer, PROMPTS, max_new_tokens=4))
    trainer.add_callback(PictureCallback(trainer, draw))
    trainer.train()
    return trainer


def draw(path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1), dpi=40)
    figure.subplots().plot([1, 2])
    figure.savefig(path)


@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS.keys())
def test_tensorboard(make, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = watched(make, tmp_path / "run", report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    texts = events.Tensors("samples/text_summary")
    assert [text.step for text in texts] == [1, 2]
    assert "| prompt | reference | policy |" in texts[-1].tensor_proto.string_val[0].decode()
    pictures = events.Images("curves")
    assert [picture.step for picture in pictures] == [1, 2] and (pictures[0].width, pictures[0].height) == (40, 40)
    assert "eval/loss" in events.Tags()["scalars"] and trainer.state.global_step == 2


def test_trackio(tmp_path):
    """The database has the rows and the picture. trackio starts threads, so the test runs in a new process."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "home")}
    code = (
        "import sys; from tests.generation import test_trackers as t; from pathlib import Path; "
        "t.watched(t.plain_trainer, Path(sys.argv[1]), report_to='trackio', project='tried', run_name='one')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (base,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(base) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("select metrics from metrics")]
    tables = [entry["samples"] for entry in logged if "samples" in entry]
    pictures = [entry["curves"] for entry in logged if "curves" in entry]
    assert len(tables) == len(pictures) == 2 and "trackio.table" in json.dumps(tables[0])
    assert any("train/loss" in entry for entry in logged)
    assert list((tmp_path / "trackio").rglob("*.png"))


def test_markdown_keeps_a_text_in_its_cell():
    table = markdown_table([{"prompt": "a|b\nc <b>", "policy": "d & e"}])
    assert table.splitlines() == ["| prompt | policy |", "| --- | --- |", "| a&#124;b<br>c &lt;b> | d &amp; e |"]


def test_a_run_without_trackers_writes_nothing(tmp_path):
    assert log_table(plain_trainer(tmp_path, policy()), "samples", [{"prompt": "a"}]) == []


def test_a_picture_that_is_not_drawn_is_an_error(tmp_path):
    trainer = plain_trainer(tmp_path, policy())
    trainer.add_callback(PictureCallback(trainer, lambda path: None))
    with pytest.raises(ValueError, match="wrote no file"):
        trainer.evaluate()
