"""`inspect_dataset`: show how training would read a dataset, before a model is loaded."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.column_layouts import FoundLayout, fitting_kinds
from hf_prefopt.data.columns import (
    choose_columns,
    column_names,
    first_rows,
    sample_of,
    undecoded,
    unused_columns,
)
from hf_prefopt.data.context import is_about_the_row
from hf_prefopt.data.formats import optional_columns
from hf_prefopt.data.notes import count_notes, describe_bad_rows
from hf_prefopt.data.prepare import Prepared, prepare
from hf_prefopt.data.rows import BadRow
from hf_prefopt.data.sources import as_dataset, check_rows
from hf_prefopt.data.summary import summarize
from hf_prefopt.data.tokenize import TokenKinds
from hf_prefopt.kinds import TRIPLES, ExampleKind, kind_of_columns
from hf_prefopt.reporting.inspected import Inspection
from hf_prefopt.reporting.shown_rows import ShownRow, show_row
from hf_prefopt.training.preference_data import PreferenceData, settings_of_rows
from hf_prefopt.training.settings import own_names

# Lengths in tokens. The share of rows that are not longer is reported for each of them.
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def inspect_dataset(
    dataset: Any,
    processing_class: PreTrainedTokenizerBase,
    *,
    rows: int = 3,
    stream_rows: int = 1000,
    name: str = "train",
    loss_type: str | list[str] | None = None,
    **settings: Any,
) -> Inspection:
    """Read a dataset as training would: find its layout and columns, count its rows, and show some of them.

    Unusable rows are counted and do not raise an error. Problems that would stop training are in `errors`.

    Example:
        ```python
        found = inspect_dataset(rows, AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"), loss_type="dpo")
        print(found.layout, found.columns, found.unused, found.summary.longer_accuracy)
        ```

    Args:
        dataset: Any dataset that `PreferenceTrainer` accepts as `train_dataset`. All of its rows are tokenized. If it
            is a stream, only the first `stream_rows` rows are read.
        processing_class: The tokenizer.
        rows: Number of rows to show.
        stream_rows: Number of rows to read from a stream.
        name: Name of the dataset in messages.
        loss_type: One or more losses for which the rows are checked. None: the rows are not checked for any loss.
        settings: Other fields of `PreferenceConfig`, such as `max_length`, `column_mapping` or `text_as`.

    Raises:
        ValueError: If the columns cannot be read, no row can be used, or a setting is invalid.
    """
    losses: dict[str, Any] = {} if loss_type is None else {"loss_type": loss_type}
    args = PreferenceConfig("unused", report_to="none", **losses, **settings)
    on_bad_rows, args.on_bad_rows = args.on_bad_rows, "drop"
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    dataset = as_dataset(dataset, "train")  # selects the training split of several splits
    is_stream = isinstance(dataset, IterableDataset)
    given = _beginning(dataset, stream_rows) if is_stream else dataset
    check_rows(given, name)
    settled = settings_of_rows(args)
    kinds: tuple[ExampleKind, ...] = ()
    errors: list[str] = []
    with _said(name) as remarks:
        if losses:
            made, errors = _checked(PreferenceData(args, tokenizer), given, name)
        else:
            kinds = _kinds(given, settled)
            # Triples can also be read as pairs. Triples are preferred, so that all three responses are shown.
            made = prepare(given, tokenizer, **settled, kind=TRIPLES if TRIPLES in kinds else None, name=name)
    problems = made.noted["_problem"][:] if made.noted is not None else []
    if on_bad_rows == "error" and any(problems):
        errors.insert(0, describe_bad_rows(name, problems))
    return Inspection(
        name=name,
        **_columns(made, cast("Mapping[str, str]", args.column_mapping or {}), column_names(given)),
        kinds=tuple(kind.name for kind in kinds),
        is_beginning=is_stream,
        settings=_settings(args, {**losses, **settings}),
        summary=summarize(made.dataset),
        counts=count_notes(made.noted) if made.noted is not None else {},
        within=_within(made.noted),
        remarks=tuple(remarks),
        errors=tuple(error.removeprefix(f"{name}: ") for error in errors),
        rows=tuple(_shown_rows(made, rows, TokenKinds(tokenizer))),
    )


def _checked(data: PreferenceData, given: Dataset, name: str) -> tuple[Prepared, list[str]]:
    """Return the prepared rows, and a list with the error that the losses would raise for them, or an empty list."""
    made = data.read(given, name)
    try:
        data.checked(made.dataset, name)
    except ValueError as error:
        return made, [str(error)]
    return made, []


def _kinds(given: Dataset, settings: Mapping[str, Any]) -> tuple[ExampleKind, ...]:
    """Return the kinds of examples, such as pairs, as which the rows can be read; empty if no columns can be read."""
    try:
        rows = undecoded(choose_columns(given, settings["column_mapping"], settings["remove_columns"]))
    except ValueError:
        return ()
    prepared = kind_of_columns(column_names(rows))
    sample = sample_of(first_rows(rows), column_names(rows))
    return (prepared,) if prepared else fitting_kinds(sample, tuple(settings["column_mapping"] or ()))


def _settings(args: PreferenceConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for truncation, and the settings that the user passed, keyed by name."""
    named = {"max_length": args.max_length, "truncation_mode": args.truncation_mode, **given}
    return {name: value for name, value in named.items() if name in own_names()}


