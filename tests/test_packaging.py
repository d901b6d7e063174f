"""The files around the package agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_prefopt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
REQUIREMENTS = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS] if "hf_prefopt[" not in line]


def test_the_version_to_cite():
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited == hf_prefopt.__version__


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_pinned_versions_are_admitted(requirement: Requirement, file: str):
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.M))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}.get(
        canonicalize_name(requirement.name)
    )
    assert pinned is None or requirement.specifier.contains(pinned), f"{file} pins {requirement.name}=={pinned}"
    assert pinned is not None or file == "constraints-oldest.txt", f"{file} does not pin {requirement.name}"


def test_actions_are_pinned_by_commit():
    uses = [
        line.split("uses:")[1].strip()
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)
