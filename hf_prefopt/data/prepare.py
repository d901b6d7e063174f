"""A data set of preferences as token ids: one batched, cached map, and one line that says what it cut and left out.

The steps are elsewhere: schema.py reads a row, tokenize.py tokenises it, truncate.py cuts it. What happened to each row
travels in columns beside it, so that the counts are also right when `datasets` finds the result in its cache.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.canonical import CanonicalRow
from hf_prefopt.data.extras import extra_columns, present_extras, read_extras
from hf_prefopt.data.media import undecoded
from hf_prefopt.data.messages import BadRow
from hf_prefopt.data.schema import FORMATS, RowFormat, find_format
from hf_prefopt.data.summary import describe_bad_rows, describe_unlike, summarise
from hf_prefopt.data.texts import refuse_unlike_beginnings
from hf_prefopt.data.tokenize import TokenisedRow, TokenKinds, tokenize_rows
from hf_prefopt.data.truncate import TRUNCATION_MODES, Cuts, truncate_row
from hf_prefopt.data.unpair import unpair as unpair_rows
from hf_prefopt.data.unused import refuse_unused
from hf_prefopt.kinds import PAIRS, UNPAIRED, ExampleKind, kind_of_columns

logger = logging.getLogger(__name__)

ON_BAD_ROWS = ("error", "drop")

# What a prepared data set says of its examples, by the kinds' columns.
EXAMPLE_FEATURES = {
    "pairs": List(List(Value("int32"))),
    "golds": List(Value("int32")),
    "labels": List(Value("bool")),
    "ranks": List(Value("float64")),
    "scores": List(Value("float64")),
    "token_weights": List(List(Value("float32"))),
}


def prepared_features(kind: ExampleKind, marks: Sequence[str] = (), extras: Iterable[str] = ()) -> Features:
    """The columns of a prepared data set of such examples, of which `marks` and `extras` are not in every one.

    Marks are those of `EXAMPLE_FEATURES`; an extra is a number for each example.
    """
    return Features(
        {
            "prompt_ids": List(Value("int32")),
            "response_ids": List(List(Value("int32"))),
            "scored_masks": List(List(Value("int8"))),
            **{column: EXAMPLE_FEATURES[column] for column in (*kind.columns, *marks)},
            **{extra: List(Value("float64")) for extra in extras},
            "row": Value("int64"),
        }
    )


PREPARED_FEATURES = dict(prepared_features(PAIRS))
# What happened to the row; removed once counted.
_NOTES = {
    "_problem": Value("string"),  # what is wrong with the row, or ""
    "_bad": Value("bool"),
    "_no_room": Value("bool"),  # its prompt leaves no room for a response
    "_responses": Value("int32"),
    "_responses_cut": Value("int32"),
    "_prompt_cut": Value("bool"),
    "_longest": Value("int32"),  # tokens of prompt + longest response, before any cut
    "_identical": Value("bool"),  # chosen and rejected are the same tokens
    "_unlike": Value("bool"),  # texts without a prompt column that hardly begin with one
}
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
    """Tokenise a data set of preferences, in any of the formats of `schema.FORMATS`.

    A data set that is prepared already comes back as it is.

    Args:
        dataset: the rows. Those of a streaming data set are looked at when they are reached: errors, and once the
            warning of a cut, come then.
        tokenizer: the model's tokenizer, with its chat template if the rows hold messages.
        max_length: the most tokens of prompt + response; None cuts nothing.
        truncation_mode: "keep_start" cuts the end of a response that is too long, which keeps its EOS; a row whose
            prompt leaves no room for a response is left out. "keep_end" cuts the start of the prompt, alike for all
            responses of a row, and a response only if it alone is too long.
        on_bad_rows: "error" refuses a data set with unusable rows, "drop" leaves them out; both count them.
        num_proc: processes of `Dataset.map`.
        name: what messages call the data set.
        unpair: makes two unpaired examples of every pair, in rows of their own.
        kind: of the examples that are wanted, where the columns fit several formats; by default the first of them.

    Returns:
        A data set of the columns `prompt_ids` (list of int), `response_ids` (K lists; of a pair chosen, then rejected,
        of a triple then the gold one), `scored_masks` (K lists of 0 / 1, one per response token), `row` (the row in the
        data set given), and by the kind of the examples `pairs` (`[[0, 1]]` for a pair), for a triple `golds` (`[2]`),
        `labels` (K bools), or `ranks` and `scores` (K numbers); of pairs whose tokens have weights also `token_weights`
        (K lists of numbers); and what the rows say of the examples besides (`ExampleKind.extras`), such as `weights`: a
        list of a number per example.

    Raises:
        ValueError: an argument outside its values; columns of no known format; messages without a chat template; texts
            most of which share no prompt; with on_bad_rows="error", unusable rows, such as those with unread context.
    """
    _check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    _check_choice("on_bad_rows", on_bad_rows, ON_BAD_ROWS)
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
        dataset = _tokenise(dataset, row_format, tokenizer, max_length, truncation_mode, on_bad_rows, num_proc, name)
    if not unpair or kind is not PAIRS:
        return dataset
    extras = present_extras(UNPAIRED, _column_names(dataset))
    return unpair_rows(dataset, prepared_features(UNPAIRED, extras=extras))


def _tokenise(
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
    features = prepared_features(row_format.kind, row_format.marks, extra_columns(row_format.kind, columns))
    how = {
        "batched": True,
        "with_indices": True,
        "remove_columns": columns,
        "features": Features({**features, **_NOTES}),
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
        return noted.filter(_StreamGate(name, max_length, on_bad_rows)).remove_columns(list(_NOTES))
    noted = dataset.with_format(None).map(_prepare_batch, num_proc=num_proc, desc=f"Tokenising {name}", **how)
    return _settle(noted, name, max_length, on_bad_rows)


def _check_choice(argument: str, value: Any, valid: Any) -> None:
    if value not in valid:
        raise ValueError(f"{argument}={value!r}: valid values are {', '.join(map(repr, valid))}")


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
    tokenised = iter(tokenize_rows([row for row in rows if isinstance(row, CanonicalRow)], tokenizer, kinds))
    extras = extra_columns(row_format.kind, columns)
    features = prepared_features(row_format.kind, row_format.marks, extras)
    out: dict[str, list[Any]] = {column: [] for column in (*features, *_NOTES)}
    for at, (index, row) in enumerate(zip(indices, rows, strict=True)):
        done = row if isinstance(row, BadRow) else next(tokenised)
        noted = _note(index, done, max_length, truncation_mode, kinds, (*row_format.kind.columns, *row_format.marks))
        noted |= read_extras({column: columns[column][at] for column in extras.values()}, extras)
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
    row: TokenisedRow | BadRow,
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
    shown = kept or TokenisedRow([], [], [])
    said = {"pairs": [list(pair) for pair in shown.pairs], **shown.marks}
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


def _settle(noted: Dataset, name: str, max_length: int | None, on_bad_rows: str) -> Dataset:
    """Refuse or leave out the rows that cannot be used, say what happened, remove the notes."""
    notes = noted.select_columns(list(_NOTES)).with_format("arrow")[:]
    problems = notes["_problem"].to_pylist()
    if on_bad_rows == "error" and any(problems):
        raise ValueError(describe_bad_rows(name, problems))
    counts = {column: notes[column].to_numpy() for column in _NOTES if column != "_problem"}
    unlike = describe_unlike(name, int(counts["_unlike"].sum()), int((~counts["_bad"]).sum()))
    if unlike:
        raise ValueError(unlike)
    summary = summarise(name, counts, max_length)
    if summary:
        logger.warning(summary)
    out = counts["_bad"] | counts["_no_room"]
    if out.all():
        reasons = f"\n{describe_bad_rows(name, problems)}" if any(problems) else ""
        raise ValueError(f"{name}: none of the {len(noted):,} rows can be used. {summary}{reasons}")
    kept = noted.select(np.flatnonzero(~out)) if out.any() else noted
    return kept.remove_columns(list(_NOTES))


class _StreamGate:
    """Lets the usable rows of a stream through: the streaming counterpart of `_settle`, which cannot count ahead."""

    def __init__(self, name: str, max_length: int | None, on_bad_rows: str):
        self.name, self.max_length, self.on_bad_rows = name, max_length, on_bad_rows
        self.has_warned = False
        self.rows = self.unlike = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if row["_bad"] and self.on_bad_rows == "error":
            raise ValueError(f"{self.name}: row {row['row']:,}: {row['_problem']}")
        self.rows, self.unlike = self.rows + (not row["_bad"]), self.unlike + row["_unlike"]
        unlike = describe_unlike(self.name, self.unlike, self.rows)
        if unlike:
            raise ValueError(unlike)
        summary = summarise(self.name, {column: np.array([row[column]]) for column in _NOTES}, self.max_length)
        if summary and not self.has_warned:
            self.has_warned = True
            logger.warning("%s (row %s, the first of this stream)", summary, f"{row['row']:,}")
        return not (row["_bad"] or row["_no_room"])
