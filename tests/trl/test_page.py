"""docs/from_trl.md is up to date, and names everything that it should name."""

from pathlib import Path

import pytest

from hf_prefopt.trl.page import _TRLS, page
from tests.trl.peers import METHODS, trl_config
from tests.trl.test_configs import TRAINER, defaults

PAGE = Path(__file__).parents[2] / "docs" / "from_trl.md"


def test_the_page_is_current():
    """`make docs` writes the page."""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_trls_is_on_the_page(method):
    for name in defaults(trl_config(method)).keys() - TRAINER:
        assert f"`{name}`" in page(), name


def test_fields_that_are_the_same_have_the_same_default():
    """The page lists these fields in one line; they are TRL's, with TRL's defaults."""
    from hf_prefopt import PreferenceConfig

    ours = defaults(PreferenceConfig)
    theirs = {name: value for method in METHODS for name, value in defaults(trl_config(method)).items()}
    assert {name: theirs[name] for name in _TRLS} == {name: ours[name] for name in _TRLS}
