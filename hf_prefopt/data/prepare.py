"""Prepare a data set for training: read each row, tokenize it and cut it, in one batched map that `datasets` caches.

column_layouts.py finds out how the columns are to be read, formats.py reads rows, tokenize.py and truncate.py turn them
into tokens, notes.py rejects or drops those that cannot be used.

Prepared rows have these columns:

    prompt_ids        token ids of the prompt
    response_ids      K lists of token ids: of a pair chosen, then rejected; a triple's gold response is the last
    scored_masks      K lists of 0 / 1, one for each response token: 1 if its log-prob counts
    row               the number of the row in the data set given
    pairs             [[0, 1]], of pairs and triples; triples also have `golds`, [2]
    labels            [whether the response is desirable], of unpaired rows
    quantiles         [the response's quantile], of scored responses
    ranks, scores     K numbers each, of lists; `scores` is empty if there were only ranks
    token_weights     K lists of numbers, only of tokenized pairs with weights
    weights, ...      the optional columns (`ExampleKind.optional_columns`), a number for each example
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
from hf_prefopt.data.named import reject_names_of_responses
from hf_prefopt.data.notes import NOTES, keep_usable_rows, note_row
from hf_prefopt.data.roles import AROUND
from hf_prefopt.data.rows import BadRow, CanonicalRow, as_number, reject_texts_without_prompt
from hf_prefopt.data.settings import check_settings, settings_of, write_settings
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds, tokenize_rows
from hf_prefopt.data.truncate import Cuts, truncate_row
from hf_prefopt.data.unpaired import unpair as unpair_rows
from hf_prefopt.data.unrendered import describe_template
from hf_prefopt.kinds import PAIRS, UNPAIRED, ExampleKind, kind_of_columns

logger = logging.getLogger(__name__)

# Part of the cache's key, which sees this module's functions by name only: raise it when what they return changes.
_CACHE_VERSION = 9
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
    """The columns of prepared rows with these example columns and optional columns."""
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
    """A prepared data set, and how it was made of the rows given.

    Attributes:
        dataset: the prepared rows.
        raw: the rows given, under the names of columns that they were read by.
        layout: how they were read; None for rows that were prepared before.
        noted: every row given with what happened to it (`notes.NOTES`); None for a stream and for prepared rows.
        is_unpaired: whether the pair of row n became the rows 2n and 2n + 1.
        options: how the rows were tokenized and cut.
    """

    dataset: Dataset | IterableDataset
    raw: Dataset | IterableDataset
    layout: FoundLayout | None = None
    noted: Dataset | None = None
    is_unpaired: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def uncut(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """These rows of the data set given, tokenized and not cut; only where there are notes."""
        assert self.layout is not None and isinstance(self.raw, Dataset)
        options = {**_read_as(self.layout, self.raw), **self.options, "max_length": None}
        batch = self.raw.select(rows)[:]
        columns = _prepare_batch(batch, [*rows], **options, needs_prompt=False, cache_version=_CACHE_VERSION)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def prepare_dataset(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Dataset | IterableDataset:
    """The rows that `prepare` makes of a data set, with the same arguments."""
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
    """Tokenize preference data in any of the layouts of `layout_table.LAYOUTS`.

    A data set that was prepared with the same settings is returned unchanged. What no mapping of columns can say, a
    `Dataset.map` before can.

    Args:
        dataset: the rows. A stream's rows are prepared when they are reached, and so errors and warnings come then.
        tokenizer: the model's tokenizer, with its chat template if the rows hold messages.
        max_length: the maximum number of tokens of prompt + response; None cuts nothing.
        truncation_mode: "keep_start" cuts the end of a response that is too long, but keeps its EOS, and drops a row
            whose prompt leaves no room for a response. "keep_end" cuts the start of the prompt, equally for all
            responses of a row, and a response only if it is too long by itself. BOS and system prompt stay, whole
            turns go before a part of the user's last message does, and a row of which that leaves nothing is dropped.
        on_bad_rows: "error" raises an error that counts the unusable rows, "drop" drops them.
        num_proc: processes of `Dataset.map`.
        name: what messages call the data set.
        unpair: make two unpaired rows of every pair.
        kind: the kind of examples to prepare, if the columns match several layouts; None prepares the first match.
        column_mapping, remove_columns, text_as, chat_template_kwargs: see `PreferenceConfig`.
        needs_prompt: whether it matters to the losses where a prompt ends. Texts without a column for it, which may
            begin with the same words by chance, are then errors, unless they are transcripts. `unpair` needs it, too.

    Returns:
        The prepared rows, whose columns the module's docstring lists, and how they were made.

    Raises:
        ValueError: an invalid argument; columns of no known layout; messages without a chat template; texts most of
            which seem to lack a prompt; a data set that was prepared with other settings; with on_bad_rows="error",
            unusable rows, such as those with unread context.
    """
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    check_choice("on_bad_rows", on_bad_rows, BAD_ROWS)
    check_choice("text_as", text_as, TEXT_AS)
    check_template_kwargs("chat_template_kwargs", chat_template_kwargs)
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(f"max_length={max_length!r}: give at least 2 tokens, or None to cut nothing")
    template_kwargs = dict(chat_template_kwargs or {})
    settings = settings_of(tokenizer, max_length, truncation_mode, template_kwargs)
    if _is_prepared(column_names(dataset)):
        with _naming(name):
            dataset = check_settings(dataset, settings, len(tokenizer))
        done = Prepared(dataset, dataset)
    else:
        with _naming(name):
            dataset = undecoded(choose_columns(dataset, column_mapping, remove_columns))
            dataset = without_empty(dataset, AROUND)
            layout, lines = _find_layout(
                dataset, tokenizer, PAIRS if unpair else kind, tuple(column_mapping or ()), text_as
            )
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


def _is_prepared(columns: Sequence[str]) -> bool:
    kind = kind_of_columns(columns)
    return kind is not None and set(prepared_features(kind.columns)).issubset(columns)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors begin with the name of the data set."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _unpaired(done: Prepared) -> Prepared:
    """Two unpaired rows of each prepared pair."""
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
    """How the rows are to be read, and what to say where that is not plain."""
    sample = sample_of(first_rows(dataset), column_names(dataset))
    layout = find_layout(sample, kind, mapped, text_as)
    return layout, describe_columns(layout, sample, tokenizer)


def _first_read(dataset: Dataset | IterableDataset, layout: FoundLayout) -> list[CanonicalRow]:
    """The first rows that can be read."""
    read = [_read(layout, row) for row in first_rows(dataset)[:8]]
    return [row for row in read if isinstance(row, CanonicalRow)]


def _map_rows(
    dataset: Dataset | IterableDataset, layout: FoundLayout, options: dict[str, Any], num_proc: int | None, name: str
) -> Dataset | IterableDataset:
    """The rows prepared, with the notes of `notes.NOTES`."""
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
        # Small batches, so that the first rows need not wait for a thousand others.
        return dataset.map(_prepare_batch, batch_size=64, **arguments)
    # The tokenizer's encodings of a thousand conversations take 200 MiB more, and no less time.
    return dataset.map(_prepare_batch, batch_size=128, num_proc=num_proc, desc=f"Tokenizing {name}", **arguments)


def _read_as(layout: FoundLayout, dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """The arguments that tell `_prepare_batch` how to read rows, as `datasets` hashes them."""
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
    """The prepared columns and the notes of one batch of the map, with a row for each row given."""
    found, kinds = FoundLayout(*layout), TokenKinds(tokenizer)
    row_format = found.format
    columns = {name: _named(values, class_names.get(name)) for name, values in columns.items()}
    given = [{name: values[at] for name, values in columns.items()} for at in range(len(indices))]
    rows = [_read(found, row, needs_prompt) for row in given]
    read = [row for row in rows if isinstance(row, CanonicalRow)]
    tokenized = iter(tokenize_rows(read, tokenizer, kinds, template_kwargs))
    optional = optional_columns(row_format.kind, columns)
    # What is no number is NaN, which is an error only if a loss uses the column.
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
    """For each row that is read, whether its chosen response has the lower score. NaN is lower than nothing."""
    unknown = [[math.nan]] * len(rows)
    scores = (columns.get(name, unknown) for name in ("chosen_scores", "rejected_scores"))
    is_read = (isinstance(row, CanonicalRow) for row in rows)
    against = [isinstance(row, CanonicalRow) and row.against for row in rows]
    compared = zip(*scores, is_read, against, strict=True)
    return [is_told or (one[0] < other[0] and is_one) for one, other, is_one, is_told in compared]


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """The values, or the names of the classes whose numbers they are."""
    return values if names is None else [None if value is None else names[value] for value in values]


def _read(layout: FoundLayout, row: Mapping[str, Any], needs_prompt: bool = False) -> CanonicalRow | BadRow:
    """The canonical row, or the reason why the row cannot be used."""
    try:
        read = layout.read(row)
        unread = layout.unread(row, read)
        reject_names_of_responses(unread, read, layout.columns)
        reject_unread_context(unread, read)
        reject_texts_without_prompt(read, needs_prompt)
        return read
    except BadRow as error:
        return error


def _prepared_columns(row: TokenizedRow | None, row_format: RowFormat) -> dict[str, Any]:
    """The columns of a prepared row, empty for a row that will be dropped."""
    row = row or TokenizedRow([], [], [], {})
    examples = {column: row.example_columns.get(column, []) for column in row_format.example_columns}
    tokens = {"prompt_ids": row.prompt_ids, "response_ids": row.response_ids, "scored_masks": row.scored_masks}
    return tokens | examples
