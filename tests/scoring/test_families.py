"""Training the most used families is exact when they are loaded by name; see `tests.scoring.families`."""

import pytest
import torch

from tests.scoring.families import USED, Case, Family, _gradients_off, _off, _row, _said, examine, page, rows_of


@pytest.mark.parametrize("model_type", USED)
def test_used_families_are_exact(model_type):
    """The families train in full and with LoRA, in the layout "auto"; `make nightly` also tests the layout "padded"."""
    family = examine(model_type, layouts=["auto"])
    assert family.verdict == "exact", _said(family)
    compared = {name for case in family.cases for name in case.off}
    assert len(family.cases) == 2 and {"gradients", "losses of two steps", "log-probs of the saved model"} <= compared


def test_a_difference_is_seen():
    """Detected are a missing tensor, a gradient that is off by 2 % of its largest entry, and log-probs off by 10⁻³."""
    wanted = {"a": torch.tensor([1.0, 0.1]), "b": torch.tensor([1e-9, 0.0])}
    assert _gradients_off({"a": wanted["a"]}, wanted) == float("inf")
    assert _gradients_off({"a": torch.tensor([1.0, 0.12]), "b": wanted["b"]}, wanted) == pytest.approx(0.02)
    # Entries of 10⁻⁹ are rounding if other entries are 1: their difference is relative to 10⁻³.
    assert _gradients_off({"a": wanted["a"], "b": torch.zeros(2)}, wanted) == pytest.approx(1e-6)
    assert _off(torch.tensor([-50.05]), torch.tensor([-50.0])) == pytest.approx(1e-3, rel=1e-3)
    assert _off(torch.tensor([float("nan")]), torch.tensor([-50.0])) == float("inf")


def test_the_page():
    """The page has one line per family, with the worst verdict of its cases."""
    right = Case("full", "auto", "shared", "", "float64", {"log-probs": 1e-15, "gradients": 1e-7})
    wrong = Case("LoRA", "auto", "shared", "", "float64", {"log-probs": 1e-3, "gradients": 1e-7})
    refused = Case("full", "auto", dtype="float32", refused="ValueError: it is not causal")
    families = [
        Family("good", "GoodForCausalLM", [right]),
        Family("bad", "BadForCausalLM", [right, wrong]),
        Family("never", "NeverForCausalLM", [refused]),
        Family("none", not_built="ImportError: no timm"),
    ]
    assert [family.verdict for family in families] == ["exact", "wrong", "refused", "not tried"]
    lines = page(map(_row, families)).splitlines()
    assert "1 exact, 1 wrong, 1 refused, 1 not tried." in lines
    assert "| good | GoodForCausalLM | exact | shared | float64 | 1e-15, 1e-07 |  |" in lines
    assert "| never | NeverForCausalLM | refused |  |  |  | ValueError: it is not causal |" in lines


def test_a_part_of_the_page_is_written_anew():
    """The order of the rows stays, the counts include all rows, and a page with other layouts raises an error."""
    right = Case("full", "auto", "shared", "", "float64", {"log-probs": 1e-15, "gradients": 1e-7})
    wrong = Case("full", "auto", "shared", "", "float64", {"log-probs": 1e-3, "gradients": 1e-7})
    rows = [_row(Family(name, "ForCausalLM", [case])) for name, case in (("a", wrong), ("b", right), ("a-b", right))]
    found = rows_of(page(rows, ["auto"]), ["auto"])
    assert list(found) == ["a", "b", "a-b"] and list(found.values()) == rows
    found["a"] = _row(Family("a", "ForCausalLM", [right]))
    again = page(found.values(), ["auto"])
    assert "3 exact, 0 wrong, 0 refused, 0 not tried." in again and list(rows_of(again, ["auto"])) == ["a", "b", "a-b"]
    assert again.count("--layouts auto") == 1 and "--layouts" not in page(rows)
    with pytest.raises(ValueError, match="other --layouts"):
        rows_of(again, ["auto", "padded"])
