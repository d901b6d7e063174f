"""The canonical row: what the prompt and the responses of a row may be, checked, with errors that name the column.

Without a column `prompt`, texts begin with their prompt, and that they do is checked here. Which columns make which
format is in `formats`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_prefopt.data.messages import (
    BadRow,
    Kind,
    Message,
    check_messages,
    check_reply,
    count_shared_messages,
    drop_nones,
)

# Letters of scripts that put no blanks between words: two of them count as a word.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\W{UNSPACED}]+")
# As many words in common are no accident; nor is the end of a line, a question, or the name of a speaker.
PROMPT_WORDS = 4
_PROMPT_ENDS = re.compile(r"[\n?:？：]")
# The writing of JSON, of Python and of NumPy.
_MESSAGES = re.compile(
    r"""\[?\s*\{.*["'](role|from)["']\s*:\s*["'](system|developer|user|human|assistant|gpt|model|tool)["'].*\}\s*\]?""",
    re.DOTALL,
)
_CONTENT = re.compile(r"""["'](content|value)["']\s*:""")
_LIST = re.compile(r"""\[\s*(["']).*\1\s*\]""", re.DOTALL)


def check_text(column: str, text: str) -> str:
    """The text. Raises `BadRow` where it is messages, written down as JSON or as Python prints them."""
    stripped = text.strip()
    if _MESSAGES.fullmatch(stripped) and _CONTENT.search(stripped):
        cure = "read them, as in rows.map(lambda row: {'X': json.loads(row['X'])})".replace("X", column)
        raise BadRow(column, "is text that writes down messages, which would be trained on as they are written", cure)
    return text


def check_text_prompt(column: str, text: str) -> str:
    """Like `check_text`, and also reject a prompt that is a list of texts written as a string."""
    if _LIST.fullmatch(text.strip()):
        raise BadRow(column, "is text that writes down a list", "read it, and make each row one prompt: json.loads")
    return check_text(column, text)


def check_text_response(column: str, text: str) -> str:
    """As `check_text`; a response says something."""
    if not text.strip():
        raise BadRow(column, "is empty" if not text else "is only whitespace")
    return check_text(column, text)


def refuse_repeated_prompt(prompt: str, responses: Mapping[str, str]) -> None:
    """Raise `BadRow` where all responses, by column, begin with the prompt: it would be there twice.

    One response may well echo a prompt, and a greeting answers a greeting.
    """
    said = prompt.strip()
    if beginning([said]) >= PROMPT_WORDS and all(text.lstrip().startswith(said) for text in responses.values()):
        cure = "remove the `prompt` column, or take it off the responses"
        raise BadRow(next(iter(responses)), "repeats the text of `prompt`", cure)


def refuse_unlike_beginnings(texts: Mapping[str, str]) -> None:
    """Raise `BadRow` where texts that should begin with one prompt, by column, have no word of it in common."""
    (first, begun), *others = texts.items()
    for column, text in others:
        if not beginning([begun, text]):
            problem = f"and `{first}` do not begin with the same word, so there is no prompt in them"
            raise BadRow(column, problem, "add a `prompt` column (with '' where there is none)")


def beginning(texts: Sequence[str]) -> float:
    """How many words the texts all begin with; infinitely many where these hold the end of a line or a question."""
    first, *others = [text.lstrip()[:400] for text in texts]
    if _PROMPT_ENDS.search(first[: min((shared_length(first, other) for other in others), default=len(first))]):
        return math.inf
    words = _WORD.findall(first)
    return min((shared_length(words, _WORD.findall(other)) for other in others), default=len(words))


def shared_length(left: Sequence, right: Sequence) -> int:
    """The length of the longest common prefix of two texts or lists."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:  # the ordinary case, at C speed
        return shorter
    return next(at for at in range(shorter) if left[at] != right[at])


@dataclass(frozen=True)
class CanonicalRow:
    """One prompt and its K responses, all of one kind.

    Attributes:
        kind: what prompt and responses are: text, lists of messages, or lists of token ids.
        prompt: the prompt; None for texts that carry it inside (it is split off once there are tokens).
        responses: the K responses; for a pair the chosen, then the rejected one, and a triple's gold one.
        columns: the column that each response came from, for error messages.
        pairs: `(chosen, rejected)` indices into `responses`.
        example_columns: what the row says of each response, by prepared column: `labels`, or `ranks`, `scores`,
            or `golds`, or `token_weights`.
        tools: tool schemas for the chat template, or None.
        chat_template_kwargs: further arguments of the chat template.
    """

    kind: Kind
    prompt: Any
    responses: list[Any]
    columns: tuple[str, ...]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    example_columns: dict[str, list] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_unlike(self) -> bool:
        """Whether these are texts that should begin with their prompt and hardly begin alike."""
        return self.kind == "text" and self.prompt is None and beginning(self.responses) < PROMPT_WORDS


def canonical_row(
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


@dataclass(frozen=True)
class KindChecks:
    """What differs between text and messages: how a prompt and a response are checked, an implicit prompt split."""

    prompt: Callable[[str, Any], Any]
    response: Callable[[str, Any], Any]
    split: Callable[[dict[str, Any]], tuple[Any, list[Any]]]


def _leave_texts_whole(texts: dict[str, str]) -> tuple[None, list[str]]:
    return None, [check_text_response(column, text) for column, text in texts.items()]


def _check_message_response(column: str, messages: list[Any]) -> list[Message]:
    return check_reply(column, check_messages(column, messages))


def _split_messages(conversations: dict[str, list[Any]]) -> tuple[list[Message], list[list[Message]]]:
    """The messages that all conversations begin with, and the rest of each."""
    checked = {column: _check_message_response(column, messages) for column, messages in conversations.items()}
    shared = count_shared_messages(checked)
    prompt = next(iter(checked.values()))[:shared]
    return prompt, [check_reply(column, messages[shared:]) for column, messages in checked.items()]


CHECKS: dict[str, KindChecks] = {
    "text": KindChecks(check_text_prompt, check_text_response, _leave_texts_whole),
    "messages": KindChecks(check_messages, _check_message_response, _split_messages),
}


def _kind_of(column: str, value: Any) -> Kind:
    if value is None:
        raise BadRow(column, "is missing")
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "messages"
    raise BadRow(column, f"is of type {type(value).__name__}", "make it text or a list of messages")


def shared_kind(row: Mapping[str, Any], columns: tuple[str, ...]) -> Kind:
    """The one kind that all these columns have. Raises `BadRow` for the first that has another."""
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


def check_ids(column: str, ids: Any) -> list[int]:
    """A column's token ids. Raises `BadRow` where it holds something else."""
    if ids is None:
        raise BadRow(column, "is missing")
    if not isinstance(ids, list | tuple):
        raise BadRow(column, f"is of type {type(ids).__name__}", "make it a list of token ids")
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise BadRow(column, f"holds {token!r} at position {position:,}", "make it a list of token ids, all ≥ 0")
    return list(ids)


def check_weights(column: str, weights: Any, count: int) -> list[float]:
    """A column's weights, one ≥ 0 for each of `count` tokens. Raises `BadRow` where it holds something else."""
    if not isinstance(weights, list | tuple) or len(weights) != count:
        given = f"{len(weights):,}" if isinstance(weights, list | tuple) else f"{weights!r} and no"
        raise BadRow(column, f"holds {given} numbers for {count:,} tokens", "give one for each token of the response")
    for position, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise BadRow(
                column, f"holds {weight!r} at position {position:,}", "make it a list of finite numbers, all ≥ 0"
            )
    return [float(weight) for weight in weights]
