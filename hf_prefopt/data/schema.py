"""A data set's row, in whichever format it comes, as one canonical row; or a `BadRow` that says what is wrong with it.

Formats (an entry of `FORMATS` each, found by the data set's columns; a column holds text or lists of messages):

    prompt, chosen, rejected                   explicit prompt
    chosen, rejected                           implicit prompt: both sides begin with it
    prompt_ids, chosen_ids, rejected_ids       already tokenised; with chosen_token_weights, rejected_token_weights a
                                               number for each token of the responses
    prompt, completion, label                  a response, desirable (true) or not
    prompt, responses, ranks                   a list of responses; smaller ranks are better
    prompt, responses, scores                  a list of responses; larger scores are better

with `tools` and `chat_template_kwargs` beside messages, and numbers of each example in further columns, such as
`weight` (extras.py). Messages themselves are checked in messages.py; tokens are the affair of tokenize.py.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_prefopt.data.messages import BadRow, Message, check_messages, check_reply, count_shared_messages, drop_nones
from hf_prefopt.examples import LISTS, PAIRS, UNPAIRED, ExampleKind

Kind = Literal["text", "messages", "tokens"]


@dataclass(frozen=True)
class CanonicalRow:
    """One prompt and its K responses, all of one kind.

    Attributes:
        kind: what prompt and responses are: text, lists of messages, or lists of token ids.
        prompt: the prompt; None for texts that carry it inside (it is split off once there are tokens).
        responses: the K responses; for a pair the chosen, then the rejected one.
        columns: the column that each response came from, for error messages.
        pairs: `(chosen, rejected)` indices into `responses`.
        marks: what the row says of each response beside pairs, by the prepared column: `labels`, or `ranks`, `scores`,
            or `token_weights`.
        tools: tool schemas for the chat template, or None.
        chat_template_kwargs: further arguments of the chat template.
    """

    kind: Kind
    prompt: Any
    responses: list[Any]
    columns: tuple[str, ...]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    marks: dict[str, list] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowFormat:
    """A format: the columns that a data set of this format has, and the reader of one of its rows.

    `marks` are the prepared columns that its rows have beside those of every row of their kind.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], CanonicalRow]
    kind: ExampleKind = PAIRS
    marks: tuple[str, ...] = ()


def find_format(columns: Iterable[str]) -> RowFormat:
    """The first format whose columns are all there.

    Raises:
        ValueError: there is none (what is missing from the nearest one is named), or there are weights of tokens and no
            tokens that they could be told by.
    """
    present = set(columns)
    for row_format in FORMATS:
        if present.issuperset(row_format.columns):
            _refuse_lost_weights(present, row_format)
            return row_format
    nearest = max(FORMATS, key=lambda f: (len(present.intersection(f.columns)), -len(f.columns)))
    missing = ", ".join(f"`{name}`" for name in nearest.columns if name not in present)
    known = "; ".join(f"{row_format.name} ({', '.join(row_format.columns)})" for row_format in FORMATS)
    found = ", ".join(sorted(present)) or "none"
    raise ValueError(f"column {missing} is missing (columns found: {found}); the formats are: {known}")


def _refuse_lost_weights(present: set[str], row_format: RowFormat) -> None:
    weights = sorted(present.intersection(_TOKEN_WEIGHTS))
    if weights and not row_format.marks:
        raise ValueError(
            f"column {', '.join(weights)} weighs tokens, and these rows ({row_format.name}) do not say which tokens "
            "there are: give prompt_ids, chosen_ids, rejected_ids, chosen_token_weights and rejected_token_weights"
        )


