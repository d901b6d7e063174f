"""The picture of a run shows the values in the log."""

import numpy as np
from matplotlib.image import imread

from hf_prefopt.reporting.panels import PANELS, drawn_panels, median_of, running_mean, series, three_digits
from hf_prefopt.reporting.plots import plot_training
from hf_prefopt.reporting.record import RunRecord
from tests.reporting.history import log_history, made_up_run


def test_a_run_becomes_a_png_of_readable_size(tmp_path):
    """Four panels have curves: two rows of 2.9 inches, and 0.9 inches for the text, at 150 dpi."""
    path = plot_training(made_up_run(), tmp_path / "made" / "curves.png")
    height, width, _ = imread(path).shape
    assert (height, width) == (round((0.9 + 2 * 2.9) * 150), 1500)


def test_series_keep_evaluations_apart_from_training_batches():
    assert [step for step, _ in series(log_history(), "eval_loss")] == [0, 20]
    assert [step for step, _ in series(log_history(), "loss")] == list(range(2, 21, 2))


def test_a_panel_without_curves_is_left_out(tmp_path):
    """SFT has no implicit rewards and no reference."""
    record = RunRecord({}, [{"step": 1, "loss": 2.0}])
    assert [drawn.panel.title for drawn in drawn_panels(record)] == ["Loss"]
    height, *_ = imread(plot_training(record, tmp_path / "sft.png")).shape
    assert height == round((0.9 + 2.9) * 150)
    assert plot_training(RunRecord(), tmp_path / "nothing.png").exists()


def test_every_panel_names_its_unit():
    assert all(panel.unit and panel.title for panel in PANELS)


def test_the_running_mean_is_over_a_tenth_and_at_least_five():
    points = [(float(step), float(step**2)) for step in range(80)]
    values = [value for _, value in points]
    found = running_mean(points)
    assert found[79] == (79, np.mean(values[72:80])) and found[2] == (2, np.mean(values[:3]))
    assert running_mean(points[:4]) == [] and running_mean(points[:9])[8][1] == np.mean(values[4:9])


def test_evaluations_have_their_intervals_and_the_baseline_its_line():
    accuracy = next(drawn for drawn in drawn_panels(made_up_run()) if drawn.panel.title == "Reward accuracy")
    assert accuracy.curves[0].intervals == {0: (0.2, 0.8), 20: (0.4, 0.97)}
    assert accuracy.lines == [(0.5, "no preference"), (0.5, "always the longer one")]


def test_a_line_far_away_does_not_make_the_curves_one_mark():
    """SimPO's rewards are at −30, and no preference is at 0; the axis does not include 0."""
    logs = [{"step": step, "rewards/margins": 30 + step / 10} for step in range(3)]
    (drawn,) = drawn_panels(RunRecord({}, logs))
    assert min(drawn.values) == 30.0


def test_numbers_have_three_digits_and_no_negative_zero():
    assert [three_digits(value) for value in (0.6931, -30.6123, -0.0, 1.2e-5)] == ["0.693", "−30.6", "0", "1.2e−05"]
    assert median_of([{"a": 1.0}, {"a": 5.0}, {"a": None}, {"a": 2.0}], "a") == 2.0 and median_of([], "a") is None
