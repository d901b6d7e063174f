"""Load the splits of a dataset from the Hub, a folder, a file, or files that match a pattern."""

from collections.abc import Callable, Mapping, Sequence
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from huggingface_hub import is_offline_mode

from hf_prefopt.data.contents import is_message
from hf_prefopt.data.file_faults import find_fault, kind_of
from hf_prefopt.data.layout_table import LAYOUTS

# The loader of `datasets` for each suffix of a file, and the loader's options.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}

_LOADER = {kind: loader for kind, (loader, _) in KINDS.items()}


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """Return the splits of a dataset, keyed by name.

    Args:
        name: A Hub name, a folder, a file, or a pattern such as "data/*.jsonl.gz". A file, or all files that match a
            pattern, are loaded as one split, "train".
        config: Name of the configuration of a Hub dataset.
        streaming: Whether to load the splits as streams.

    Raises:
        ValueError: If the dataset does not exist, a file is empty or broken, or the files are of different kinds.
    """
    if not (has_magic(name) or kind_of(name) in KINDS or Path(name).expanduser().is_file()):
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
            raise ValueError(f"{name}: there is no such file or folder")
        path = str(Path(name).expanduser()) if name.startswith("~") else name
        if any((Path(path) / mark).is_file() for mark in _SAVED):
            return _saved(name, path, streaming)
        files = [str(file) for file in sorted(Path(path).rglob("*")) if kind_of(file.name) in KINDS]
        _check_one_kind(name, path, files)
        return _loaded(name, files, lambda: load_dataset(path, name=config, streaming=streaming))
    files = sorted(glob(str(Path(name).expanduser()), recursive=True))
    _check_files(name, files)
    loader, options = KINDS[kind_of(files[0])]

    def load(**more: str) -> Any:
        return load_dataset(loader, data_files={"train": files}, streaming=streaming, **options, **more)

    splits = _loaded(name, files, load)
    field = _field_of_rows(splits["train"], len(files)) if loader == "json" else None
    return splits if field is None else _loaded(name, files, lambda: load(field=field))


# `save_to_disk` writes the first of these files for a dataset, and the second for a dict of splits.
_SAVED = ("state.json", "dataset_dict.json")


def _saved(name: str, path: str, streaming: bool) -> Any:
    """Return the splits in a folder that `save_to_disk` wrote. A single dataset becomes the split "train"."""
    try:
        saved = load_from_disk(path)
    except Exception as error:  # loaders raise errors of any type
        raise ValueError(f"{name}: the folder that save_to_disk wrote is incomplete: {error}") from error
    splits = dict(saved) if isinstance(saved, Mapping) else {"train": saved}
    return {split: rows.to_iterable_dataset() if streaming else rows for split, rows in splits.items()}


def _check_one_kind(name: str, path: str, files: Sequence[str]) -> None:
    """Raise `ValueError` if a folder has files of several kinds, because the loader would read only one kind.

    If there is a README, no error is raised, because a README may list the files to read. Files that describe the
    dataset (such as `dataset_info.json`) are ignored.
    """
    files = [file for file in files if Path(file).name not in ("dataset_info.json", "dataset_infos.json")]
    kinds = {_LOADER[kind_of(file)]: file for file in files}
    if len(kinds) > 1 and not (Path(path) / "README.md").is_file():
        one, other = (Path(file).name for file in [*kinds.values()][:2])
        pattern = f"{name.rstrip('/')}/*{kind_of(one)}"
        raise ValueError(f"{name} has files of several kinds, such as {one} and {other}: name one kind, {pattern!r}")


# Keys that may hold the list of rows in a JSON object.
_LISTS_OF_ROWS = ("data", "rows", "examples", "instances", "items", "train")


def _field_of_rows(rows: Any, files: int) -> str | None:
    """If each file is one JSON object that holds a list of rows, return the key of this list.

    An example of such a file is `{"version": 1, "data": [...]}`. In all other cases, return None.

    Args:
        rows: The rows that the loader found in the files.
        files: Number of files.
    """
    objects = list(islice(iter(rows), files + 1))
    if len(objects) != files:
        return None
    keys = [key for key in _LISTS_OF_ROWS if all(_are_rows(one.get(key)) for one in objects)]
    return keys[0] if len(keys) == 1 and not _has_layout(objects[0]) else None


def _are_rows(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(row, dict) and not is_message(row) for row in value)
    )


def _has_layout(row: dict[str, Any]) -> bool:
    return any(layout.find(row) is not None for layout in LAYOUTS)


def _loaded(name: str, files: Sequence[str], load: Callable[[], Any]) -> Any:
    """Return the loaded splits.

    Args:
        name: Name of the dataset, for errors.
        files: The local files of the dataset. Empty if it is not local.
        load: Function that loads the splits.

    Raises:
        ValueError: If loading fails. For local files, the error names the file and the problem, if they can be found.
    """
    try:
        splits = load()
        for split in splits.values() if files else ():
            next(iter(split))  # reads a row, because a stream raises errors only when it is read
        return splits
    except Exception as error:  # loaders raise errors of any type
        reason = find_fault(files) if files else None
        raise ValueError(reason or f"{name}: {_why_not_loaded(name, files, error)}") from error


def _why_not_loaded(name: str, files: Sequence[str], error: Exception) -> str:
    if files or Path(name).is_dir():
        return str(error.__cause__ or error)
    if is_offline_mode():
        return (
            "no such file or folder, and not in the Hub cache, and HF_HUB_OFFLINE is set: correct the path, or unset "
            "HF_HUB_OFFLINE"
        )
    return f"no such file or folder, and not loaded from the Hub: {error.__cause__ or error}"


def _check_files(name: str, files: list[str]) -> None:
    if not files:
        raise ValueError(f"{name}: there is no such file")
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 or not kinds.issubset(KINDS):
        given = ", ".join(sorted(kinds - {""})) or Path(files[0]).suffix or "no known kind"
        raise ValueError(f"{name} has the file type {given}: use one of {', '.join(KINDS)}")
    empty = next((file for file in files if not Path(file).stat().st_size), None)
    if empty:
        raise ValueError(f"{empty} is empty")
