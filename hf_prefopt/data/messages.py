"""What a list of messages must be, what two conversations share, and media, on which nothing is trained.

Images, video and audio are told by the names of columns and keys and by their values. Templates and tokens are in
`render` and `tokenize`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Literal

from datasets import Dataset, IterableDataset

MEDIA_CURE = "images, video and audio are not supported: drop the row, or leave {} out if the text will do alone"
_MEDIA = r"(image|img|picture|photo|screenshot|frame|video|audio|pixel_value)s?"
_FORMS = r"(path|url|uri|file|byte|data|base64|list|\d+)s?"
_NAME = re.compile(rf"(.*[_\-. ])?{_MEDIA}([_\-. ]?{_FORMS})*", re.IGNORECASE)
# What Arrow gives for columns of text, numbers, flags and times.
_PLAIN = (str, int, float, date, time, timedelta, Decimal, type(None))


def find_media(values: Mapping[str, Any]) -> str | None:
    """The first key of a row, a message or a block that holds an image, video or audio; `None` where none does.

    It is told by the key's name, where there is something in it, or by the value: bytes, a stored file, a decoded
    object. A count (`num_images`), an id (`image_id`) and what is empty are none.
    """
    for key, value in values.items():
        if (_NAME.fullmatch(key) and _is_there(value)) or _is_binary(value):
            return key
    return None


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set with images, video and audio as they are stored: none need be decoded to be refused."""
    for column, feature in (dataset.features or {}).items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    return dataset


def _is_there(value: Any) -> bool:
    """Whether there is something where a file should be: a number is a count or a flag."""
    if isinstance(value, dict):
        return any(map(_is_there, value.values()))
    if isinstance(value, list | tuple):
        return any(item is not None and item != "" for item in value)
    return not isinstance(value, int | float | type(None)) and value != ""


def _is_binary(value: Any) -> bool:
    """Whether a value, or anything in it, is bytes, a stored file or a decoded object."""
    if isinstance(value, dict):
        is_file = value.keys() == {"bytes", "path"} and any(item is not None for item in value.values())
        return is_file or any(map(_is_binary, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_binary, value))
    return not isinstance(value, _PLAIN)


Message = dict[str, Any]

DROP_CURE = "drop the row or pass on_bad_rows='drop'"
_TEXT_BLOCKS = ("text", "input_text", "output_text")


class BadRow(ValueError):
    """A row that cannot be trained on: the column, what is wrong with it, and the cure."""

    def __init__(self, column: str, problem: str, cure: str = DROP_CURE):
        super().__init__(f"`{column}` {problem}; {cure}")


def check_messages(column: str, messages: Any) -> list[Message]:
    """The messages without their empty keys, their content as text, out of blocks where it is given as such.

    Raises `BadRow` unless each has a role and something to say, in text.
    """
    return [_check_message(column, position, message) for position, message in enumerate(messages)]


def _check_message(column: str, position: int, message: Any) -> Message:
    if not isinstance(message, dict):
        problem = f"holds a {type(message).__name__} where message {position} should be"
        raise BadRow(column, problem, "make each message a dict with `role` and `content`")
    message = drop_nones(message)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise BadRow(column, f"has no `role` in message {position}", "name it: 'system', 'user', 'assistant' or 'tool'")
    if content is None and not message.get("tool_calls"):
        raise BadRow(column, f"has no `content` in message {position} ({role})")
    if content is not None and not isinstance(content, str | list):
        problem = f"has `content` of type {type(content).__name__} in message {position} ({role})"
        raise BadRow(column, problem, "make it text or a list of content blocks")
    where = f"message {position} ({role})"
    media = find_media(message)
    if media is not None:
        raise BadRow(column, f"has something that is not text in `{media}` of {where}", MEDIA_CURE.format("it"))
    if isinstance(content, list):
        message["content"] = "".join(_text_of_block(column, block, where) for block in content)
    return message


def _text_of_block(column: str, block: Any, where: str) -> str:
    """The text of a content block. Raises `BadRow` for one that holds anything else."""
    if isinstance(block, str):
        return block
    named = block if isinstance(block, dict) else {"type": type(block).__name__}
    kind, text = named.get("type", "text"), named.get("text")
    if not isinstance(text, str) or kind not in _TEXT_BLOCKS or find_media(named) is not None:
        cure = MEDIA_CURE.format("such blocks") + "; what a tool gave back may be text, too, as by json.dumps"
        raise BadRow(column, f"has a content block of type {kind!r} in {where}, which is not text", cure)
    return text


def check_reply(column: str, messages: list[Message]) -> list[Message]:
    """The messages of a response. Raises `BadRow` unless an assistant message among them says or calls something."""
    if not messages:
        raise BadRow(column, "is empty")
    replies = [message for message in messages if message["role"] == "assistant"]
    if not replies:
        roles = ", ".join(sorted({message["role"] for message in messages}))
        problem = f"has no assistant message, so no token to score (roles: {roles})"
        raise BadRow(column, problem, "give the model's turns the role 'assistant'")
    if not any(message.get("tool_calls") or text_of(message).strip() for message in replies):
        raise BadRow(column, "is only whitespace" if any(map(text_of, replies)) else "is empty")
    return messages


def count_shared_messages(conversations: dict[str, list[Message]]) -> int:
    """How many whole messages, counted from the start, are the prompt of all these conversations (by column).

    The last message of each conversation is always part of its response. Nor does the prompt end with an assistant
    message that the next one follows up: it would be taken for the beginning of that next one.
    """
    sides = list(conversations.values())
    longest = min(len(messages) for messages in sides) - 1
    shared = 0
    while shared < longest and all(messages[shared] == sides[0][shared] for messages in sides):
        shared += 1
    while shared > 0 and all(_is_reply(messages[at]) for messages in sides for at in (shared - 1, shared)):
        shared -= 1
    if shared == 0:
        first, *others = conversations
        is_answer = all(_is_reply(messages[0]) for messages in sides)
        problem = "begin with the assistant" if is_answer else "do not begin with the same message"
        cure = "begin both with the same messages or add a `prompt` column, [] where the assistant speaks first"
        raise BadRow(others[0], f"and `{first}` {problem}, so there is no prompt", cure)
    return shared


def text_of(message: Message) -> str:
    """The text of a checked message, or "" where it has none."""
    return message.get("content") or ""


def drop_nones(value: Any) -> Any:
    """The value without the keys that hold None, at any depth.

    Arrow gives every struct of a column the same keys: what one row's tool call names, all others get as None.
    """
    if isinstance(value, dict):
        return {key: drop_nones(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nones(item) for item in value]
    return value


def _is_reply(message: Message) -> bool:
    return message["role"] == "assistant"


Kind = Literal["text", "messages", "tokens"]
