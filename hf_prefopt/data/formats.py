"""The formats of rows: the columns of each format, and how to convert a row to a canonical row.

Each format is an entry of `FORMATS`. `column_layouts.py` converts datasets with other columns to one of them. Prompts
and responses are text or messages:

    prompt, chosen, rejected                   explicit prompt
    chosen, rejected                           implicit prompt: both responses begin with it
    prompt_ids, chosen_ids, rejected_ids       already tokenized; optionally with chosen_token_weights and
                                               rejected_token_weights, a number for each response token
    … and reference, or reference_ids          triples: a pair and a third, gold response
    prompt, completion, label                  a response that is desirable (true) or undesirable (false)
    completion, label                          a conversation whose last answer is desirable or undesirable
    … and quantile instead of label            a response and its quantile among the reference's responses, from 0 to 1
    prompt, responses, ranks                   a list of responses; smaller ranks are better
    prompt, responses, scores                  a list of responses; larger scores are better

Rows of messages may also have `tools` and `chat_template_kwargs`. A prepared row gets two groups of columns:

    example columns     how its responses are compared: `pairs`, `golds`, `labels`, `quantiles`, `ranks`, `scores`,
                        `token_weights`
    optional columns    a number for each example, such as `weights`; see `ExampleKind.optional_columns`
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

from hf_prefopt.config_checks import check_template_kwargs
from hf_prefopt.data.contents import Content, read_content, read_responses
from hf_prefopt.data.conversations import join_conversation
from hf_prefopt.data.preferences import read_label, read_quantile
from hf_prefopt.data.rows import (
    BadRow,
    CanonicalRow,
    check_ids,
    check_list,
    check_numbers,
    check_text_prompt,
    check_text_response,
    echoes_prompt,
    read_json,
    take_off_prompt,
)
from hf_prefopt.data.transcripts import has_later_turn, is_transcript, read_transcript, split_transcripts
from hf_prefopt.kinds import LISTS, PAIRS, SCORED, TRIPLES, UNPAIRED, ExampleKind

_TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")


@dataclass(frozen=True)
class Reading:
    """How to read rows.

    Attributes:
        as_messages: Whether text is converted to messages. If False, a row that contains only text stays text.
        continues: Whether responses may continue an assistant message at the end of the prompt.
    """

    as_messages: bool = False
    continues: bool = True


@dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    Attributes:
        name: Name of the format in error messages.
        kind: Kind of examples in its rows.
        columns: Columns that a dataset of this format must have.
        reader: Function that converts a raw row to the canonical row, given `columns`.
        has_token_weights: Whether its rows have token weights.
    """

    name: str
    kind: ExampleKind
    columns: tuple[str, ...]
    reader: Callable[[Mapping[str, Any], tuple[str, ...], Reading], CanonicalRow]
    has_token_weights: bool = False

    @property
    def example_columns(self) -> tuple[str, ...]:
        """The example columns of its prepared rows."""
        return (*self.kind.columns, *["token_weights"] * self.has_token_weights)

    def read(self, row: Mapping[str, Any], how: Reading = Reading()) -> CanonicalRow:
        """Return the canonical row of a raw row. Raises `BadRow` if the row cannot be used."""
        return self.reader(row, self.columns, how)


def optional_columns(kind: ExampleKind, columns: Collection[str]) -> dict[str, str]:
    """Return the raw column for each optional prepared column: the first of its names that the raw rows have."""
    found = {name: [c for c in column.columns if c in columns] for name, column in kind.optional_columns.items()}
    return {name: present[0] for name, present in found.items() if present}


