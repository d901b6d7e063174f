"""The formats of rows: the columns of each format, and the function that converts its rows to a `CanonicalRow`.

Each format is an entry of `FORMATS`. `column_layouts.py` converts datasets with other columns to one of the formats.
Prompts and responses are text or messages, except in the tokenized formats. A format has these columns:

    prompt, chosen, rejected                   explicit prompt
    chosen, rejected                           implicit prompt: both responses begin with it
    prompt_ids, chosen_ids, rejected_ids       already tokenized; optionally with chosen_token_weights and
                                               rejected_token_weights, a number for each response token
    those of a pair, and reference             triples: a pair and a third response, the gold response
        (or reference_ids, if tokenized)
    prompt, completion, label                  a response that is desirable (true) or undesirable (false)
    completion, label                          a conversation whose last answer is desirable or undesirable
    quantile instead of label                  a response, and its quantile (from 0 to 1) among responses of the
                                               reference model
    prompt, responses, ranks                   a list of responses; smaller ranks are better
    prompt, responses, scores                  a list of responses; larger scores are better

Rows of messages may also have the columns `tools` and `chat_template_kwargs`. In addition to its tokens, a prepared row
gets two groups of columns:

    example columns     say how the responses are compared: `pairs`, `golds`, `labels`, `quantiles`, `ranks`, `scores`,
                        `token_weights`
    optional columns    hold a number for each example, such as `weights`; see `ExampleKind.optional_columns`
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
    """Options for reading rows.

    Attributes:
        as_messages: Whether text is converted to messages. If False, a row that contains only text stays text.
        continues: Whether the prompt may end with the beginning of an assistant message that the responses continue.
    """

    as_messages: bool = False
    continues: bool = True


@dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    Attributes:
        name: Name of the format in error messages.
        kind: Kind of examples in its rows, such as pairs or lists.
        columns: Columns that a dataset of this format must have.
        reader: Function that converts a raw row to a `CanonicalRow`. Its arguments are the row, `columns` and a
            `Reading`.
        has_token_weights: Whether its rows have token weights.
    """

    name: str
    kind: ExampleKind
    columns: tuple[str, ...]
    reader: Callable[[Mapping[str, Any], tuple[str, ...], Reading], CanonicalRow]
    has_token_weights: bool = False

    @property
    def example_columns(self) -> tuple[str, ...]:
        """The names of the example columns of prepared rows, which say how the responses are compared."""
        return (*self.kind.columns, *["token_weights"] * self.has_token_weights)

    def read(self, row: Mapping[str, Any], how: Reading = Reading()) -> CanonicalRow:
        """Convert a raw row to a `CanonicalRow`. Raises `BadRow` if the row cannot be used."""
        return self.reader(row, self.columns, how)


def optional_columns(kind: ExampleKind, columns: Collection[str]) -> dict[str, str]:
    """Find the optional columns in raw rows.

    Args:
        kind: Kind of examples, which defines the optional columns.
        columns: Names of the columns of the raw rows.

    Returns:
        Map from the name of an optional column in prepared rows to its name in the raw rows. If the raw rows have it
        under several of the accepted names, this is the first of them.
    """
    found = {name: [c for c in column.columns if c in columns] for name, column in kind.optional_columns.items()}
    return {name: present[0] for name, present in found.items() if present}


