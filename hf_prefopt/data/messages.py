"""Check lists of messages, and split conversations into the prompt that they share and their responses.

Each message must have a role, and text or tool calls. Each response must have an assistant message. Images, video and
audio are not supported: `find_media` finds them in messages and in other columns, and they raise an error.
"""

import json
import re
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from hf_prefopt.data.rows import DROP_CURE, BadRow, drop_nones, is_blank

Message = dict[str, Any]

_TEXT_BLOCKS = ("text", "input_text", "output_text")
# Keys under which datasets store the role and the content of a message. The first of each is the standard key.
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "parts")
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "ai", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "function_response"), "tool"),
}
_KNOWN_ROLES = ("user", "assistant", "system", "tool", "developer")


def is_role(name: Any) -> bool:
    """Return True if this is the standard name of a role, or another name that is known to mean such a role."""
    return isinstance(name, str) and (name.lower() in _KNOWN_ROLES or name.lower() in _ROLES)


def check_messages(column: str, messages: Any) -> list[Message]:
    """Check messages, and return them in the standard form.

    Keys whose value is None are removed, and other keys and names for the role and the content are replaced by the
    standard ones. If the content is a list of text blocks, they are joined to one text.

    Args:
        column: Name of the column, for errors.
        messages: The messages.

    Raises:
        BadRow: If a message has no role, if it has neither content nor tool calls, or if its content is not text.
    """
    if not isinstance(messages, list | tuple):
        raise BadRow(column, f"is of type {type(messages).__name__}", "make it text or a list of messages")
    return [_check_message(column, position, message) for position, message in enumerate(messages)]


def _check_message(column: str, position: int, message: Any) -> Message:
    if not isinstance(message, dict):
        problem = f"contains a {type(message).__name__} where message {position} should be"
        raise BadRow(column, problem, "make each message a dict with `role` and `content`")
    if len(message) == 2 and message.get("role") in _KNOWN_ROLES and isinstance(message.get("content"), str):
        return message  # the usual case
    message = drop_nones(message)
    if message.get("role") not in _KNOWN_ROLES or "content" not in message:
        message = _with_our_names(column, position, message)
    role, content = message["role"], message.get("content")
    where = f"message {position} ({role})"
    if message.get("tool_calls"):
        message["tool_calls"] = _as_calls(column, message["tool_calls"], where)
    if content is None and not message.get("tool_calls"):
        others = ", ".join(repr(key) for key in message if key != "role")
        problem = f"has no `content` in {where}" + (f", but {others}" if others else "")
        raise BadRow(column, problem, "name its text `content`, " + DROP_CURE if others else DROP_CURE)
    if content is not None and not isinstance(content, str | list):
        problem = f"has `content` of type {type(content).__name__} in {where}"
        raise BadRow(column, problem, "make it text or a list of content blocks")
    media = find_media(message)
    if media is not None:
        raise BadRow(column, f"has data that is not text in `{media}` of {where}", MEDIA_CURE.format("it"))
    if isinstance(content, list):
        message["content"] = "".join(_block_text(column, block, where) for block in content)
    return message


def _as_calls(column: str, calls: Any, where: str) -> list[Any]:
    """Return tool calls as a list of dicts. They may be stored as JSON. A single call may be stored without a list."""
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except json.JSONDecodeError as error:
            raise BadRow(column, f"has `tool_calls` in {where} that are not JSON ({error})", DROP_CURE) from None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(column, f"has `tool_calls` of another form in {where}", "make them a list of dicts, or its JSON")
    return calls


def _with_our_names(column: str, position: int, message: Message) -> Message:
    """Return the message with the keys `role` and `content` and the standard name of its role.

    An unknown role is kept if its key is `role`.

    Raises:
        BadRow: If there is no role, or if its key is not `role` and the role is unknown.
    """
    keys = [next((key for key in names if message.get(key) is not None), None) for names in (ROLE_KEYS, CONTENT_KEYS)]
    named = {key: value for key, value in message.items() if key not in keys}
    role = message.get(keys[0]) if keys[0] else None
    if not isinstance(role, str) or not role:
        problem = f"has no `role` in message {position} (keys: {', '.join(map(repr, message))})"
        raise BadRow(column, problem, "name it: 'system', 'user', 'assistant' or 'tool'")
    if keys[0] != "role" and not is_role(role):
        cure = "write such turns as messages with `role`, `content` and `tool_calls`"
        raise BadRow(column, f"has an unknown speaker {role!r} in message {position}", cure)
    named = {"role": _ROLES.get(role.lower(), role.lower() if role.lower() in _KNOWN_ROLES else role), **named}
    return {**named, "content": message[keys[1]]} if keys[1] else named


