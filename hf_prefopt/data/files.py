"""Load the splits of a data set from the Hub, a folder, a file, or files that match a pattern."""

from collections.abc import Callable, Sequence
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from huggingface_hub import is_offline_mode

from hf_prefopt.data.contents import is_message
from hf_prefopt.data.file_faults import find_fault, kind_of
from hf_prefopt.data.layout_table import LAYOUTS

# The loader for each kind of file, and its options.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """Load the splits, by name. Files make one split, "train".

    Args:
        name: A Hub name, a folder, a file or a pattern such as "data/*.jsonl.gz".
        config: Name of the configuration of a Hub data set.
        streaming: Whether to load streams.

    Raises:
        ValueError: If the path does not exist, a file is empty or broken, or the files are of different kinds.
    """
    if not (has_magic(name) or kind_of(name) in KINDS or Path(name).expanduser().is_file()):
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
            raise ValueError(f"{name}: there is no such file or folder")
        path = str(Path(name).expanduser()) if name.startswith("~") else name
        files = [str(file) for file in sorted(Path(path).rglob("*")) if kind_of(file.name) in KINDS]
        return _loaded(name, files, lambda: load_dataset(path, name=config, streaming=streaming))
    files = sorted(glob(str(Path(name).expanduser()), recursive=True))
    _check_files(name, files)
    loader, options = KINDS[kind_of(files[0])]

    def load(**more: str) -> Any:
        return load_dataset(loader, data_files={"train": files}, streaming=streaming, **options, **more)

    splits = _loaded(name, files, load)
    field = _field_of_rows(splits["train"], len(files)) if loader == "json" else None
    return splits if field is None else _loaded(name, files, lambda: load(field=field))


# Keys that may hold the list of rows in a JSON object.
_LISTS_OF_ROWS = ("data", "rows", "examples", "instances", "items", "train")


def _field_of_rows(rows: Any, files: int) -> str | None:
    """Return the key of the list of rows if each file is one JSON object: `{"version": 1, "data": [...]}`."""
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
    """Return the loaded splits. Raises `ValueError` if loading fails, with the name of the local file, if any."""
    try:
        splits = load()
        for split in splits.values() if files else ():
            next(iter(split))  # a stream is read only when it is iterated
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
        raise ValueError(f"{name} is of {', '.join(sorted(kinds))}: give one of {', '.join(KINDS)}")
    empty = next((file for file in files if not Path(file).stat().st_size), None)
    if empty:
        raise ValueError(f"{empty} is empty")
