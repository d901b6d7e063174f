"""The files around the package are consistent."""

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_prefopt
from hf_prefopt.recipe.shipped import engines, recipes
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer

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


def test_pre_commit_runs_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = (repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit"))
    assert f"ruff=={rev.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_the_classifiers_are_the_pythons_that_are_tested():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    named = [
        line.split(" :: ")[-1]
        for line in PROJECT["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert named == workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_actions_are_pinned_by_commit():
    uses = [
        line.split("uses:")[1].strip()
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_the_recipes_their_data_and_the_engines(wheel):
    """The files are in `hf_prefopt/shipped/`, byte for byte, and the wheel has all non-Python files of the package."""
    with ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for folder in ("recipes", "ds_configs"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert files[f"hf_prefopt/shipped/{file.relative_to(ROOT)}"] == file.read_bytes()
    others = [file for file in (ROOT / "hf_prefopt").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {str(file.relative_to(ROOT)) for file in others} <= files.keys()
    assert not [name for name in files if name.startswith(("tests/", "benchmarks/", "recipes/"))]


@pytest.mark.nightly
def test_the_wheel_trains_in_a_fresh_environment(wheel, tmp_path):
    """There is no TRL and no checkout; torch and other dependencies come from this environment, through a path file."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "heavy.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    (site / "trl.py").write_text("raise ImportError('TRL is not installed')")
    install = [environment / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Is {n} even? ", "chosen": "I can help you.", "rejected": "I'm sorry."} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*words: str) -> str:
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        settings.pop("PYTHONPATH", None)
        command = [environment / "bin" / "hf_prefopt", *words]
        ended = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended.stdout

    listed = run("train", "--list")
    assert all(f"  {name} " in listed for name in [*recipes(), *engines()])
    assert run("train", "--copy", "zero3", "mine").split() == [
        "mine/ds_configs/zero3.json",
        "mine/ds_configs/zero3.yaml",
    ]
    run(
        "train",
        "--config",
        "simpo",
        "--model_name_or_path",
        "model",
        "--dataset_name",
        "pairs.jsonl",
        "--max_steps",
        "2",
    )
    assert (tmp_path / "runs" / "simpo" / "adapter_model.safetensors").is_file()
    run(
        "train",
        "--config",
        "lipo",
        "--model_name_or_path",
        "model",
        "--train_rows",
        "4",
        "--max_steps",
        "1",
        "--use_cpu",
    )
    assert (tmp_path / "runs" / "lipo" / "train.yaml").is_file()  # the data are in the wheel
