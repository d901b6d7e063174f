"""The benchmark of data preparation times every step of ours, and both trainers produce the same tokens."""

import pytest

from benchmarks.data_time import SIDES, Clock, measure, write_pairs
from tests.tokenizers import tiny_tokenizer


@pytest.fixture
def restored(monkeypatch):
    """Undo the patches of the clock after each test."""
    from hf_prefopt.data import prepare, tokenize

    for owner, names in (
        (prepare, ("_read", "truncate_row", "note_row")),
        (tokenize, ("_encode", "_split_row")),
        (tokenize.Renderer, ("render",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))


def test_both_sides_make_the_same_tokens_and_every_step_is_timed(restored, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.data_time.MAX_LENGTH", 100_000)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "rows.jsonl", 5)
    found = {}
    for side in SIDES:
        found[side] = measure(side, str(tmp_path / "rows.jsonl"), str(tmp_path / "model"), str(tmp_path / side))
    assert {one["rows"] for one in found.values()} == {5}
    assert found["hf_prefopt"]["prompt tokens"] == found["TRL"]["prompt tokens"] > 0
    assert set(found["hf_prefopt"]["wall"]) == {
        *("read", "convert", "render", "tokenize", "split, mask", "cut", "count", "rows to Arrow and back", "check")
    }


def test_time_within_a_step_is_counted_once(monkeypatch):
    """The test's clock advances by one with each call: one tick is in the inner
    step, and two are only in the outer step.
    """
    ticks = iter(range(100))
    monkeypatch.setattr("benchmarks.data_time.time.perf_counter", lambda: float(next(ticks)))
    clock = Clock()
    with clock.timed("outer"), clock.timed("inner"):
        pass
    assert clock.wall == {"inner": 1.0, "outer": 2.0}