def read_explicit_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`prompt`, `chosen`, `rejected`: three texts, or three lists of messages."""
    kind = _shared_kind(row, ("prompt", "chosen", "rejected"))
    prompt = _CHECKS[kind].prompt("prompt", row["prompt"])
    responses = [_CHECKS[kind].response(column, row[column]) for column in ("chosen", "rejected")]
    for column, response in zip(("chosen", "rejected"), responses, strict=True):
        if kind == "messages" and prompt and response[: len(prompt)] == prompt:
            raise BadRow(column, "repeats the messages of `prompt`", "remove the `prompt` column")
    return _pair(kind, prompt, responses, row)


def read_implicit_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`chosen`, `rejected` that begin with their prompt: whole messages that both share, or text left unsplit."""
    kind = _shared_kind(row, ("chosen", "rejected"))
    prompt, responses = _CHECKS[kind].split({column: row[column] for column in ("chosen", "rejected")})
    return _pair(kind, prompt, responses, row)


def read_tokenised_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`: lists of token ids, taken as they are."""
    prompt, *responses = [_check_ids(name, row.get(name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    for column, ids in zip(("chosen_ids", "rejected_ids"), responses, strict=True):
        if not ids:
            raise BadRow(column, "is empty")
    return CanonicalRow("tokens", prompt, responses, ("chosen_ids", "rejected_ids"), [(0, 1)])


def read_weighted_pair(row: Mapping[str, Any]) -> CanonicalRow:
    """`read_tokenised_pair` with `chosen_token_weights`, `rejected_token_weights`: a number ≥ 0 for each token."""
    pair = read_tokenised_pair(row)
    weights = [
        _check_weights(column, row.get(column), len(ids))
        for column, ids in zip(_TOKEN_WEIGHTS, pair.responses, strict=True)
    ]
    return replace(pair, marks={"token_weights": weights})


def read_labelled(row: Mapping[str, Any]) -> CanonicalRow:
    """`prompt`, `completion`, as texts or as lists of messages, and `label`: whether the completion is desirable."""
    kind = _shared_kind(row, ("prompt", "completion"))
    prompt = _CHECKS[kind].prompt("prompt", row["prompt"])
    completion = _CHECKS[kind].response("completion", row["completion"])
    if row.get("label") not in (True, False):  # Of numbers, 0 and 1 are equal to these.
        raise BadRow("label", f"is {row.get('label')!r}", "make it true (desirable) or false")
    return _canonical(kind, prompt, {"completion": completion}, row, marks={"labels": [bool(row["label"])]})


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
    kind = _shared_kind({"prompt": row.get("prompt"), **named}, ("prompt", *named))
    prompt = _CHECKS[kind].prompt("prompt", row["prompt"])
    checked = {name: _CHECKS[kind].response(name, response) for name, response in named.items()}
    return _canonical(kind, prompt, checked, row, marks=mark([float(value) for value in values]))


_TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")

# The order matters: the first format whose columns are all present is the data set's.
FORMATS: tuple[RowFormat, ...] = (
    RowFormat(
        "tokenised pairs with weights", (*_TOKENS, *_TOKEN_WEIGHTS), read_weighted_pair, marks=("token_weights",)
    ),
    RowFormat("tokenised pairs", _TOKENS, read_tokenised_pair),
    RowFormat("pairs", ("prompt", "chosen", "rejected"), read_explicit_pair),
    RowFormat("pairs that begin with their prompt", ("chosen", "rejected"), read_implicit_pair),
    RowFormat("labelled responses", ("prompt", "completion", "label"), read_labelled, UNPAIRED),
    RowFormat("scored lists", ("prompt", "responses", "scores"), read_scored, LISTS),
    RowFormat("ranked lists", ("prompt", "responses", "ranks"), read_ranked, LISTS),
)


@dataclass(frozen=True)
class _KindChecks:
    """What differs between text and messages: how a prompt and a response are checked, an implicit prompt split."""

    prompt: Callable[[str, Any], Any]
    response: Callable[[str, Any], Any]
    split: Callable[[dict[str, Any]], tuple[Any, list[Any]]]


def _check_text_response(column: str, text: str) -> str:
    if not text.strip():
        raise BadRow(column, "is empty" if not text else "is only whitespace")
    return text


def _leave_texts_whole(texts: dict[str, str]) -> tuple[None, list[str]]:
    return None, [_check_text_response(column, text) for column, text in texts.items()]


def _check_message_response(column: str, messages: list[Any]) -> list[Message]:
    return check_reply(column, check_messages(column, messages))


def _split_messages(conversations: dict[str, list[Any]]) -> tuple[list[Message], list[list[Message]]]:
    """The messages that both conversations begin with, and the rest of each."""
    checked = {column: _check_message_response(column, messages) for column, messages in conversations.items()}
    shared = count_shared_messages(checked)
    prompt = next(iter(checked.values()))[:shared]
    return prompt, [check_reply(column, messages[shared:]) for column, messages in checked.items()]


_CHECKS: dict[str, _KindChecks] = {
    "text": _KindChecks(lambda column, text: text, _check_text_response, _leave_texts_whole),
    "messages": _KindChecks(check_messages, _check_message_response, _split_messages),
}


def _kind_of(column: str, value: Any) -> Kind:
    if value is None:
        raise BadRow(column, "is missing")
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "messages"
    raise BadRow(column, f"is of type {type(value).__name__}", "make it text or a list of messages")


def _shared_kind(row: Mapping[str, Any], columns: tuple[str, ...]) -> Kind:
    """The one kind that all these columns have."""
    kinds = {column: _kind_of(column, row.get(column)) for column in columns}
    first, *others = columns
    for column in others:
        if kinds[column] != kinds[first]:
            cure = "give both as text or both as messages"
            if first == "prompt":
                cure += ", or remove `prompt` where the responses already begin with it"
            raise BadRow(column, f"is {_SPOKEN[kinds[column]]} while `{first}` is {_SPOKEN[kinds[first]]}", cure)
    return kinds[first]


_SPOKEN = {"text": "text", "messages": "a list"}


def _pair(kind: Kind, prompt: Any, responses: list[Any], row: Mapping[str, Any]) -> CanonicalRow:
    named = dict(zip(("chosen", "rejected"), responses, strict=True))
    return _canonical(kind, prompt, named, row, pairs=[(0, 1)])


def _canonical(
    kind: Kind, prompt: Any, responses: dict[str, Any], row: Mapping[str, Any], **examples: Any
) -> CanonicalRow:
    """The row of these responses by column, with the columns that stand beside messages in every format."""
    return CanonicalRow(
        kind=kind,
        prompt=prompt,
        responses=list(responses.values()),
        columns=tuple(responses),
        **examples,
        # An empty list is no tools: some templates would print the heading of a list of tools.
        tools=_parse_json("tools", row.get("tools"), list) or None,
        chat_template_kwargs=_parse_json("chat_template_kwargs", row.get("chat_template_kwargs"), dict) or {},
    )


def _parse_json(column: str, value: Any, wanted: type) -> Any:
    """The value of a column that holds a list or a dict, or the same as a JSON string (whose nulls are meant)."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise BadRow(column, f"is text but not JSON ({error})", f"give a {wanted.__name__} or valid JSON") from None
    else:
        value = drop_nones(value)
    if value is not None and not isinstance(value, wanted):
        raise BadRow(column, f"is of type {type(value).__name__}", f"make it a {wanted.__name__} or its JSON")
    return value


def _check_ids(column: str, ids: Any) -> list[int]:
    if ids is None:
        raise BadRow(column, "is missing")
    if not isinstance(ids, list | tuple):
        raise BadRow(column, f"is of type {type(ids).__name__}", "make it a list of token ids")
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise BadRow(column, f"holds {token!r} at position {position:,}", "make it a list of token ids, all ≥ 0")
    return list(ids)


def _check_weights(column: str, weights: Any, count: int) -> list[float]:
    if not isinstance(weights, list | tuple) or len(weights) != count:
        given = f"{len(weights):,}" if isinstance(weights, list | tuple) else f"{weights!r} and no"
        raise BadRow(column, f"holds {given} numbers for {count:,} tokens", "give one for each token of the response")
    for position, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise BadRow(
                column, f"holds {weight!r} at position {position:,}", "make it a list of finite numbers, all ≥ 0"
            )
    return [float(weight) for weight in weights]