def _beginning(stream: IterableDataset, count: int) -> Dataset:
    """Return the first `count` rows of a stream as a dataset."""
    stream = undecoded(stream)
    rows = list(islice(iter(stream), count))
    return Dataset.from_list(rows, features=stream.features)


@contextmanager
def _said(name: str) -> Iterator[list[str]]:
    """Return a context manager that collects the log messages about the data.

    Messages about counts and columns are left out, because `Inspection` has them as separate attributes.
    """
    remarks: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("hf_prefopt.data")
    handler.emit = lambda record: remarks.extend(_remark(record, name))  # type: ignore[method-assign]
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield remarks
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def _remark(record: logging.LogRecord, name: str) -> list[str]:
    if record.name == "hf_prefopt.data.notes":
        return []
    parts = record.getMessage().removeprefix(f"{name}: ").split("; ")
    remark = "; ".join(part for part in parts if not part.startswith(("read as ", "columns not used: ")))
    return [remark] * bool(remark)


def _columns(made: Prepared, mapping: Mapping[str, str], given: Sequence[str]) -> dict[str, Any]:
    """Return the attributes of `Inspection` about columns. The columns have their names in the user's dataset."""
    layout, columns = made.layout, column_names(made.raw)
    if layout is None:
        return {"layout": "prepared rows", "content": "tokens", "columns": {}, "numbers": {}, **_NOT_USED}
    unused = unused_columns(layout, columns)
    before = {new: column for new, column in mapping.items() if column in given}
    numbers = optional_columns(layout.format.kind, columns)
    return {
        "layout": layout.name,
        "content": _content(layout, made.raw),
        "columns": {part: before.get(column, column) for part, column in layout.columns.items()},
        "numbers": {name: before.get(column, column) for name, column in numbers.items()},
        "unused": tuple(column for column in unused if not is_about_the_row(column)),
        "about_the_row": tuple(column for column in unused if is_about_the_row(column)),
    }


_NOT_USED: Mapping[str, tuple[str, ...]] = {"unused": (), "about_the_row": ()}


def _content(layout: FoundLayout, rows: Any) -> str:
    """Return the content type of the first readable row: messages, text or tokens."""
    for row in islice(iter(rows), 100):
        try:
            return layout.read(row).content_type
        except BadRow:
            continue
    return "text"


def _within(noted: Dataset | None) -> dict[int, float]:
    """Return the share of rows that are not longer than a length, keyed by this length.

    The lengths are those of `_LENGTHS`, up to the first one with a share of 1.
    """
    if noted is None:
        return {}
    notes = noted.select_columns(["_longest", "_bad", "_tie"]).with_format("numpy")[:]
    lengths = notes["_longest"][~(notes["_bad"] | notes["_tie"])]
    shares = {length: float(np.mean(lengths <= length)) for length in _LENGTHS}
    enough = next((length for length, share in shares.items() if share == 1), _LENGTHS[-1])
    return {length: share for length, share in shares.items() if length <= enough}


def _shown_rows(made: Prepared, count: int, kinds: TokenKinds) -> Iterator[ShownRow]:
    """Yield the first `count` prepared rows.

    If none of them is truncated, the first truncated row of the dataset replaces the last of them.
    """
    places = list(range(min(count, len(made.dataset))))
    cut = _first_cut(made)
    if places and cut is not None and cut > places[-1]:
        places[-1] = cut
    prepared = made.dataset.select(places)
    numbers = [row // (1 + made.is_unpaired) for row in prepared["row"][:]]
    uncut: Sequence[Any] = made.uncut(numbers) if made.noted is not None else [None] * len(numbers)
    for row, whole in zip(prepared, uncut, strict=True):
        if made.is_unpaired and whole is not None:
            whole = {**whole, "response_ids": [whole["response_ids"][row["row"] % 2]]}
        yield show_row(row, kinds, whole)


def _first_cut(made: Prepared) -> int | None:
    """Return the index of the first truncated row among the prepared rows; None if no row is truncated."""
    if made.noted is None:
        return None
    notes = made.noted.select_columns(["row", "_responses_cut", "_prompt_cut"]).with_format("numpy")[:]
    cut = notes["row"][(notes["_responses_cut"] > 0) | notes["_prompt_cut"]]
    if not len(cut):
        return None
    rows = made.dataset.with_format("numpy")["row"][:] // (1 + made.is_unpaired)
    found = np.flatnonzero(np.isin(rows, cut))
    return int(found[0]) if len(found) else None
