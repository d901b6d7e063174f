"""The settings file in a run's folder, and the check that a run does not overwrite another run."""

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hf_prefopt.folders import refuse_same_folder
from hf_prefopt.recipe.settings import Recipe
from hf_prefopt.training.arguments import check_folders
from hf_prefopt.version import __version__

FILE = "train.yaml"
# Files that show that a folder contains the results of a run.
RESULTS = (
    "README.md",
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "checkpoint-*",
)
# Files that a run writes at its end. A run removes those of an earlier run from its folder, because they could be
# mistaken for its own results.
OF_THE_END = ("record.jsonl", "report.html", "curves.png")
# Settings that are ignored when two runs are compared.
NOT_OF_THE_RUN = ("overwrite_output_dir", "resume_from_checkpoint")
_SECRET_NAMES = ("token", "password", "api_key", "secret")
# Patterns of an access token of the Hub, and of a JSON entry whose key names a secret.
_TOKEN = re.compile(r"hf_\w{8,}")
_ENTRY = re.compile(rf'("\w*(?:{"|".join(_SECRET_NAMES)})"\s*:\s*)"[^"]*"', re.IGNORECASE)


def check_places(recipe: Recipe) -> None:
    """Raise `ValueError` if the run's folders cannot be written.

    Also raise it if `output_dir` is the folder of the model, or is in a folder from which the run reads its data.
    """
    check_folders(recipe.training)
    folder, model, data = recipe.training.output_dir, recipe.model.model_name_or_path, recipe.data_names
    refuse_same_folder("output_dir", folder, model, "the model")
    for name in [data] if isinstance(data, str) else data:
        read = Path(name).expanduser()
        if read.is_dir() and Path(folder).resolve().is_relative_to(read.resolve()):
            raise ValueError(
                f"output_dir={folder} is in the folder of the data, {name}, so the next run would read its files as "
                "data: name a folder elsewhere, or name the data's files"
            )


def refuse_other_run(recipe: Recipe) -> None:
    """Raise `ValueError` if `output_dir` contains the results of a run with different settings.

    The error is not raised if the run resumes from a checkpoint or `overwrite_output_dir` is set. If the run replaces
    an earlier run, the record, the report and the curves of the earlier run are removed at once.
    """
    folder = Path(recipe.training.output_dir)
    if recipe.training.resume_from_checkpoint or not any(found for name in RESULTS for found in folder.glob(name)):
        return
    before, now = _kept(folder), _plain(recipe.settings)
    if before == now or recipe.run.overwrite_output_dir:
        if recipe.training.process_index == 0:
            held = "this run" if before == now else f"another run{_difference(before, now)}"
            print(f"{folder} holds {held}: its files are replaced", flush=True)
            for name in OF_THE_END:
                (folder / name).unlink(missing_ok=True)
        return
    raise ValueError(
        f"output_dir={folder} holds another run{_difference(before, now)}: name another folder, --output_dir "
        f"{folder}-2, or replace that run, --overwrite_output_dir true"
    )


def keep_settings(recipe: Recipe) -> None:
    """Write the settings, without secrets, to `train.yaml` in the run's folder.

    The file is a YAML file for `--config`. Comments at its start contain the command and the versions of packages.
    """
    if recipe.training.process_index:
        return
    folder = Path(recipe.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "datasets"))
    head = [
        _command(recipe.command_line),
        f"hf_prefopt {__version__}, {versions}",
        f"To repeat the run: hf_prefopt train --config {folder / FILE}",
    ]
    if recipe.environment:
        head.append(f"Environment variables that were set (without their values): {', '.join(recipe.environment)}")
    settings = yaml.safe_dump(_plain(recipe.settings), allow_unicode=True, sort_keys=False, width=120)
    (folder / FILE).write_text("".join(f"# {line}\n" for line in head) + settings, encoding="utf-8")


def _command(words: Any) -> str:
    """Return the command line as text, with dots in place of secrets."""
    shown, hide = [], False
    for word in words:
        name, is_pair, _ = word.partition("=")
        is_secret = name.startswith("--") and _is_secret(name)
        open_word = _ENTRY.sub(r'\1"..."', _TOKEN.sub("...", word))
        shown.append("..." if hide else f"{name}=..." if is_secret and is_pair else open_word)
        hide = is_secret and not is_pair
    return shlex.join(shown)


def _plain(settings: Any) -> Any:
    """Return the settings to save: without secrets and without the settings in `NOT_OF_THE_RUN`."""
    if isinstance(settings, dict):
        kept = {name: value for name, value in settings.items() if name not in NOT_OF_THE_RUN}
        return {name: _plain(value) for name, value in kept.items() if not _is_secret(str(name))}
    return [_plain(value) for value in settings] if isinstance(settings, list | tuple) else settings


def _is_secret(name: str) -> bool:
    return name.lower().replace("-", "_").endswith(_SECRET_NAMES)


def _kept(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the run in a folder; `None` if the folder has no readable settings."""
    try:
        return yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None


def _difference(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    if not before:
        return ""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    shown = [f"{name}: {before.get(name, 'default')} there, {now.get(name, 'default')} here" for name in names[:3]]
    return f" ({'; '.join(shown)}{', ...' if len(names) > 3 else ''})"