def _block_text(column: str, block: Any, where: str) -> str:
    """Return the text of a block of text. Raises `BadRow` for a block of another type, such as an image."""
    if isinstance(block, str):
        return block
    named = block if isinstance(block, dict) else {"type": type(block).__name__}
    block_type, text = named.get("type", "text"), named.get("text")
    if not isinstance(text, str) or block_type not in _TEXT_BLOCKS or find_media(named) is not None:
        problem = f"has a content block of type {block_type!r} in {where}, which is not text"
        raise BadRow(column, problem, MEDIA_CURE.format("such blocks") + "; write a tool's result as text (json.dumps)")
    return text


def check_reply(column: str, messages: Any) -> list[Message]:
    """Return the checked messages of a response. Raises `BadRow` if no assistant message has text or tool calls."""
    return check_says_something(column, check_messages(column, messages))


def check_says_something(column: str, checked: list[Message]) -> list[Message]:
    """Return the checked messages. Raises `BadRow` if no assistant message has text or tool calls."""
    if not checked:
        raise BadRow(column, "is empty")
    replies = [message for message in checked if _is_reply(message)]
    if not replies:
        roles = ", ".join(sorted({message["role"] for message in checked}))
        problem = f"has no assistant message, so there is no token to score (roles: {roles})"
        raise BadRow(column, problem, "give the model's turns the role 'assistant'")
    if not any(message.get("tool_calls") or not is_blank(text_of(message)) for message in replies):
        raise BadRow(column, "is only whitespace" if any(map(text_of, replies)) else "is empty")
    return checked


def split_conversations(checked: Mapping[str, list[Message]]) -> tuple[list[Message], dict[str, list[Message]]]:
    """Split conversations into their prompt, which is the beginning that they share, and their responses.

    The last message of a conversation always belongs to its response. The prompt does not end between two assistant
    messages, because the second message would then be read as the continuation of the first.

    Args:
        checked: The conversations, as returned by `check_reply`, keyed by column.

    Returns:
        The messages of the prompt, and the messages of each response, keyed by column.

    Raises:
        BadRow: If no assistant message of a response has text or tool calls, or if there is no prompt.
    """
    sides = list(checked.values())
    longest = min(len(messages) for messages in sides) - 1
    shared = 0
    while shared < longest and all(messages[shared] == sides[0][shared] for messages in sides):
        shared += 1
    while shared > 0 and all(_is_reply(messages[at]) for messages in sides for at in (shared - 1, shared)):
        shared -= 1
    if shared == 0:
        first, second, *_ = checked
        begins_with_reply = all(_is_reply(messages[0]) for messages in sides)
        problem = "begin with the assistant" if begins_with_reply else "do not begin with the same message"
        cure = "begin both with the same messages or add a `prompt` column, [] if the assistant speaks first"
        raise BadRow(second, f"and `{first}` {problem}, so there is no prompt", cure)
    return sides[0][:shared], {column: check_says_something(column, side[shared:]) for column, side in checked.items()}


def text_of(message: Message) -> str:
    """Return the text of a checked message, or "" if it has none."""
    return message.get("content") or ""


def _is_reply(message: Message) -> bool:
    return message["role"] == "assistant"


MEDIA_CURE = "images, video and audio are not supported: drop the row, or remove {} if the text alone is enough"
_MEDIA = r"(image|img|picture|photo|screenshot|frame|video|audio|pixel_value)s?"
_FORMS = r"(path|url|uri|file|byte|data|base64|list|\d+)s?"
_MEDIA_NAME = re.compile(rf"(.*[_\-. ])?{_MEDIA}([_\-. ]?{_FORMS})*", re.IGNORECASE)
# Types of the Python values in columns of text, numbers, flags and times.
_PLAIN = (str, int, float, date, time, timedelta, Decimal, type(None))


def find_media(values: Mapping[str, Any]) -> str | None:
    """Return the first key of a row, a message or a block that holds an image, video or audio. None if there is none.

    A key matches if its value is bytes, a stored file (a dict of `bytes` and `path`), or an object of a type that
    columns of text and numbers do not have, such as a decoded image. A key also matches if its name says that it holds
    such data, unless its value is empty or a number. Counts (`num_images`) and ids (`image_id`) do not match.
    """
    for key, value in values.items():
        if (_MEDIA_NAME.fullmatch(key) and _is_present(value)) or _is_binary(value):
            return key
    return None


def _is_present(value: Any) -> bool:
    """Return True if a value may be a file. Return False for an empty value, and for a number (a count or a flag)."""
    if isinstance(value, dict):
        return any(map(_is_present, value.values()))
    if isinstance(value, list | tuple):
        return any(item is not None and item != "" for item in value)
    return not isinstance(value, int | float | type(None)) and value != ""


def _is_binary(value: Any) -> bool:
    """Return True if a value, or a value in it at any depth, is bytes, a stored file or a decoded object."""
    if isinstance(value, dict):
        is_file = value.keys() == {"bytes", "path"} and any(item is not None for item in value.values())
        return is_file or any(map(_is_binary, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_binary, value))
    return not isinstance(value, _PLAIN)
