"""A data set's row, in whichever format it comes, as one canonical row; or a `BadRow` that says what is wrong with it.

Formats (an entry of `FORMATS` each, found by the data set's columns; a column holds text or lists of messages):

    prompt, chosen, rejected                   explicit prompt
    chosen, rejected                           implicit prompt: both sides begin with it
    prompt_ids, chosen_ids, rejected_ids       already tokenized; with chosen_token_weights, rejected_token_weights a
                                               number for each token of the responses
    … and reference, or reference_ids          of pairs: a third, gold response, for losses of triples
    prompt, completion, label                  a response, desirable (true) or not
    prompt, responses, ranks                   a list of responses; smaller ranks are better
    prompt, responses, scores                  a list of responses; larger scores are better

with `tools` and `chat_template_kwargs` beside messages, and numbers of each example in further columns, such as
`weight` (`ExampleKind.optional_columns`). What a column holds is checked in `rows`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_prefopt.data.messages import BadRow
from hf_prefopt.data.rows import (
    CHECKS,
    CanonicalRow,
    canonical_row,
    check_ids,
    check_weights,
    refuse_repeated_prompt,
    shared_kind,
)
from hf_prefopt.kinds import LISTS, PAIRS, TRIPLES, UNPAIRED, ExampleKind


def raw_optional_columns(kind: ExampleKind, columns: Collection[str]) -> dict[str, str]:
    """The optional columns among the columns of raw rows: prepared name → raw name, the first that is there."""
    found = {name: [c for c in extra.columns if c in columns] for name, extra in kind.optional_columns.items()}
    return {name: present[0] for name, present in found.items() if present}


def present_optional_columns(kind: ExampleKind, columns: Collection[str]) -> tuple[str, ...]:
    """The optional_columns that prepared rows of these columns have."""
    return tuple(name for name in kind.optional_columns if name in columns)


def number_or_nan(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def read_optional_columns(row: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, list[float]]:
    """The prepared columns of a raw row, which holds one example."""
    return {name: [number_or_nan(row[column])] for name, column in found.items()}


@dataclass(frozen=True)
class RowFormat:
    """A format: the columns that a data set of this format has, and the reader of one of its rows.

    `example_columns` are the prepared columns that its rows have beside those of every row of their kind.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], CanonicalRow]
    kind: ExampleKind = PAIRS
    example_columns: tuple[str, ...] = ()


def find_format(columns: Iterable[str], kind: ExampleKind | None = None) -> RowFormat:
    """The first format whose columns are all there, of those that hold examples of a kind if there is one.

    Raises:
        ValueError: there is none (what is missing from the nearest one is named), or there are weights of tokens and no
            tokens that they could be told by.
    """
    present = set(columns)
    fitting = [row_format for row_format in FORMATS if present.issuperset(row_format.columns)]
    if fitting:
        row_format = next((wanted for wanted in fitting if wanted.kind is kind), fitting[0])
        _refuse_lost_weights(present, row_format)
        return row_format
    nearest = max(FORMATS, key=lambda f: (len(present.intersection(f.columns)), -len(f.columns)))
    missing = ", ".join(f"`{name}`" for name in nearest.columns if name not in present)
    known = "; ".join(f"{row_format.name} ({', '.join(row_format.columns)})" for row_format in FORMATS)
    found = ", ".join(sorted(present)) or "none"
    raise ValueError(f"column {missing} is missing (columns found: {found}); the formats are: {known}")


def _refuse_lost_weights(present: set[str], row_format: RowFormat) -> None:
    weights = sorted(present.intersection(_TOKEN_WEIGHTS))
    if weights and not row_format.example_columns:
        raise ValueError(
            f"column {', '.join(weights)} weighs tokens, and these rows ({row_format.name}) do not say which tokens "
            "there are: give prompt_ids, chosen_ids, rejected_ids, chosen_token_weights and rejected_token_weights"
        )


_PAIR = ("chosen", "rejected")
_TRIPLE = (*_PAIR, "reference")


def read_explicit_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`prompt`, `chosen`, `rejected`: three texts, or three lists of messages."""
    return _read_explicit(row, _PAIR)


def read_explicit_triple(row: Mapping[str, Any]) -> CanonicalRow:
    """As `read_explicit_pair`, with a gold response in `reference`."""
    return _with_gold(_read_explicit(row, _TRIPLE))


def _read_explicit(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    kind = shared_kind(row, ("prompt", *columns))
    prompt = CHECKS[kind].prompt("prompt", row["prompt"])
    responses = {column: CHECKS[kind].response(column, row[column]) for column in columns}
    for column, response in responses.items():
        if kind == "messages" and prompt and response[: len(prompt)] == prompt:
            raise BadRow(column, "repeats the messages of `prompt`", "remove the `prompt` column")
    if kind == "text":
        refuse_repeated_prompt(prompt, responses)
    return canonical_row(kind, prompt, responses, row, pairs=[(0, 1)])


def read_implicit_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`chosen`, `rejected` that begin with their prompt: whole messages that both share, or text left unsplit."""
    return _read_implicit(row, _PAIR)


def read_implicit_triple(row: Mapping[str, Any]) -> CanonicalRow:
    """As `read_implicit_pair`, with a gold response in `reference` that begins with the same prompt."""
    return _with_gold(_read_implicit(row, _TRIPLE))


