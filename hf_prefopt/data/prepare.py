"""A data set of preferences as token ids, by one batched and cached map.

The steps are elsewhere: `formats` reads a row, `tokenize` tokenizes it, `truncate` cuts it, `notes` counts and reports
what happened to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_prefopt.config_checks import BAD_ROWS, TRUNCATION_MODES, check_choice
from hf_prefopt.data.context import refuse_unused
from hf_prefopt.data.formats import (
    FORMATS,
    RowFormat,
    find_format,
    present_optional_columns,
    raw_optional_columns,
    read_optional_columns,
)
from hf_prefopt.data.messages import BadRow, undecoded
from hf_prefopt.data.notes import NOTES, StreamGate, settle
from hf_prefopt.data.rows import CanonicalRow, refuse_unlike_beginnings
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds, tokenize_rows
from hf_prefopt.data.truncate import Cuts, truncate_row
from hf_prefopt.data.unpaired import unpair as unpair_rows
from hf_prefopt.kinds import PAIRS, UNPAIRED, ExampleKind, kind_of_columns

# The columns of prepared rows that say how their responses are compared.
EXAMPLE_FEATURES = {
    "pairs": List(List(Value("int32"))),
    "golds": List(Value("int32")),
    "labels": List(Value("bool")),
    "ranks": List(Value("float64")),
    "scores": List(Value("float64")),
    "token_weights": List(List(Value("float32"))),
}


def prepared_features(
    kind: ExampleKind, example_columns: Sequence[str] = (), optional_columns: Iterable[str] = ()
) -> Features:
    """The columns of a prepared data set of such examples.

    Args:
        example_columns: further ones of `EXAMPLE_FEATURES`. optional_columns: numbers of each example.
    """
    return Features(
        {
            "prompt_ids": List(Value("int32")),
            "response_ids": List(List(Value("int32"))),
            "scored_masks": List(List(Value("int8"))),
            **{column: EXAMPLE_FEATURES[column] for column in (*kind.columns, *example_columns)},
            **{extra: List(Value("float64")) for extra in optional_columns},
            "row": Value("int64"),
        }
    )


PREPARED_FEATURES = dict(prepared_features(PAIRS))
# Part of the cache's key, which sees this module's functions by name only: raise it when what they return changes.
_CACHE_VERSION = 3


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
    """Tokenize a data set of preferences, in any of the formats of `formats.FORMATS`; a prepared one stays as it is.

    Args:
        dataset: the rows. Those of a stream are read later: errors, and one warning of a cut, come then.
        tokenizer: the model's tokenizer, with its chat template if the rows hold messages.
        max_length: the most tokens of prompt + response; None cuts nothing.
        truncation_mode: "keep_start" cuts the end of a response that is too long, which keeps its EOS, and drops a row
            whose prompt leaves no room for a response. "keep_end" cuts the start of the prompt, alike for all responses
            of a row, and a response only if it alone is too long.
        on_bad_rows: "error" refuses a data set with unusable rows, "drop" drops them; both count them.
        num_proc: processes of `Dataset.map`.
        name: what messages call the data set.
        unpair: make two unpaired examples of each pair, in rows of their own.
        kind: of the examples that are wanted, where the columns fit several formats; by default the first of them.

    Returns:
        A data set of the columns `prompt_ids` (list of int), `response_ids` (K lists; of a pair chosen, then rejected;
        of a triple then the gold one), `scored_masks` (K lists of 0 / 1, one per response token), `row` (the row in the
        data set given), those of `EXAMPLE_FEATURES` that its kind of examples has, and optional columns such as
        `weights`, a list of one number per example.

    Raises:
        ValueError: an invalid argument; columns of no known format; messages without a chat template; texts most of
            which share no prompt; with on_bad_rows="error", unusable rows, such as those with unread context.
    """
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    check_choice("on_bad_rows", on_bad_rows, BAD_ROWS)
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(f"max_length={max_length!r}: give at least 2 tokens, or None to cut nothing")
    columns = _column_names(dataset)
    prepared = kind_of_columns(columns)
    if prepared is not None and set(prepared_features(prepared)).issubset(columns):
        kind = prepared
    else:
        try:
            row_format = find_format(columns, PAIRS if unpair else kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        kind = row_format.kind
        dataset = _tokenize(dataset, row_format, tokenizer, max_length, truncation_mode, on_bad_rows, num_proc, name)
    if not unpair or kind is not PAIRS:
        return dataset
    optional_columns = present_optional_columns(UNPAIRED, _column_names(dataset))
    return unpair_rows(dataset, prepared_features(UNPAIRED, optional_columns=optional_columns))


def _tokenize(
    dataset: Dataset | IterableDataset,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str,
    on_bad_rows: str,
    num_proc: int | None,
    name: str,
) -> Dataset | IterableDataset:
    """The data set of rows in a known format, prepared."""
    dataset, columns = undecoded(dataset), _column_names(dataset)
    features = prepared_features(
        row_format.kind, row_format.example_columns, raw_optional_columns(row_format.kind, columns)
    )
    how = {
        "batched": True,
        "with_indices": True,
        "remove_columns": columns,
        "features": Features({**features, **NOTES}),
        "fn_kwargs": {
            "format_name": row_format.name,
            "tokenizer": tokenizer,
            "max_length": max_length,
            "truncation_mode": truncation_mode,
            "cache_version": _CACHE_VERSION,
        },
    }
    if isinstance(dataset, Dataset) and not len(dataset):
        return Dataset.from_dict({column: [] for column in features}, features=features)
    if isinstance(dataset, IterableDataset):
        # Small batches: the first rows should not wait for a thousand.
        noted = dataset.map(_prepare_batch, batch_size=64, **how)
        return noted.filter(StreamGate(name, max_length, on_bad_rows)).remove_columns(list(NOTES))
    noted = dataset.with_format(None).map(_prepare_batch, num_proc=num_proc, desc=f"Tokenizing {name}", **how)
    return settle(noted, name, max_length, on_bad_rows)


def _column_names(dataset: Dataset | IterableDataset) -> list[str]:
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset), {}))  # a stream that does not say


def _prepare_batch(
    columns: Mapping[str, list[Any]],
    indices: list[int],
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str,
    cache_version: int,
) -> dict[str, list[Any]]:
    """One map batch: the prepared columns and the notes, a row for each row that came in."""
    row_format = next(known for known in FORMATS if known.name == format_name)
    kinds = TokenKinds(tokenizer)
    rows = [_read(row_format, columns, at) for at in range(len(indices))]
    tokenized = iter(tokenize_rows([row for row in rows if isinstance(row, CanonicalRow)], tokenizer, kinds))
    optional_columns = raw_optional_columns(row_format.kind, columns)
    features = prepared_features(row_format.kind, row_format.example_columns, optional_columns)
    out: dict[str, list[Any]] = {column: [] for column in (*features, *NOTES)}
    for at, (index, row) in enumerate(zip(indices, rows, strict=True)):
        done = row if isinstance(row, BadRow) else next(tokenized)
        noted = _note(
            index, done, max_length, truncation_mode, kinds, (*row_format.kind.columns, *row_format.example_columns)
        )
        noted |= read_optional_columns(
            {column: columns[column][at] for column in optional_columns.values()}, optional_columns
        )
        noted["_unlike"] = isinstance(row, CanonicalRow) and row.is_unlike
        for column, value in noted.items():
            out[column].append(value)
    return out


def _read(row_format: RowFormat, columns: Mapping[str, list[Any]], at: int) -> CanonicalRow | BadRow:
    """A row of the format, all of which is used, or the reason why it cannot be."""
    row = {column: values[at] for column, values in columns.items()}
    try:
        read = row_format.read(row)
        refuse_unused(row, row_format.columns, read)
        if read.prompt is None:
            refuse_unlike_beginnings(dict(zip(read.columns, read.responses, strict=True)))
        return read
    except BadRow as error:
        return error


def _note(
    index: int,
    row: TokenizedRow | BadRow,
    max_length: int | None,
    mode: str,
    kinds: TokenKinds,
    columns: Sequence[str],
) -> dict[str, Any]:
    """One row of the map's result."""
    kept, cuts, problem = None, Cuts(), ""
    if isinstance(row, BadRow):
        problem = str(row)
    else:
        kept, cuts = truncate_row(row, max_length, mode, kinds)
    shown = kept or TokenizedRow([], [], [])
    said = {"pairs": [list(pair) for pair in shown.pairs], **shown.example_columns}
    return {
        "prompt_ids": shown.prompt_ids,
        "response_ids": shown.response_ids,
        "scored_masks": shown.scored_masks,
        **{column: said.get(column, []) for column in columns},
        "row": index,
        "_problem": problem,
        "_bad": bool(problem),
        "_no_room": kept is None and not problem,
        "_responses": len(shown.response_ids),
        "_responses_cut": cuts.responses,
        "_prompt_cut": cuts.prompt,
        "_longest": cuts.longest,
        "_identical": any(shown.response_ids[a] == shown.response_ids[b] for a, b in shown.pairs),
    }
