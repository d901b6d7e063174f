"""The splits of a data set by its name: of the Hub, of a folder, of a file, or of files by a pattern."""

import json
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError

# The loader of each kind of file, and its options.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """The splits by name; of files there is one, "train".

    Args:
        name: a Hub name, a folder, a file or a pattern such as "data/*.jsonl.gz". config: of a data set of the Hub.

    Raises:
        ValueError: there is no such path, a file is empty or broken, or files are of different kinds.
    """
    if not (has_magic(name) or kind_of(name) in KINDS or Path(name).expanduser().is_file()):
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
            raise ValueError(f"{name}: there is no such file or folder")
        path = str(Path(name).expanduser()) if name.startswith("~") else name
        return load_dataset(path, name=config, streaming=streaming)
    files = sorted(glob(str(Path(name).expanduser()), recursive=True))
    _check_files(name, files)
    loader, options = KINDS[kind_of(files[0])]
    try:
        return load_dataset(loader, data_files={"train": files}, streaming=streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(_broken_line(files) or f"{name}: {error.__cause__ or error}") from error


def kind_of(file: str) -> str:
    """The suffix of a file, without that of its compression."""
    suffixes = [suffix for suffix in Path(file).suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1].lower() if suffixes else ""


def _check_files(name: str, files: list[str]) -> None:
    if not files:
        raise ValueError(f"{name}: there is no such file")
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 or not kinds.issubset(KINDS):
        raise ValueError(f"{name} is of {', '.join(sorted(kinds))}: give one of {', '.join(KINDS)}")
    empty = next((file for file in files if not Path(file).stat().st_size), None)
    if empty:
        raise ValueError(f"{empty} is empty")


def _broken_line(files: list[str]) -> str | None:
    """Which line of which file is no JSON, if they hold a row in each line."""
    for file in files:
        if Path(file).suffix != ".jsonl":
            continue
        for number, line in enumerate(Path(file).read_text(errors="replace").splitlines(), 1):
            try:
                json.loads(line or "{}")
            except ValueError as error:
                return f"{file}, line {number:,} is no JSON: {error}"
    return None
