"""Prepare a dataset for training: read, tokenize and truncate each row in one batched map, which `datasets` caches.

column_layouts.py finds out which columns hold the prompt and the responses (the layout). formats.py reads rows,
tokenize.py and truncate.py convert rows to tokens, and notes.py rejects or drops unusable rows.

Prepared rows have these columns:

    prompt_ids        token ids of the prompt
    response_ids      K lists of token ids: the chosen response of a pair, then the rejected one; the gold response of a
                      triple is the last
    scored_masks      K lists of 0 / 1, one entry for each response token: 1 if the token's log-prob counts
    row               the index of the row in the given dataset
    pairs             for pairs and triples: [[0, 1]], the indices of the chosen and the rejected response
    golds             for triples: [2], the index of the gold response
    labels            for unpaired rows: a list with one boolean, True if the response is desirable
    quantiles         for scored responses: a list with one number, the quantile of the response
    ranks, scores     for lists: K numbers each; `scores` is empty if the dataset has only ranks
    token_weights     for tokenized pairs with weights: K lists of numbers, one number for each response token
    weights, ...      the optional columns (`ExampleKind.optional_columns`): a list with one number for each example
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_prefopt.config_checks import BAD_ROWS, TEXT_AS, TRUNCATION_MODES, check_choice, check_template_kwargs
from hf_prefopt.data.beginnings import find_beginning
from hf_prefopt.data.codes import check_codes, describe_codes
from hf_prefopt.data.column_layouts import FoundLayout, find_layout
from hf_prefopt.data.columns import (
    as_shown,
    check_mapped,
    choose_columns,
    class_names,
    column_names,
    describe_columns,
    first_rows,
    sample_of,
    undecoded,
    without_empty,
)
from hf_prefopt.data.context import reject_unread_context
from hf_prefopt.data.formats import RowFormat, optional_columns
from hf_prefopt.data.named import reject_names_of_responses, reject_other_verdict
from hf_prefopt.data.notes import NOTES, keep_usable_rows, note_row
from hf_prefopt.data.roles import AROUND
from hf_prefopt.data.rows import BadRow, CanonicalRow, as_number, reject_texts_without_prompt
from hf_prefopt.data.settings import check_settings, settings_of, write_settings
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds, tokenize_rows
from hf_prefopt.data.truncate import Cuts, truncate_row
from hf_prefopt.data.turn_tokens import TurnTokens
from hf_prefopt.data.unpaired import unpair as unpair_rows
from hf_prefopt.data.unrendered import describe_template
from hf_prefopt.kinds import PAIRS, UNPAIRED, ExampleKind, kind_of_columns

logger = logging.getLogger(__name__)

# Part of the key under which `datasets` caches prepared rows. The key contains only the names of the functions of this
# module, not their code, so increase this number when their results change.
_CACHE_VERSION = 12
_EXAMPLE_FEATURES = {
    "pairs": List(List(Value("int32"))),
    "golds": List(Value("int32")),
    "labels": List(Value("bool")),
    "quantiles": List(Value("float64")),
    "ranks": List(Value("float64")),
    "scores": List(Value("float64")),
    "token_weights": List(List(Value("float32"))),
}


def prepared_features(example_columns: Iterable[str], optional: Iterable[str] = ()) -> Features:
    """Return the features of prepared rows with these example columns and optional columns."""
    return Features(
        {
            "prompt_ids": List(Value("int32")),
            "response_ids": List(List(Value("int32"))),
            "scored_masks": List(List(Value("int8"))),
            **{column: _EXAMPLE_FEATURES[column] for column in example_columns},
            **{column: List(Value("float64")) for column in optional},
            "row": Value("int64"),
        }
    )


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset, and how it was prepared from the given rows.

    Attributes:
        dataset: The prepared rows.
        raw: The given rows, after columns were renamed and removed.
        layout: How the columns of the raw rows are read; None if the given rows were already prepared.
        noted: Each given row with its notes (`notes.NOTES`); None for a stream and for rows already prepared.
        is_unpaired: Whether pairs were split into two rows: the pair in row n became the rows 2n and 2n + 1.
        options: The options for tokenizing and truncating the rows.
    """

    dataset: Dataset | IterableDataset
    raw: Dataset | IterableDataset
    layout: FoundLayout | None = None
    noted: Dataset | None = None
    is_unpaired: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def uncut(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return these rows of the given dataset, tokenized but not truncated. Requires `noted`."""
        assert self.layout is not None and isinstance(self.raw, Dataset)
        options = {**_read_as(self.layout, self.raw), **self.options, "max_length": None}
        batch = self.raw.select(rows)[:]
        columns = _prepare_batch(batch, [*rows], **options, needs_prompt=False, cache_version=_CACHE_VERSION)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def prepare_dataset(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Dataset | IterableDataset:
    """Return the prepared rows of a dataset. The arguments are those of `prepare`."""
    return prepare(dataset, tokenizer, **settings).dataset


def prepare(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_bad_rows: str = "error",
    num_proc: int | None = None,
    name: str = "train",
    unpair: bool = False,
    kind: ExampleKind | None = None,
    column_mapping: Mapping[str, str] | None = None,
    remove_columns: Sequence[str] | None = None,
    text_as: str = "text",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    needs_prompt: bool = False,
) -> Prepared:
    """Tokenize preference data. Its columns may have any of the layouts in `layout_table.LAYOUTS`.

    A dataset that was prepared with the same settings is returned unchanged. If no column mapping can describe the
    columns, convert the rows with `Dataset.map` first.

    Args:
        dataset: The rows. Rows of a stream are prepared when they are read, so errors and warnings appear then.
        tokenizer: The model's tokenizer, with its chat template if the rows contain messages.
        max_length: Maximum number of tokens of prompt + response; None disables truncation.
        truncation_mode: What is removed from a row that is too long. "keep_start" removes the end of the response, but
            keeps its EOS. It drops the row if the prompt leaves no tokens for a response. "keep_end" removes the start
            of the prompt, by the same amount for all responses of the row, but keeps BOS and system prompt. It removes
            whole turns before it cuts within the last user message, and drops the row if no user text would remain.
            It truncates a response only if the response is too long by itself.
        on_bad_rows: "error" raises an error that says how many rows are unusable; "drop" drops these rows.
        num_proc: Number of processes for `Dataset.map`.
        name: Name of the dataset in messages.
        unpair: Whether to convert each pair to two unpaired rows.
        kind: Kind of examples to prepare if the columns match several layouts; None selects the first of them.
        column_mapping, remove_columns, text_as, chat_template_kwargs: See `PreferenceConfig`.
        needs_prompt: Whether the losses depend on where the prompt ends. If True, texts without a prompt column raise
            an error, because the beginning that they share may be longer than the prompt by chance. Transcripts are
            allowed, because they mark where the prompt ends. `unpair=True` implies `needs_prompt=True`.

    Returns:
        The prepared rows, with the columns listed in the docstring of this module, and how they were prepared.

    Raises:
        ValueError: If an argument is invalid, the columns have no known layout, there are messages but no chat
            template, most texts seem to lack a prompt, or the dataset was prepared with other settings. With
            on_bad_rows="error", also if a row is unusable, for example because a column with context is not read.
    """
    _check_arguments(max_length, truncation_mode, on_bad_rows, text_as, chat_template_kwargs)
    template_kwargs = dict(chat_template_kwargs or {})
    settings = settings_of(tokenizer, max_length, truncation_mode, template_kwargs)
    with _naming(name):
        dataset = as_shown(dataset)
    if _is_prepared(column_names(dataset)):
        with _naming(name):
            dataset = check_settings(dataset, settings, len(tokenizer))
        done = Prepared(dataset, dataset)
    else:
        with _naming(name):
            dataset = undecoded(choose_columns(dataset, column_mapping, remove_columns))
            dataset = without_empty(dataset, AROUND)
            asked = PAIRS if unpair else kind
            layout, lines = _find_layout(dataset, tokenizer, asked, tuple(column_mapping or ()), text_as)
            lines += describe_template(_first_read(dataset, layout), tokenizer, template_kwargs)
            lines += describe_codes(first_rows(dataset), layout.columns)
            dataset = check_codes(dataset, layout.columns)
        if lines:
            logger.warning("%s: %s", name, "; ".join(lines))
        options: dict[str, Any] = {"tokenizer": tokenizer, "template_kwargs": template_kwargs}
        options |= {"max_length": max_length, "truncation_mode": truncation_mode}
        noted = _map_rows(dataset, layout, {**options, "needs_prompt": needs_prompt or unpair}, num_proc, name)
        kept = keep_usable_rows(noted, name, max_length, on_bad_rows)
        write_settings(kept, settings)
        done = Prepared(kept, dataset, layout, noted if isinstance(noted, Dataset) else None, options=options)
    return _unpaired(done) if unpair and kind_of_columns(column_names(done.dataset)) is PAIRS else done


def _check_arguments(
    max_length: int | None,
    truncation_mode: str,
    on_bad_rows: str,
    text_as: str,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> None:
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    check_choice("on_bad_rows", on_bad_rows, BAD_ROWS)
    check_choice("text_as", text_as, TEXT_AS)
    check_template_kwargs("chat_template_kwargs", chat_template_kwargs)
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(f"max_length={max_length!r} must be at least 2, or None to disable truncation")


def _is_prepared(columns: Sequence[str]) -> bool:
    kind = kind_of_columns(columns)
    return kind is not None and set(prepared_features(kind.columns)).issubset(columns)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefix the message of a `ValueError` with the name of the dataset."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _unpaired(done: Prepared) -> Prepared:
    """Convert each prepared pair to two unpaired rows."""
    present = [name for name in UNPAIRED.optional_columns if name in column_names(done.dataset)]
    unpaired = unpair_rows(done.dataset, prepared_features(UNPAIRED.columns, present))
    return replace(done, dataset=unpaired, is_unpaired=True)


def _find_layout(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    kind: ExampleKind | None,
    mapped: Sequence[str],
    text_as: str,
) -> tuple[FoundLayout, list[str]]:
    """Return the layout of the rows, and the lines to report about it."""
    sample = sample_of(first_rows(dataset), column_names(dataset))
    layout = find_layout(sample, kind, mapped, text_as)
    check_mapped(layout, mapped, sample)
    return layout, describe_columns(layout, sample, tokenizer)


def _first_read(dataset: Dataset | IterableDataset, layout: FoundLayout) -> list[CanonicalRow]:
    """Return the first rows as canonical rows, without the rows that cannot be read."""
    read = [_read(layout, row) for row in first_rows(dataset)[:8]]
    return [row for row in read if isinstance(row, CanonicalRow)]


def _map_rows(
    dataset: Dataset | IterableDataset, layout: FoundLayout, options: dict[str, Any], num_proc: int | None, name: str
) -> Dataset | IterableDataset:
    """Return the prepared rows with the notes of `notes.NOTES`."""
    columns = column_names(dataset)
    row_format = layout.format
    prepared = prepared_features(row_format.example_columns, optional_columns(row_format.kind, columns))
    features = Features({**prepared, **NOTES})
    if isinstance(dataset, Dataset) and not len(dataset):
        return Dataset.from_dict({column: [] for column in features}, features=features)
    arguments = {
        "batched": True,
        "with_indices": True,
        "remove_columns": columns,
        "features": features,
        "fn_kwargs": {**_read_as(layout, dataset), "cache_version": _CACHE_VERSION, **options},
    }
    if isinstance(dataset, IterableDataset):
        # With small batches, the first rows are available before 1,000 rows (the default batch size) are read.
        return dataset.map(_prepare_batch, batch_size=64, **arguments)
    # Batches of 1,000 conversations need 200 MiB more for the tokenizer's encodings and are no faster.
    return dataset.map(_prepare_batch, batch_size=128, num_proc=num_proc, desc=f"Tokenizing {name}", **arguments)


def _read_as(layout: FoundLayout, dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Return the arguments of `_prepare_batch` that describe how to read rows, in a form that `datasets` can hash."""
    return {"layout": (layout.name, layout.columns, layout.text_as), "class_names": class_names(dataset)}


def _prepare_batch(
    columns: Mapping[str, list[Any]],
    indices: list[int],
    layout: tuple[str, dict[str, str], str],
    class_names: Mapping[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str,
    template_kwargs: Mapping[str, Any],
    needs_prompt: bool,
    cache_version: int,
) -> dict[str, list[Any]]:
    """Return the prepared columns and the notes for one batch of the map, with one output row per input row."""
    found, kinds = FoundLayout(*layout), TokenKinds(tokenizer)
    row_format = found.format
    columns = {name: _named(values, class_names.get(name)) for name, values in columns.items()}
    given = [{name: values[at] for name, values in columns.items()} for at in range(len(indices))]
    turns = TurnTokens(tokenizer, template_kwargs)
    rows = [turns.checked(_read(found, row, needs_prompt)) for row in given]
    read = [row for row in rows if isinstance(row, CanonicalRow)]
    tokenized = iter(tokenize_rows(read, tokenizer, kinds, template_kwargs))
    optional = optional_columns(row_format.kind, columns)
    # A value that is not a number becomes NaN, which is an error only if a loss uses the column.
    out: dict[str, list[Any]] = {name: [[as_number(value)] for value in columns[raw]] for name, raw in optional.items()}
    out |= {column: [] for column in (*prepared_features(row_format.example_columns), *NOTES)}
    out |= {"_against": _scores_against(out, rows)}
    for index, row in zip(indices, rows, strict=True):
        done = row if isinstance(row, BadRow) else next(tokenized)
        kept, cuts = None, Cuts()
        if isinstance(done, TokenizedRow):
            begin = partial(find_beginning, cast(CanonicalRow, row), done.prompt_ids, tokenizer, template_kwargs)
            kept, cuts = truncate_row(done, max_length, truncation_mode, kinds, begin)
        problem = done if isinstance(done, BadRow) else None
        is_open = isinstance(done, TokenizedRow) and not all(map(kinds.is_closed, done.response_ids, done.scored_masks))
        change = done.change if isinstance(done, TokenizedRow) else None
        notes = note_row(kept, cuts, problem, row if isinstance(row, CanonicalRow) else None, is_open, change)
        for column, value in {**_prepared_columns(kept, row_format), **notes, "row": index}.items():
            out[column].append(value)
    return out


def _scores_against(columns: Mapping[str, list[Any]], rows: Sequence[Any]) -> list[bool]:
    """Return, for each row, whether its chosen response has the lower score; False for bad rows and missing scores."""
    unknown = [[math.nan]] * len(rows)
    scores = (columns.get(name, unknown) for name in ("chosen_scores", "rejected_scores"))
    is_read = (isinstance(row, CanonicalRow) for row in rows)
    against = [isinstance(row, CanonicalRow) and row.against for row in rows]
    compared = zip(*scores, is_read, against, strict=True)
    return [is_told or (one[0] < other[0] and is_one) for one, other, is_one, is_told in compared]


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """Return the values, with class indices replaced by the names of the classes."""
    return values if names is None else [None if value is None else names[value] for value in values]


def _read(layout: FoundLayout, row: Mapping[str, Any], needs_prompt: bool = False) -> CanonicalRow | BadRow:
    """Return the canonical row, or the reason why the row cannot be used."""
    try:
        read = layout.read(row)
        unread = layout.unread(row, read)
        reject_names_of_responses(unread, read, layout.columns)
        reject_other_verdict(unread, layout.columns)
        reject_unread_context(unread, read)
        reject_texts_without_prompt(read, needs_prompt)
        return read
    except BadRow as error:
        return error


def _prepared_columns(row: TokenizedRow | None, row_format: RowFormat) -> dict[str, Any]:
    """Return the columns of a prepared row; they are empty for a row that will be dropped."""
    row = row or TokenizedRow([], [], [], {})
    examples = {column: row.example_columns.get(column, []) for column in row_format.example_columns}
    tokens = {"prompt_ids": row.prompt_ids, "response_ids": row.response_ids, "scored_masks": row.scored_masks}
    return tokens | examples
