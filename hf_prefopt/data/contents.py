"""Read the value of a prompt or response column: text, or messages in any of the forms in which datasets store them.

Messages may be stored as a list of messages, as a single message, as JSON, as a struct whose key `messages` holds a
list, or as a struct of lists (the `Sequence` feature of older versions of `datasets`). A message has the keys `role`
and `content`, `from` and `value`, or others (see `messages.py`). A struct may also hold only a text: `{"text": ...}`.
"""

import json
from collections.abc import Mapping
from typing import Any

from hf_prefopt.data.messages import CONTENT_KEYS, ROLE_KEYS, Message, is_role
from hf_prefopt.data.rows import DROP_CURE, BadRow

Content = str | list[Message]


def read_content(column: str, value: Any) -> Content:
    """Return the text, or the messages as a list of dicts. The messages are not checked.

    Args:
        column: Name of the column, for errors.
        value: Value of the column.

    Raises:
        BadRow: If the value is missing, or is neither text nor messages.
    """
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, list | tuple):
        return list(value)
    if value is None:
        raise BadRow(column, "is missing")
    if isinstance(value, Mapping):
        return _read_struct(column, value)
    raise BadRow(column, f"is of type {type(value).__name__}", "make it text or a list of messages")


def read_responses(values: Mapping[str, Any]) -> dict[str, Content]:
    """Return the contents of the responses, keyed by column.

    Raises:
        BadRow: If a response is missing, or is neither text nor messages. Also if one response is messages stored as
            JSON and another response is plain text.
    """
    contents = {column: read_content(column, value) for column, value in values.items()}
    written = [column for column, value in values.items() if isinstance(value, str) and value is not contents[column]]
    if written and any(isinstance(content, str) for content in contents.values()):
        raise BadRow(written[0], "contains messages written as text, but another response is plain text", DROP_CURE)
    return contents


def _read_text(text: str) -> Content:
    """Return the messages if the text is JSON that contains messages, or else the text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    messages = [value] if isinstance(value, dict) else value
    is_conversation = isinstance(messages, list) and messages and all(map(_is_spoken, messages))
    return messages if is_conversation else text


def _read_struct(column: str, value: Mapping[str, Any]) -> Content:
    lists = {key: items for key, items in value.items() if isinstance(items, list | tuple)}
    if any(key in lists for key in ROLE_KEYS) and len({len(items) for items in lists.values()}) == 1:
        return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
    if is_message(value):
        return [dict(value)]
    if [key for key, item in value.items() if item is not None] == ["messages"] and "messages" in lists:
        return list(value["messages"])
    filled = {key: item for key, item in value.items() if item is not None}
    texts = [key for key in CONTENT_KEYS if isinstance(filled.get(key), str)]
    if len(filled) == 1 and texts:
        return _read_text(filled[texts[0]])
    keys, cure = ", ".join(map(repr, value)), "make it text or a list of messages"
    if texts:
        its_text = f"dataset.map(lambda row: {{{column!r}: row[{column!r}][{texts[0]!r}]}})"
        cure = f"if the model should read only the text in it: {its_text}"
    raise BadRow(column, f"is a struct of {keys} and not a message", cure)


def is_message(value: Any) -> bool:
    """Return True if the value is a dict with a key for a role, and a key for content or tool calls."""
    return isinstance(value, Mapping) and any(key in value for key in ROLE_KEYS) and any(key in value for key in _KEYS)


_KEYS = (*CONTENT_KEYS, "tool_calls")


def _is_spoken(value: Any) -> bool:
    """Return True if the value is a message with a known role. A text may also be JSON that holds other objects."""
    return is_message(value) and any(is_role(value.get(key)) for key in ROLE_KEYS)
