"""The formats of a data set's rows: which columns each has, and how a row of it becomes a canonical row.

Each format is an entry of `FORMATS` and is recognized by its columns, which hold text or lists of messages:

    prompt, chosen, rejected                   explicit prompt
    chosen, rejected                           implicit prompt: both sides begin with it
    prompt_ids, chosen_ids, rejected_ids       tokenized already; optionally with chosen_token_weights and
                                               rejected_token_weights, a number for each token of the responses
    … and reference, or reference_ids          triples: a pair and a third, gold response
    prompt, completion, label                  a response that is desirable (true) or not
    prompt, responses, ranks                   a list of responses; smaller ranks are better
    prompt, responses, scores                  a list of responses; larger scores are better

Rows of messages may also have `tools` and `chat_template_kwargs`. Two groups of columns are prepared from a row:

    example columns     how its responses are compared: `pairs`, `golds`, `labels`, `ranks`, `scores`, `token_weights`
    optional columns    a number for each example, such as `weights`; see `ExampleKind.optional_columns`
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_prefopt.data.messages import check_messages, check_reply, split_conversations
from hf_prefopt.data.rows import (
    BadRow,
    CanonicalRow,
    ContentType,
    check_ids,
    check_list,
    check_numbers,
    check_text_prompt,
    check_text_response,
    common_content_type,
    read_json,
    reject_repeated_prompt,
)
from hf_prefopt.kinds import LISTS, PAIRS, TRIPLES, UNPAIRED, ExampleKind

_TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")


@dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    Attributes:
        name: what error messages call it.
        kind: the examples that its rows hold.
        columns: the columns that a data set must have to be of this format.
        reader: makes the canonical row of a raw row, given `columns`.
        has_token_weights: whether its rows have weights of tokens.
    """

    name: str
    kind: ExampleKind
    columns: tuple[str, ...]
    reader: Callable[[Mapping[str, Any], tuple[str, ...]], CanonicalRow]
    has_token_weights: bool = False

    @property
    def example_columns(self) -> tuple[str, ...]:
        """The example columns of its prepared rows."""
        return (*self.kind.columns, *["token_weights"] * self.has_token_weights)

    def read(self, row: Mapping[str, Any]) -> CanonicalRow:
        """The canonical row of a raw row. Raises `BadRow` for a row that cannot be used."""
        return self.reader(row, self.columns)


def find_format(columns: Iterable[str], kind: ExampleKind | None = None) -> RowFormat:
    """The first format whose columns are all present, preferably one of this kind of examples.

    Raises:
        ValueError: no format matches (the message names the missing columns of the closest one), or there are token
            weights without tokens.
    """
    present = set(columns)
    matching = [row_format for row_format in FORMATS if present.issuperset(row_format.columns)]
    if not matching:
        closest = max(FORMATS, key=lambda f: (len(present.intersection(f.columns)), -len(f.columns)))
        missing = ", ".join(f"`{name}`" for name in closest.columns if name not in present)
        known = "; ".join(f"{row_format.name} ({', '.join(row_format.columns)})" for row_format in FORMATS)
        found = ", ".join(sorted(present)) or "none"
        raise ValueError(f"column {missing} is missing (columns found: {found}); the formats are: {known}")
    row_format = next((match for match in matching if match.kind is kind), matching[0])
    weights = sorted(present.intersection(_TOKEN_WEIGHTS))
    if weights and not row_format.has_token_weights:
        raise ValueError(
            f"column {', '.join(weights)} weighs tokens, but rows in this format ({row_format.name}) do not say which "
            "tokens there are: give prompt_ids, chosen_ids, rejected_ids, chosen_token_weights, rejected_token_weights"
        )
    return row_format


def optional_columns(kind: ExampleKind, columns: Collection[str]) -> dict[str, str]:
    """The optional columns of raw rows with these columns: prepared column → raw column, the first of its names."""
    found = {name: [c for c in column.columns if c in columns] for name, column in kind.optional_columns.items()}
    return {name: present[0] for name, present in found.items() if present}


