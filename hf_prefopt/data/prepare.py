"""Prepare a data set for training: read each row, tokenize it and cut it, in one batched map that `datasets` caches.

formats.py reads rows, tokenize.py and truncate.py turn them into tokens, notes.py rejects or drops those that
cannot be used. Prepared rows have these columns:

    prompt_ids        token ids of the prompt
    response_ids      K lists of token ids: of a pair chosen, then rejected; a triple's gold response is the last
    scored_masks      K lists of 0 / 1, one for each response token: 1 if its log-prob counts
    row               the number of the row in the data set given
    pairs             [[0, 1]], of pairs and triples; triples also have `golds`, [2]
    labels            [whether the response is desirable], of unpaired rows
    ranks, scores     K numbers each, of lists; `scores` is empty if there were only ranks
    token_weights     K lists of numbers, only of tokenized pairs with weights
    weights, ...      the optional columns (`ExampleKind.optional_columns`), a number for each example
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_prefopt.config_checks import BAD_ROWS, TRUNCATION_MODES, check_choice
from hf_prefopt.data.context import reject_unread_context
from hf_prefopt.data.formats import FORMATS, RowFormat, find_format, number_or_nan, optional_columns
from hf_prefopt.data.notes import NOTES, keep_usable_rows, note_row
from hf_prefopt.data.rows import BadRow, CanonicalRow, probably_lacks_prompt, reject_texts_without_prompt
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds, tokenize_rows
from hf_prefopt.data.truncate import Cuts, truncate_row
from hf_prefopt.data.unpaired import unpair as unpair_rows
from hf_prefopt.kinds import PAIRS, UNPAIRED, ExampleKind, kind_of_columns

# Part of the cache's key, which sees this module's functions by name only: raise it when what they return changes.
_CACHE_VERSION = 4
_EXAMPLE_FEATURES = {
    "pairs": List(List(Value("int32"))),
    "golds": List(Value("int32")),
    "labels": List(Value("bool")),
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


def prepare_dataset(
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
) -> Dataset | IterableDataset:
    """Tokenize preference data in any of the formats of `formats.FORMATS`. A prepared data set is returned unchanged.

    Args:
        dataset: the rows. A stream's rows are prepared when they are reached, and so errors and warnings come then.
        tokenizer: the model's tokenizer, with its chat template if the rows hold messages.
        max_length: the maximum number of tokens of prompt + response; None cuts nothing.
        truncation_mode: "keep_start" cuts the end of a response that is too long, but keeps its EOS, and drops a row
            whose prompt leaves no room for a response. "keep_end" cuts the start of the prompt, equally for all
            responses of a row, and a response only if it is too long by itself.
        on_bad_rows: "error" raises an error that counts the unusable rows, "drop" drops them.
        num_proc: processes of `Dataset.map`.
        name: what messages call the data set.
        unpair: make two unpaired rows of every pair.
        kind: the kind of examples to prepare, if the columns match several formats; None prepares the first match.

    Returns:
        The prepared rows; the module's docstring lists their columns.

    Raises:
        ValueError: an invalid argument; columns of no known format; messages without a chat template; texts most of
            which seem to lack a prompt; with on_bad_rows="error", unusable rows, such as those with unread context.
    """
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    check_choice("on_bad_rows", on_bad_rows, BAD_ROWS)
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(f"max_length={max_length!r}: give at least 2 tokens, or None to cut nothing")
    columns = _column_names(dataset)
    prepared = kind_of_columns(columns)
    if prepared is not None and set(prepared_features(prepared.columns)).issubset(columns):
        kind = prepared
    else:
        try:
            row_format = find_format(columns, PAIRS if unpair else kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        kind = row_format.kind
        options = {"tokenizer": tokenizer, "max_length": max_length, "truncation_mode": truncation_mode}
        noted = _map_rows(dataset, row_format, options, num_proc, name)
        dataset = keep_usable_rows(noted, name, max_length, on_bad_rows)
    if not unpair or kind is not PAIRS:
        return dataset
    present = [name for name in UNPAIRED.optional_columns if name in _column_names(dataset)]
    return unpair_rows(dataset, prepared_features(UNPAIRED.columns, present))


def _column_names(dataset: Dataset | IterableDataset) -> list[str]:
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset), {}))  # a stream that does not know its columns


def _map_rows(
    dataset: Dataset | IterableDataset, row_format: RowFormat, options: dict[str, Any], num_proc: int | None, name: str
) -> Dataset | IterableDataset:
    """The rows prepared, with the notes of `notes.NOTES`."""
    for column, feature in (dataset.features or {}).items():
        # Images, video and audio stay as they are stored: they need not be decoded to be rejected.
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    columns = _column_names(dataset)
    prepared = prepared_features(row_format.example_columns, optional_columns(row_format.kind, columns))
    features = Features({**prepared, **NOTES})
    if isinstance(dataset, Dataset) and not len(dataset):
        return Dataset.from_dict({column: [] for column in features}, features=features)
    arguments = {
        "batched": True,
        "with_indices": True,
        "remove_columns": columns,
        "features": features,
        "fn_kwargs": {"format_name": row_format.name, "cache_version": _CACHE_VERSION, **options},
    }
    if isinstance(dataset, IterableDataset):
        # Small batches, so that the first rows need not wait for a thousand others.
        return dataset.map(_prepare_batch, batch_size=64, **arguments)
    return dataset.with_format(None).map(_prepare_batch, num_proc=num_proc, desc=f"Tokenizing {name}", **arguments)


def _prepare_batch(
    columns: Mapping[str, list[Any]],
    indices: list[int],
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str,
    cache_version: int,
) -> dict[str, list[Any]]:
    """The prepared columns and the notes of one batch of the map, with a row for each row given."""
    row_format = next(known for known in FORMATS if known.name == format_name)
    kinds = TokenKinds(tokenizer)
    rows = [_read(row_format, {name: values[at] for name, values in columns.items()}) for at in range(len(indices))]
    tokenized = iter(tokenize_rows([row for row in rows if isinstance(row, CanonicalRow)], tokenizer, kinds))
    optional = optional_columns(row_format.kind, columns)
    out = {name: [[number_or_nan(value)] for value in columns[raw]] for name, raw in optional.items()}
    out |= {column: [] for column in (*prepared_features(row_format.example_columns), *NOTES)}
    for index, row in zip(indices, rows, strict=True):
        done = row if isinstance(row, BadRow) else next(tokenized)
        if isinstance(done, BadRow):
            kept, cuts, problem = None, Cuts(), str(done)
        else:
            (kept, cuts), problem = truncate_row(done, max_length, truncation_mode, kinds), ""
        lacks_prompt = isinstance(row, CanonicalRow) and probably_lacks_prompt(row)
        prepared = _prepared_columns(kept, row_format) | note_row(kept, cuts, problem, lacks_prompt)
        for column, value in {**prepared, "row": index}.items():
            out[column].append(value)
    return out


def _read(row_format: RowFormat, row: Mapping[str, Any]) -> CanonicalRow | BadRow:
    """The canonical row, or the reason why the row cannot be used."""
    try:
        read = row_format.read(row)
        reject_unread_context(row, row_format.columns, read)
        reject_texts_without_prompt(read)
        return read
    except BadRow as error:
        return error


def _prepared_columns(row: TokenizedRow | None, row_format: RowFormat) -> dict[str, Any]:
    """The columns of a prepared row, empty for a row that will be dropped."""
    row = row or TokenizedRow([], [], [], {})
    examples = {column: row.example_columns.get(column, []) for column in row_format.example_columns}
    tokens = {"prompt_ids": row.prompt_ids, "response_ids": row.response_ids, "scored_masks": row.scored_masks}
    return tokens | examples