def _read_implicit(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    kind = shared_kind(row, columns)
    prompt, responses = CHECKS[kind].split({column: row[column] for column in columns})
    return canonical_row(kind, prompt, dict(zip(columns, responses, strict=True)), row, pairs=[(0, 1)])


def read_tokenized_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`: lists of token ids, taken as they are."""
    return _read_tokenized(row, _PAIR)


def read_tokenized_triple(row: Mapping[str, Any]) -> CanonicalRow:
    """As `read_tokenized_pair`, with a gold response in `reference_ids`."""
    return _with_gold(_read_tokenized(row, _TRIPLE))


def _read_tokenized(row: Mapping[str, Any], responses: tuple[str, ...]) -> CanonicalRow:
    columns = tuple(f"{name}_ids" for name in responses)
    prompt, *ids = [check_ids(name, row.get(name)) for name in ("prompt_ids", *columns)]
    for column, tokens in zip(columns, ids, strict=True):
        if not tokens:
            raise BadRow(column, "is empty")
    return CanonicalRow("tokens", prompt, ids, columns, [(0, 1)])


def _with_gold(row: CanonicalRow) -> CanonicalRow:
    return replace(row, example_columns={"golds": [len(row.responses) - 1]})


def read_weighted_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`read_tokenized_pair` with `chosen_token_weights`, `rejected_token_weights`: a number ≥ 0 for each token."""
    pair = read_tokenized_pair(row)
    weights = [
        check_weights(column, row.get(column), len(ids))
        for column, ids in zip(_TOKEN_WEIGHTS, pair.responses, strict=True)
    ]
    return replace(pair, example_columns={"token_weights": weights})


def read_labeled(row: Mapping[str, Any]) -> CanonicalRow:
    """`prompt`, `completion`, as texts or as lists of messages, and `label`: whether the completion is desirable."""
    kind = shared_kind(row, ("prompt", "completion"))
    prompt = CHECKS[kind].prompt("prompt", row["prompt"])
    completion = CHECKS[kind].response("completion", row["completion"])
    if row.get("label") not in (True, False):  # Of numbers, 0 and 1 are equal to these.
        raise BadRow("label", f"is {row.get('label')!r}", "make it true (desirable) or false")
    if kind == "text" and row["label"]:  # An undesirable completion may echo its prompt.
        refuse_repeated_prompt(prompt, {"completion": completion})
    return canonical_row(
        kind, prompt, {"completion": completion}, row, example_columns={"labels": [bool(row["label"])]}
    )


def read_ranked(row: Mapping[str, Any]) -> CanonicalRow:
    """`prompt` and `responses`, a list of texts or of lists of messages, with `ranks`: a number each, 1 the best."""
    return _read_list(row, "ranks", lambda ranks: {"ranks": ranks, "scores": []})


def read_scored(row: Mapping[str, Any]) -> CanonicalRow:
    """As `read_ranked`, with `scores`: larger is better. Ranks are made of them, equal ones of equal scores."""
    return _read_list(
        row, "scores", lambda scores: {"ranks": [1 + sum(o > s for o in scores) for s in scores], "scores": scores}
    )


def _read_list(
    row: Mapping[str, Any], column: str, mark: Callable[[list[float]], dict[str, list[float]]]
) -> CanonicalRow:
    responses, values = row.get("responses"), row.get(column)
    if not isinstance(responses, list | tuple) or len(responses) < 2:
        raise BadRow("responses", "is no list of two or more", "give every prompt at least two responses")
    if not isinstance(values, list | tuple) or len(values) != len(responses):
        raise BadRow(column, f"is no list of {len(responses)} numbers", "give one for each response")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRow(column, f"holds {value!r}", "make it a list of finite numbers")
    named = {f"responses[{place}]": response for place, response in enumerate(responses)}
    kind = shared_kind({"prompt": row.get("prompt"), **named}, ("prompt", *named))
    prompt = CHECKS[kind].prompt("prompt", row["prompt"])
    checked = {name: CHECKS[kind].response(name, response) for name, response in named.items()}
    if kind == "text":
        refuse_repeated_prompt(prompt, checked)
    return canonical_row(kind, prompt, checked, row, example_columns=mark([float(value) for value in values]))


_TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")

# A data set has the first of these formats whose columns are all present; among several, one of the wanted kind is
# preferred. A `reference` is read only if triples are wanted, because other data sets have a column of that name, too.
# When a reader changes, raise `_CACHE_VERSION` in `prepare`.
FORMATS: tuple[RowFormat, ...] = (
    RowFormat(
        "tokenized pairs with weights",
        (*_TOKENS, *_TOKEN_WEIGHTS),
        read_weighted_pair,
        example_columns=("token_weights",),
    ),
    RowFormat("tokenized pairs", _TOKENS, read_tokenized_pair),
    RowFormat("pairs", ("prompt", *_PAIR), read_explicit_pair),
    RowFormat("pairs that begin with their prompt", _PAIR, read_implicit_pair),
    RowFormat("tokenized triples", (*_TOKENS, "reference_ids"), read_tokenized_triple, TRIPLES),
    RowFormat("triples", ("prompt", *_TRIPLE), read_explicit_triple, TRIPLES),
    RowFormat("triples that begin with their prompt", _TRIPLE, read_implicit_triple, TRIPLES),
    RowFormat("labeled responses", ("prompt", "completion", "label"), read_labeled, UNPAIRED),
    RowFormat("scored lists", ("prompt", "responses", "scores"), read_scored, LISTS),
    RowFormat("ranked lists", ("prompt", "responses", "ranks"), read_ranked, LISTS),
)