def _read_explicit(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a row with a prompt and responses, each of which is text or messages."""
    responses = read_responses({column: row.get(column) for column in columns[1:]})
    is_talk = all(isinstance(response, list) for response in responses.values())
    # A row without a prompt is accepted if its responses are whole conversations, which contain the prompt. Other rows
    # of the dataset may have a prompt.
    prompt = None if row.get(columns[0]) is None and is_talk else read_content(columns[0], row.get(columns[0]))
    return _canonical_row(prompt, responses, row, _pair(responses), how)


def _read_implicit(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a row of responses that begin with their prompt.

    Messages and transcripts are split into prompt and responses here. Other text is split after tokenization.
    """
    responses = read_responses({column: row.get(column) for column in columns})
    return _canonical_row(None, responses, row, _pair(responses), how)


def _read_tokens(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a row of token ids. They are used unchanged."""
    prompt, *responses = [check_ids(column, row.get(column)) for column in columns]
    for column, ids in zip(columns[1:], responses, strict=True):
        if not ids:
            raise BadRow(column, "is empty")
    return CanonicalRow("tokens", prompt, responses, columns[1:], _pair(responses))


def _read_weighted_tokens(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a row of token ids with a weight for each response token. Weights must be ≥ 0."""
    pair = _read_tokens(row, columns[:3], how)
    weights = [
        check_numbers(column, row.get(column), len(ids), "token", low=0)
        for column, ids in zip(columns[3:], pair.responses, strict=True)
    ]
    pair.example_columns["token_weights"] = weights
    return pair


def _read_labeled(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a row with a response and its label. There is also a prompt, unless the response is a whole conversation."""
    return _single_response(row, columns, {"labels": [read_label("label", row.get("label"))]}, how)


def _read_scored(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a row like `_read_labeled`, but with a quantile instead of a label."""
    return _single_response(row, columns, {"quantiles": [read_quantile("quantile", row.get("quantile"))]}, how)


def _single_response(
    row: Mapping[str, Any], columns: tuple[str, ...], example_columns: dict[str, list], how: Reading
) -> CanonicalRow:
    prompt = read_content("prompt", row.get("prompt")) if "prompt" in columns else None
    responses = {"completion": read_content("completion", row.get("completion"))}
    return _canonical_row(prompt, responses, row, example_columns, how)


def _read_list(row: Mapping[str, Any], columns: tuple[str, ...], how: Reading) -> CanonicalRow:
    """Read a row with a prompt, a list of responses, and a rank or score for each response.

    If there are scores, ranks are computed from them, and equal scores give equal ranks.
    """
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
    """Raise `BadRow` if the ranks in a dataset order the responses differently than its scores.

    Args:
        ranks: The ranks that were computed from the scores.
        given: The ranks in the dataset.
    """
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
    """Return a row of text if all contents are text and `how.as_messages` is False, or else a row of messages.

    Args:
        prompt: Content of the prompt. None if the responses contain the prompt.
        responses: Contents of the responses, keyed by column.
        row: The raw row, for the columns `tools` and `chat_template_kwargs`.
        example_columns: The example columns of the row.
        how: Options for reading the row.
    """
    contents = responses.values() if prompt is None else (prompt, *responses.values())
    if not how.as_messages and all(isinstance(content, str) for content in contents):
        return _text_row(cast(str | None, prompt), cast(dict[str, str], responses), row, example_columns)
    if prompt is None:
        responses = {column: _whole_conversation(column, content, how) for column, content in responses.items()}
    talk = join_conversation(prompt, responses, how.continues)
    # An empty list of tools becomes None, because some templates would write a heading for it.
    tools = [_read_tool(tool) for tool in read_json(row, "tools", list) or ()] or None
    template_kwargs = _read_template_kwargs(row)
    values, names = [*talk.responses.values()], tuple(talk.responses)
    unread = {} if talk.prompt_is_read or prompt is None else {"prompt": prompt}
    return CanonicalRow("messages", talk.prompt, values, names, example_columns, tools, template_kwargs, unread)


def _read_tool(tool: Any) -> Any:
    """Return the schema of a tool. If it is stored as JSON, it is parsed."""
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
    """Return a row of text.

    If there is no prompt and the responses are transcripts, the prompt is the beginning that they share, up to and
    including its last assistant marker.

    Args:
        prompt: The prompt. None if the responses contain the prompt.
        responses: The responses, keyed by column.
        row: The raw row, which must not have tools.
        example_columns: The example columns of the row.
    """
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
    """Return the messages of a response that is a transcript. Other content is returned unchanged."""
    if isinstance(content, str) and is_transcript(content):
        return read_transcript(content)
    return content


def _pair(responses: Collection) -> dict[str, list]:
    """Return the example columns for the responses of a row: a pair of two, or a triple of three."""
    return {"pairs": [[0, 1]]} if len(responses) == 2 else {"pairs": [[0, 1]], "golds": [2]}


_PAIR = ("chosen", "rejected")
_TRIPLE = (*_PAIR, "reference")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")

# If you change the result of a reader, increase `_CACHE_VERSION` in `prepare.py`.
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