def _read_explicit(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a prompt and responses, given as text or messages."""
    responses = read_responses({column: row.get(column) for column in columns[1:]})
    is_talk = all(isinstance(response, list) for response in responses.values())
    # Some rows of a dataset may have a prompt, and others whole conversations that contain the prompt.
    prompt = None if row.get(columns[0]) is None and is_talk else read_content(columns[0], row.get(columns[0]))
    return _canonical_row(prompt, responses, row, _pair(responses), how)


def _read_implicit(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read responses that begin with their prompt. Messages and transcripts are split here, text after tokenization."""
    responses = read_responses({column: row.get(column) for column in columns})
    return _canonical_row(None, responses, row, _pair(responses), how)


def _read_tokens(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read lists of token ids, which are used unchanged."""
    prompt, *responses = [check_ids(column, row.get(column)) for column in columns]
    for column, ids in zip(columns[1:], responses, strict=True):
        if not ids:
            raise BadRow(column, "is empty")
    return CanonicalRow("tokens", prompt, responses, columns[1:], _pair(responses))


def _read_weighted_tokens(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read lists of token ids, and a weight ≥ 0 for each response token."""
    pair = _read_tokens(row, columns[:3], how)
    weights = [
        check_numbers(column, row.get(column), len(ids), "token", low=0)
        for column, ids in zip(columns[3:], pair.responses, strict=True)
    ]
    pair.example_columns["token_weights"] = weights
    return pair


def _read_labeled(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a response, its label, and the prompt, unless the response is a whole conversation."""
    return _single_response(row, columns, {"labels": [read_label("label", row.get("label"))]}, how)


def _read_scored(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a response and its quantile; see `_read_labeled`."""
    return _single_response(row, columns, {"quantiles": [read_quantile("quantile", row.get("quantile"))]}, how)


def _single_response(
    row: Mapping[str, Any], columns: tuple[str, ...], example_columns: dict[str, list], how: Reading
) -> CanonicalRow:
    prompt = read_content("prompt", row.get("prompt")) if "prompt" in columns else None
    responses = {"completion": read_content("completion", row.get("completion"))}
    return _canonical_row(prompt, responses, row, example_columns, how)


def _read_list(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a prompt, a list of responses, and a rank or score for each. Ranks are computed from scores, with ties."""
    listed = check_list("responses", row.get("responses"), "two or more responses")
    if len(listed) < 2:
        raise BadRow("responses", f"holds {len(listed)} responses", "give every prompt at least two")
    numbers = check_numbers(columns[-1], row.get(columns[-1]), len(listed), "response")
    scores = numbers if columns[-1] == "scores" else []
    ranks = [1.0 + sum(other > score for other in scores) for score in scores] or numbers
    if scores and row.get("ranks") is not None:
        _check_same_order(ranks, check_numbers("ranks", row["ranks"], len(listed), "response"))
    named = {f"responses[{place}]": response for place, response in enumerate(listed)}
    responses = read_responses(named)
    prompt = read_content("prompt", row.get("prompt"))
    return _canonical_row(prompt, responses, row, {"ranks": ranks, "scores": scores}, how)


def _check_same_order(ranks: list[float], given: list[float]) -> None:
    """Raise `BadRow` if the given ranks order the responses differently than the scores."""
    for left, right in combinations(range(len(ranks)), 2):
        if (ranks[left] - ranks[right]) * (given[left] - given[right]) < 0:
            cure = "remove one of the columns: remove_columns=['ranks'] or remove_columns=['scores']"
            raise BadRow("ranks", "order the responses differently than `scores`", cure)


def _canonical_row(
    prompt: Content | None,
    responses: dict[str, Content],
    row: Mapping[str, Any],
    example_columns: dict[str, list],
    how: Reading,
) -> CanonicalRow:
    """Return a row of text if all contents are text and `how` allows it, or else a row of messages."""
    contents = responses.values() if prompt is None else (prompt, *responses.values())
    if not how.as_messages and all(isinstance(content, str) for content in contents):
        return _text_row(cast(str | None, prompt), cast(dict[str, str], responses), row, example_columns)
    if prompt is None:
        responses = {column: _whole_conversation(column, content, how) for column, content in responses.items()}
    talk = join_conversation(prompt, responses, how.continues)
    # None instead of an empty list, because some templates write a heading for an empty list of tools.
    tools = [_read_tool(tool) for tool in read_json(row, "tools", list) or ()] or None
    template_kwargs = _read_template_kwargs(row)
    values, names = [*talk.responses.values()], tuple(talk.responses)
    unread = {} if talk.prompt_is_read or prompt is None else {"prompt": prompt}
    return CanonicalRow("messages", talk.prompt, values, names, example_columns, tools, template_kwargs, unread)


def _read_tool(tool: Any) -> Any:
    """Return a tool's schema, which may be stored as JSON."""
    return read_json({"tools": tool}, "tools", dict) if isinstance(tool, str) else tool


def _read_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = read_json(row, "chat_template_kwargs", dict) or {}
    try:
        check_template_kwargs("it", kwargs)
    except ValueError as error:
        raise BadRow("chat_template_kwargs", f"cannot be used: {error}") from None
    return kwargs


def _text_row(
    prompt: str | None, responses: dict[str, str], row: Mapping[str, Any], example_columns: dict[str, list]
) -> CanonicalRow:
    """Return a row of text. The prompt of transcripts is their common beginning up to the last assistant marker."""
    if read_json(row, "tools", list):
        raise BadRow("tools", "require messages, because only a chat template can write them", "use messages")
    texts = {column: check_text_response(column, text) for column, text in responses.items()}
    names, repeated = tuple(texts), False
    if prompt is not None:
        texts = take_off_prompt(check_text_prompt("prompt", prompt), texts)
        repeated = texts is not responses and any(texts[column] != responses[column] for column in names)
        echoed = not repeated and echoes_prompt(prompt, texts)
        return CanonicalRow("text", prompt, [*texts.values()], names, example_columns, repeated=repeated, echoed=echoed)
    end = split_transcripts([*texts.values()])
    if end is None:
        return CanonicalRow("text", None, [*texts.values()], names, example_columns)
    rest = {column: check_text_response(column, text[end:]) for column, text in texts.items()}
    for column, text in rest.items():
        if has_later_turn(text):
            cure = "read the transcripts as messages (text_as='messages'), drop the row or pass on_bad_rows='drop'"
            raise BadRow(column, "has a user turn after the assistant's turn", cure)
    return CanonicalRow("text", texts[names[0]][:end], [*rest.values()], names, example_columns)


def _whole_conversation(column: str, content: Content, how: Reading) -> Content:
    """Return the messages of a transcript that contains its prompt; other content is returned unchanged."""
    if isinstance(content, str) and is_transcript(content):
        return read_transcript(content)
    return content


def _pair(responses: Collection) -> dict[str, list]:
    """Return the example columns of a pair, or of a triple if there are three responses."""
    return {"pairs": [[0, 1]]} if len(responses) == 2 else {"pairs": [[0, 1]], "golds": [2]}


_PAIR = ("chosen", "rejected")
_TRIPLE = (*_PAIR, "reference")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")

# When the result of a reader changes, increase `_CACHE_VERSION` in `prepare`.
FORMATS: dict[str, RowFormat] = {
    row_format.name: row_format
    for row_format in (
        RowFormat(
            "tokenized pairs with weights",
            PAIRS,
            (*_TOKENS, *_TOKEN_WEIGHTS),
            _read_weighted_tokens,
            has_token_weights=True,
        ),
        RowFormat("tokenized pairs", PAIRS, _TOKENS, _read_tokens),
        RowFormat("tokenized triples", TRIPLES, (*_TOKENS, "reference_ids"), _read_tokens),
        RowFormat("pairs", PAIRS, ("prompt", *_PAIR), _read_explicit),
        RowFormat("pairs that begin with their prompt", PAIRS, _PAIR, _read_implicit),
        RowFormat("triples", TRIPLES, ("prompt", *_TRIPLE), _read_explicit),
        RowFormat("triples that begin with their prompt", TRIPLES, _TRIPLE, _read_implicit),
        RowFormat("labeled responses", UNPAIRED, ("prompt", "completion", "label"), _read_labeled),
        RowFormat("labeled conversations", UNPAIRED, ("completion", "label"), _read_labeled),
        RowFormat("scored responses", SCORED, ("prompt", "completion", "quantile"), _read_scored),
        RowFormat("scored conversations", SCORED, ("completion", "quantile"), _read_scored),
        RowFormat("scored lists", LISTS, ("prompt", "responses", "scores"), _read_list),
        RowFormat("ranked lists", LISTS, ("prompt", "responses", "ranks"), _read_list),
    )
}