def number_or_nan(value: Any) -> float:
    """The value as a float; NaN if it is not a number, which is an error only if a loss uses the column."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def _read_explicit(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    """A prompt and responses, all text or all lists of messages."""
    content_type, prompt, responses = _read_contents(row, columns)
    for column, response in responses.items():
        if content_type == "messages" and prompt and response[: len(prompt)] == prompt:
            raise BadRow(column, "repeats the messages of `prompt`", "remove the `prompt` column")
    if content_type == "text":
        reject_repeated_prompt(prompt, responses)
    return _canonical_row(content_type, prompt, responses, row, _pair(responses))


def _read_implicit(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    """Responses that begin with their prompt: messages are split here, text once there are tokens."""
    content_type, prompt = common_content_type(row, columns), None
    responses = {column: row[column] for column in columns}
    if content_type == "messages":
        prompt, responses = split_conversations(responses)
    else:
        responses = {column: check_text_response(column, text) for column, text in responses.items()}
    return _canonical_row(content_type, prompt, responses, row, _pair(responses))


def _read_tokens(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    """Lists of token ids, which are taken as they are."""
    prompt, *responses = [check_ids(column, row.get(column)) for column in columns]
    for column, ids in zip(columns[1:], responses, strict=True):
        if not ids:
            raise BadRow(column, "is empty")
    return CanonicalRow("tokens", prompt, responses, columns[1:], _pair(responses))


def _read_weighted_tokens(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    """Lists of token ids, and for each token of the responses a weight ≥ 0."""
    pair = _read_tokens(row, columns[:3])
    weights = [
        check_numbers(column, row.get(column), len(ids), "token", low=0)
        for column, ids in zip(columns[3:], pair.responses, strict=True)
    ]
    pair.example_columns["token_weights"] = weights
    return pair


def _read_labeled(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    """A prompt, a response, and whether it is desirable."""
    content_type, prompt, responses = _read_contents(row, ("prompt", "completion"))
    label = row.get("label")
    if label not in (True, False):  # 0 and 1 are equal to these.
        raise BadRow("label", f"is {label!r}", "make it true (desirable) or false")
    if content_type == "text" and label:  # An undesirable completion may echo its prompt.
        reject_repeated_prompt(prompt, responses)
    return _canonical_row(content_type, prompt, responses, row, {"labels": [bool(label)]})


def _read_list(row: Mapping[str, Any], columns: tuple[str, ...]) -> CanonicalRow:
    """A prompt, a list of responses, and a rank or a score of each. Ranks are made from scores, with the same ties."""
    listed = check_list("responses", row.get("responses"), "two or more responses")
    if len(listed) < 2:
        raise BadRow("responses", f"holds {len(listed)} responses", "give every prompt at least two")
    numbers = check_numbers(columns[-1], row.get(columns[-1]), len(listed), "response")
    scores = numbers if columns[-1] == "scores" else []
    ranks = [1.0 + sum(other > score for other in scores) for score in scores] or numbers
    named = {f"responses[{place}]": response for place, response in enumerate(listed)}
    content_type, prompt, responses = _read_contents({"prompt": row.get("prompt"), **named}, ("prompt", *named))
    if content_type == "text":
        reject_repeated_prompt(prompt, responses)
    return _canonical_row(content_type, prompt, responses, row, {"ranks": ranks, "scores": scores})


def _read_contents(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[ContentType, Any, dict[str, Any]]:
    """The content type that these columns share, the prompt from the first one, and the responses from the others."""
    if common_content_type(row, columns) == "text":
        text = check_text_prompt("prompt", row["prompt"])
        return "text", text, {column: check_text_response(column, row[column]) for column in columns[1:]}
    prompt = check_messages("prompt", row["prompt"])
    return "messages", prompt, {column: check_reply(column, row[column]) for column in columns[1:]}


def _canonical_row(
    content_type: ContentType,
    prompt: Any,
    responses: dict[str, Any],
    row: Mapping[str, Any],
    example_columns: dict[str, list],
) -> CanonicalRow:
    # No tools rather than an empty list: some templates print a heading above an empty list.
    tools = read_json(row, "tools", list) or None
    template_kwargs = read_json(row, "chat_template_kwargs", dict) or {}
    values = [*responses.values()]
    return CanonicalRow(content_type, prompt, values, tuple(responses), example_columns, tools, template_kwargs)


def _pair(responses: Collection) -> dict[str, list]:
    """The example columns of a pair, or of a triple if there are three responses."""
    return {"pairs": [[0, 1]]} if len(responses) == 2 else {"pairs": [[0, 1]], "golds": [2]}


_PAIR = ("chosen", "rejected")
_TRIPLE = (*_PAIR, "reference")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")

# The order matters: `find_format` takes the first match. A `reference` is read only for losses of triples, because
# other data sets have a column of that name, too. When a reader changes, raise `_CACHE_VERSION` in `prepare`.
FORMATS: tuple[RowFormat, ...] = (
    RowFormat(
        "tokenized pairs with weights",
        PAIRS,
        (*_TOKENS, *_TOKEN_WEIGHTS),
        _read_weighted_tokens,
        has_token_weights=True,
    ),
    RowFormat("tokenized pairs", PAIRS, _TOKENS, _read_tokens),
    RowFormat("pairs", PAIRS, ("prompt", *_PAIR), _read_explicit),
    RowFormat("pairs that begin with their prompt", PAIRS, _PAIR, _read_implicit),
    RowFormat("tokenized triples", TRIPLES, (*_TOKENS, "reference_ids"), _read_tokens),
    RowFormat("triples", TRIPLES, ("prompt", *_TRIPLE), _read_explicit),
    RowFormat("triples that begin with their prompt", TRIPLES, _TRIPLE, _read_implicit),
    RowFormat("labeled responses", UNPAIRED, ("prompt", "completion", "label"), _read_labeled),
    RowFormat("scored lists", LISTS, ("prompt", "responses", "scores"), _read_list),
    RowFormat("ranked lists", LISTS, ("prompt", "responses", "ranks"), _read_list),
)
