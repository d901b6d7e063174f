"""The pytest plugin of `trl_suite`: it replaces data of the Hub and classes, and writes the outcomes to a file.

It must be loaded before TRL's test modules. It imports nothing of our tests: in its process, `tests` is TRL's package.
"""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from trl import import_utils
from trl.experimental import cpo, orpo, tpo

OWNER = "trl-internal-testing"


def loader_of(folder: Path, original: Any) -> Any:
    """Return a `load_dataset` that reads the data of TRL's tests from a folder."""

    def load_dataset(path: str, name: str | None = None, split: str | None = None, streaming: bool = False, **others):
        owner, _, repository = path.partition("/")
        if owner != OWNER:
            return original(path, name, split=split, streaming=streaming, **others)
        data = datasets.load_from_disk(folder / "data" / repository / (name or "default"))
        if streaming:
            data = {key: rows.to_iterable_dataset() for key, rows in data.items()}
        return data if split is None else data[split]

    return load_dataset


def availability(name: str) -> Any:
    """Return an `is_<package>_available` function of a newer TRL than the installed one."""
    if not (package := re.fullmatch("is_(.+)_available", name)):
        raise AttributeError(name)
    return lambda: find_spec(package[1]) is not None


import_utils.__getattr__ = availability
datasets.load_dataset = loader_of(Path(os.environ["TRL_SUITE_STANDINS"]), datasets.load_dataset)
torch.set_num_threads(1)
OUTCOMES: dict[str, str] = {}

if os.environ["TRL_SUITE_OURS"] == "1":
    import hf_prefopt.trl as ours

    for name in ours.__all__:
        module = {"CPO": cpo, "ORP": orpo, "TPO": tpo}.get(name[:3], trl)
        assert hasattr(module, name)
        setattr(module, name, getattr(ours, name))


def pytest_runtest_logreport(report):
    """Record the outcome of a test: that of its call, or of a setup that failed."""
    test = report.nodeid.split("/")[-1]
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[test] = report.outcome if report.outcome != "failed" else _last_line(report)


def _last_line(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).splitlines()[0]


def pytest_sessionfinish(session):
    """Write the outcomes of all tests."""
    Path(os.environ["TRL_SUITE_RESULTS"]).write_text(json.dumps(OUTCOMES, indent=1))
