"""After a dataset could not be loaded, find the file that is unreadable, the line in it, and the reason.

The loaders of `datasets` report an error, but often do not name the file. Therefore, this module reads the files again.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

Types = dict[str, str]


def find_fault(files: Sequence[str]) -> str | None:
    """Return a message about the first unreadable file. Return None if no problem is found.

    If all files are readable, the message is about the first file whose columns, or their types, differ from those of
    the first file.

    Args:
        files: Local paths. The suffix determines the kind of file. Files may be compressed.
    """
    columns: dict[str, Types] = {}
    for file in files:
        try:
            columns[file] = _READERS[kind_of(file)](_content(file))
        except _Fault as fault:
            return f"{file}{fault}"
    return _differing(columns)


class _Fault(Exception):
    """A problem with a file. Its message is appended to the name of the file."""


COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def kind_of(file: str) -> str:
    """Return the suffix of a file in lower case, ignoring a suffix of compression: ".jsonl" for `a.jsonl.gz`.

    Return "" if the file has no other suffix.
    """
    suffixes = [suffix for suffix in Path(file).suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1].lower() if suffixes else ""


def _content(file: str) -> bytes:
    try:
        with fsspec.open(file, "rb", compression="infer") as opened:
            content = opened.read()
    except Exception as error:  # each kind of compression raises its own errors
        raise _Fault(f" cannot be read: it is incomplete, or not a {Path(file).suffix} file: {error}") from error
    if not content.strip():
        raise _Fault(" is empty")
    return content


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    """Yield the number (counted from 1) and the text of each line that is not blank."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _Fault(f", line {number:,} is not UTF-8: {error}") from error
        if text.strip():
            yield number, text


def _read_json(content: bytes) -> Types:
    """Return the type of each column in a JSON file, which holds a list of rows or one row per line."""
    lines = list(_lines(content))
    if lines[0][1].lstrip().startswith("["):
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise _no_json(error, error.lineno) from error
        if not rows:
            raise _Fault(" has no rows")
        return _types([(f"row {number:,}", row) for number, row in enumerate(rows)])
    found = []
    for number, line in lines:
        try:
            found.append((f"line {number:,}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise _no_json(error, number) from error
    return _types(found)


def _no_json(error: json.JSONDecodeError, line: int) -> _Fault:
    reason = error.msg.replace("Expecting", "expected").replace("delimiter", "here")
    return _Fault(f", line {line:,}, column {error.colno:,}: invalid JSON: {reason[0].lower()}{reason[1:]}")


def _types(rows: Sequence[tuple[str, Any]]) -> Types:
    """Check that each column has the same type in all rows, and return the name of this type.

    Integers and floats count as the same type. A value that is None fits any type.

    Args:
        rows: Pairs of a row's place in the file, for errors, and the row.
    """
    types: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise _Fault(f", {where} is of type {type(row).__name__}, not a row: make each row a dict")
        for column, value in row.items():
            kind = _NUMBERS.get(type(value), type(value))
            before, there = types.setdefault(column, (kind.__name__, where))
            if value is not None and before == "NoneType":
                types[column] = (kind.__name__, where)
            elif value is not None and before != kind.__name__:
                raise _Fault(f", {where}: `{column}` is of type {kind.__name__}, and of type {before} in {there}")
    return {column: kind for column, (kind, _) in types.items()}


_NUMBERS: dict[type, type] = {int: float}


def _read_table(separator: str) -> Callable[[bytes], Types]:
    def read(content: bytes) -> Types:
        list(_lines(content))
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=separator)
        header, has_rows = next(rows), False
        for row in rows:
            has_rows = True
            if len(row) > len(header):
                raise _Fault(f", line {rows.line_num:,} has {len(row)} fields, and the header has {len(header)}")
        if not has_rows:
            raise _Fault(" has a header but no rows")
        return dict.fromkeys(header, "")

    return read


def _read_parquet(content: bytes) -> Types:
    try:
        return _of_schema(pq.read_schema(io.BytesIO(content)))
    except (pa.ArrowInvalid, OSError) as error:
        raise _Fault(f" is not a Parquet file, or is incomplete: {error}") from error


def _read_arrow(content: bytes) -> Types:
    for opened in (pa.ipc.open_stream, pa.ipc.open_file):
        try:
            return _of_schema(opened(content).schema)
        except (pa.ArrowInvalid, OSError):
            continue
    raise _Fault(" is not an Arrow file, or is incomplete")


def _of_schema(schema: pa.Schema) -> Types:
    return {field.name: str(field.type) for field in schema}


_READERS: dict[str, Callable[[bytes], Types]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _differing(columns: dict[str, Types]) -> str | None:
    """Describe how a file differs from the first file, in its columns or in the type of a column.

    Only the first difference is described. Return None if there is none.

    Args:
        columns: The columns of each file, with their types, keyed by file.
    """
    (first, expected), *others = columns.items()
    for file, types in others:
        if types.keys() != expected.keys():
            there = f"{file} has the columns {', '.join(types)}, and {first} has {', '.join(expected)}"
            return f"{there}: load them separately"
        for column, kind in types.items():
            if kind != expected[column] and "NoneType" not in (kind, expected[column]):
                return f"{file}: `{column}` is of type {kind}, and of type {expected[column]} in {first}"
    return None
