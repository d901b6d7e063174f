"""The canonical row (a prompt with its responses), the error for an unusable row, and checks of values.

The values are texts, numbers and token ids; messages.py checks messages. If there is no prompt column, each text must
begin with its prompt. This module also checks whether such texts begin with the same words. formats.py defines the
columns of each format.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

ContentType = Literal["text", "messages", "tokens"]

DROP_CURE = "drop the row or pass on_bad_rows='drop'"


class BadRow(ValueError):
    """An error for a row that cannot be trained on. It names the column, the problem and the fix."""

    def __init__(self, column: str, problem: str, cure: str = DROP_CURE):
        super().__init__(f"`{column}` {problem}; {cure}")
        self.parts = (column, problem, cure)

    def renamed(self, names: Mapping[str, str]) -> "BadRow":
        """Return this error with other column names. `names` maps the names in this error to those in the dataset."""
        column, problem, cure = self.parts
        problem = re.sub("`([^`]+)`", lambda found: f"`{names.get(found[1], found[1])}`", problem)
        return type(self)(names.get(column, column), problem, cure)


class Tie(BadRow):
    """An error for two responses of which neither is better. The row is valid, but it cannot be used as a pair."""


@dataclass(frozen=True)
class CanonicalRow:
    """One prompt and its K responses, independent of the format of the dataset.

    Attributes:
        content_type: Whether prompt and responses are text, lists of messages, or lists of token ids.
        prompt: The prompt. None if the responses are texts that begin with the prompt; tokenize.py then finds where the
            prompt ends.
        responses: The K responses: chosen, then rejected for a pair; the gold response of a triple is the last.
        columns: The column of each response, for error messages.
        example_columns: How the responses are compared, keyed by prepared column (`pairs`, `golds`, `labels`, `ranks`,
            `scores` or `token_weights`).
        tools: Tool schemas for the chat template, or None.
        chat_template_kwargs: Other arguments of the chat template.
        unread: Values that were not used, because the responses already contain them, keyed by the format's columns.
        repeated: Whether the responses began with the prompt, and it was removed from them.
        echoed: Whether the responses begin with the prompt, but the prompt was not removed from them, because it is so
            short that they may begin with the same words by chance.
        against: Whether the chosen response has the lower score, according to scores that were read to find the pair.
    """

    content_type: ContentType
    prompt: Any
    responses: list[Any]
    columns: tuple[str, ...]
    example_columns: dict[str, list]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, Any] = field(default_factory=dict)
    repeated: bool = False
    echoed: bool = False
    against: bool = False


def read_json(row: Mapping[str, Any], column: str, expected: type) -> Any:
    """Return a column's list or dict, which may be stored as JSON; None if the value is missing.

    In a list or dict, keys whose value is None are dropped (see `drop_nones`). In JSON, null is kept, because it was
    written on purpose.

    Raises:
        BadRow: If the JSON is invalid, or the value has another type.
    """
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            cure = f"give a {expected.__name__} or valid JSON"
            raise BadRow(column, f"is text but not JSON ({error})", cure) from None
    else:
        value = drop_nones(value)
    if value is not None and not isinstance(value, expected):
        raise BadRow(column, f"is of type {type(value).__name__}", f"make it a {expected.__name__} or its JSON")
    return value


def drop_nones(value: Any) -> Any:
    """Return the value without keys whose value is None, at any depth.

    Arrow stores the same keys for every struct of a column. For example, a key of one row's tool call is added to all
    other rows, with the value None.
    """
    if isinstance(value, dict):
        return {key: drop_nones(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nones(item) for item in value]
    return value


def check_list(column: str, value: Any, items: str) -> list[Any]:
    """Return a column's list, which may be stored as JSON.

    Raises `BadRow` for any other value. `items` says what the list must contain, for the error.
    """
    value = as_list(value)
    if value is None:
        raise BadRow(column, "is missing")
    if not isinstance(value, list | tuple):
        raise BadRow(column, f"is of type {type(value).__name__}", f"make it a list of {items}")
    return list(value)


def check_ids(column: str, value: Any) -> list[int]:
    """Return a column's token ids. Raises `BadRow` unless the value is a list of integers ≥ 0."""
    ids = check_list(column, value, "token ids")
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            problem = f"contains {token!r} at position {position:,}"
            raise BadRow(column, problem, "make it a list of token ids, all ≥ 0")
    return ids


