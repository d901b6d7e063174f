"""Folders that cannot be written, or that hold what a run reads, are refused before the run."""

from pathlib import Path

import pytest

from hf_prefopt.folders import check_folder, name_of, refuse_same_folder
from tests.tiny_models import tiny_model
from tests.trainers import make_trainer


def test_nothing_is_created(tmp_path):
    check_folder("output_dir", tmp_path)
    check_folder("output_dir", tmp_path / "new" / "er")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["file", "file/below", "file/below/deeper", "dangling", "dangling/below"])
def test_a_file_is_no_folder(path, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"^output_dir={tmp_path / path}.* is a file: name a folder"):
        check_folder("output_dir", tmp_path / path)


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_name_is_no_folder(path):
    with pytest.raises(ValueError, match=f"^output_dir='{path}' is empty: name a folder"):
        check_folder("output_dir", path)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    """The closest folder that exists decides; `os.access` is replaced, because it allows everything to root."""
    asked = []
    monkeypatch.setattr("hf_prefopt.folders.os.access", lambda place, mode: asked.append(place))
    with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}: name another folder"):
        check_folder("output_dir", tmp_path / "new" / "er")
    assert asked == [tmp_path]


def test_the_home_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="~/file is a file"):
        check_folder("output_dir", "~/file")


def test_other_paths_of_the_same_folder_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for folder in ("model", "./model/", "link", tmp_path / "model" / ".." / "model"):
        with pytest.raises(ValueError, match="is the folder of the model, whose files would be replaced"):
            refuse_same_folder("output_dir", folder, Path("model"), "the model")
    refuse_same_folder("output_dir", "model/out", "model", "the model")
    refuse_same_folder("output_dir", "new", "new", "the model")  # a name on the Hub
    refuse_same_folder("output_dir", "model", None, "the model")


@pytest.mark.parametrize("argument", ["model", "ref_model"])
def test_a_trainer_does_not_replace_its_models(argument, tmp_path):
    """Neither with a policy nor with a reference that is named by the folder."""
    tiny_model().save_pretrained(tmp_path)
    given = {"model": str(tmp_path)} if argument == "model" else {"ref_model": str(tmp_path)}
    with pytest.raises(ValueError, match=f"output_dir={tmp_path} is the folder of the {argument}, whose files would"):
        make_trainer(tmp_path, **given)


@pytest.mark.parametrize("setting", ["output_dir", "reference_cache_dir"])
@pytest.mark.parametrize("name", ["", "file"])
def test_a_trainer_checks_its_folders(setting, name, tmp_path):
    (tmp_path / "file").touch()
    place = str(tmp_path / name) if name else ""
    settings = {} if setting == "output_dir" else {setting: place, "precompute_ref_log_probs": True}
    folder = place if setting == "output_dir" else tmp_path / "out"
    with pytest.raises(ValueError, match=f"{setting}={place}.* is (empty|a file): name a folder"):
        make_trainer(folder, **settings)


@pytest.mark.parametrize(
    ("folder", "name"), {"a/b": "b", "b/": "b", "owner/model": "model", ".": "", "b/..": ""}.items()
)
def test_a_run_has_the_name_of_its_folder(folder, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_of(folder) == make_trainer(folder).card_facts().model_name == (name or tmp_path.name)
