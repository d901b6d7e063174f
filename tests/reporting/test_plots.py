"""The picture of a run: it is drawn, and it shows what the log says."""

from matplotlib.image import imread

from hf_prefopt.reporting.plots import PANELS, _series, plot_training
from tests.reporting.history import log_history


def test_a_run_becomes_a_png_of_readable_size(tmp_path):
    path = plot_training(log_history(), tmp_path / "made" / "curves.png", title="dpo on pairs")
    height, width, _ = imread(path).shape
    assert (height, width) == (910, 1300)


def test_series_keep_evaluations_apart_from_training_batches():
    assert _series(log_history(), "eval_loss")[0] == [0, 20]
    assert _series(log_history(), "loss")[0] == list(range(2, 21, 2))


def test_a_loss_without_rewards_still_gets_its_picture(tmp_path):
    """SFT has no implicit rewards: the panels stay empty, nothing raises."""
    assert plot_training([{"step": 1, "loss": 2.0}], tmp_path / "sft.png").exists()


def test_every_panel_names_its_unit():
    assert all(panel.unit and panel.title for panel in PANELS)