def check_numbers(column: str, value: Any, count: int, per: str, low: float = -math.inf) -> list[float]:
    """Return a column's list of `count` finite numbers ≥ `low`.

    `per` says what each number belongs to ("response" or "token"), for errors.

    Raises:
        BadRow: If the value is not a list, its length differs from `count`, or an entry is not a valid number.
    """
    given = check_list(column, value, "numbers")
    if len(given) != count:
        raise BadRow(column, f"has {len(given):,} numbers for {count:,} {per}s", f"give one number per {per}")
    numbers = [as_number(one) for one in given]
    for position, number in enumerate(numbers):
        if not math.isfinite(number) or number < low:
            bound = "" if low == -math.inf else f", all ≥ {low:g}"
            cure = f"make it a list of finite numbers{bound}"
            raise BadRow(column, f"contains {given[position]!r} at position {position:,}", cure)
    return numbers


_NUMERAL = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE | re.ASCII)


def as_number(value: Any) -> float:
    """Return a number, or a number stored as text, as a float. Return NaN for any other value, including booleans."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    is_numeral = isinstance(value, str) and _NUMERAL.fullmatch(value) is not None
    return float(value) if is_number or is_numeral else math.nan


def as_list(value: Any) -> Any:
    """Return the list if the value is a text that contains a list as JSON. Return any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


# Letters of scripts that put no spaces between words. Two of these letters count as a word.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\W{UNSPACED}]+")
# Two answers may share their first words by chance. If they share at least this many words, or a line end, a question
# mark or a colon (as after a speaker's name), chance is unlikely, so the shared beginning counts as a prompt.
PROMPT_WORDS = 4
_PROMPT_ENDS = re.compile(r"[\n?:？：]")
# Texts that are messages, written in the notation of JSON, Python or NumPy.
_WRITTEN_MESSAGES = re.compile(
    r"""\[?\s*\{.*["'](role|from)["']\s*:\s*["'](system|developer|user|human|assistant|gpt|model|tool)["'].*\}\s*\]?""",
    re.DOTALL,
)
_BEGUN_MESSAGES = re.compile(r"""\[?\s*\{\s*"(role|from|content|value)"\s*:""")
_WRITTEN_CONTENT = re.compile(r"""["'](content|value)["']\s*:""")
_WRITTEN_LIST = re.compile(r"""\[\s*(["']).*\1\s*\]""", re.DOTALL)


def check_text_prompt(column: str, text: str) -> str:
    """Return the text. Raises `BadRow` if the text contains messages or a list written as text."""
    if _WRITTEN_LIST.fullmatch(text.strip()):
        raise BadRow(column, "contains a list written as text", "parse it (json.loads), and make each row one prompt")
    return _check_text(column, text)


# White space and invisible characters: zero-width characters, marks of text direction, and the byte order mark.
_INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]*")


def is_blank(text: str) -> bool:
    """Return True if a text is empty or has only white space and invisible characters."""
    return _INVISIBLE.fullmatch(text) is not None


def check_text_response(column: str, text: str) -> str:
    """Return the text. Raises `BadRow` if the text is only whitespace, or contains messages written as text."""
    if is_blank(text):
        raise BadRow(column, "is only whitespace" if text else "is empty")
    return _check_text(column, text)


def _check_text(column: str, text: str) -> str:
    unquoted = _unquoted(text.strip())
    if _WRITTEN_CONTENT.search(unquoted) is None:
        return text
    if _WRITTEN_MESSAGES.fullmatch(unquoted):
        reader = next((name for name, read in _READERS.items() if _is_readable(text, read)), None)
        cure = f"read them, as in rows.map(lambda row: {{{column!r}: {reader}(row[{column!r}])}})"
        problem = "contains messages written as text, which would be trained on as plain text"
        raise BadRow(column, problem, cure if reader else "save the rows as JSON Lines or Parquet, which keep lists")
    if _BEGUN_MESSAGES.match(unquoted) and _is_cut_off(unquoted):
        raise BadRow(column, "contains messages as JSON that is cut off at its end", DROP_CURE)
    return text


# Functions that parse a text, keyed by the name under which a user calls them.
_READERS: dict[str, Callable[[str], Any]] = {"json.loads": json.loads, "ast.literal_eval": ast.literal_eval}


def _is_readable(text: str, read: Callable[[str], Any]) -> bool:
    try:
        read(text.strip())
    except (ValueError, SyntaxError):
        return False
    return True


def _is_cut_off(text: str) -> bool:
    """Return True if a text is JSON whose end is missing."""
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or error.msg.startswith("Unterminated string")
    return False


def _unquoted(text: str) -> str:
    """Return the text inside a JSON string; any other text is returned unchanged."""
    if not (text.startswith('"') and text.endswith('"')):
        return text
    try:
        read = json.loads(text)
    except json.JSONDecodeError:
        return text
    return read.strip() if isinstance(read, str) else text


def take_off_prompt(prompt: str, responses: dict[str, str]) -> dict[str, str]:
    """Remove the prompt from the responses (keyed by column) if each response is the prompt followed by more text.

    A prompt with fewer than `PROMPT_WORDS` words is not removed: a response may begin with the same few words by
    chance, such as a greeting that answers the same greeting.
    """
    begin = prompt.strip()
    if not all(text.lstrip().startswith(begin) for text in responses.values()):
        return responses
    if count_shared_words([begin]) < PROMPT_WORDS:
        return responses
    # If the prompt ends with white space, the white space after it in a response is removed, too.
    ends_blank = len(prompt) > len(prompt.rstrip())
    rest = {column: text.lstrip()[len(begin) :] for column, text in responses.items()}
    rest = {column: text.lstrip() if ends_blank else text for column, text in rest.items()}
    return rest if all(map(str.strip, rest.values())) else responses


def echoes_prompt(prompt: str, responses: Mapping[str, str]) -> bool:
    """Return True if all responses begin with the prompt, and no letter or digit directly follows the prompt.

    White space at the start and end of the prompt is ignored. Return False for an empty prompt.
    """
    begin = prompt.strip()
    rest = [text.lstrip()[len(begin) :] for text in responses.values() if text.lstrip().startswith(begin)]
    return begin != "" and len(rest) == len(responses) and not any(text[:1].isalnum() for text in rest)


def reject_texts_without_prompt(row: CanonicalRow, needs_prompt: bool = False) -> None:
    """Raise `BadRow` if the texts of a row without a prompt column do not begin with the same word.

    Such texts must begin with their prompt. With `needs_prompt`, raise it for every row of text without a prompt
    column, because it is unknown where the prompt ends.
    """
    if row.content_type != "text" or row.prompt is not None:
        return
    if needs_prompt:
        problem = "is text that begins with its prompt, but these losses need to know where the prompt ends"
        cure = "add a `prompt` column, or mark the turns as in '\\n\\nHuman: …\\n\\nAssistant: …'"
        raise BadRow(row.columns[0], problem, cure)
    (first, text), *others = zip(row.columns, row.responses, strict=True)
    for column, other in others:
        if not count_shared_words([text, other]):
            problem = f"and `{first}` do not begin with the same word, so there is no prompt in them"
            raise BadRow(column, problem, "add a `prompt` column (with '' if there is none)")


def probably_lacks_prompt(row: CanonicalRow) -> bool:
    """Return True if a row of text has no prompt, and its texts share less than `PROMPT_WORDS` words at the start."""
    return row.content_type == "text" and row.prompt is None and count_shared_words(row.responses) < PROMPT_WORDS


def count_shared_words(texts: Sequence[str]) -> float:
    """Return the number of words that all texts begin with.

    Return infinity if the shared beginning contains a line end, a question mark or a colon.
    """
    first, *others = [text.lstrip()[:400] for text in texts]
    if _PROMPT_ENDS.search(first[: min((shared_length(first, other) for other in others), default=len(first))]):
        return math.inf
    words = _WORD.findall(first)
    return min((shared_length(words, _WORD.findall(other)) for other in others), default=len(words))


def shared_length(left: Sequence, right: Sequence) -> int:
    """Return the length of the longest common prefix of two texts or lists."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:  # the usual case, computed in C
        return shorter
    return next(at for at in range(shorter) if left[at] != right[at])
