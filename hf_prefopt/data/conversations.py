"""A prompt and responses of any content, text or messages, as one conversation for each response.

Text becomes a message of the obvious role: the user's in a prompt, the assistant's in a response. Responses are either
replies, or whole conversations that begin with the prompt, which is taken off them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prefopt.data.contents import Content
from hf_prefopt.data.messages import (
    Message,
    check_messages,
    check_reply,
    check_says_something,
    split_conversations,
    text_of,
)
from hf_prefopt.data.rows import BadRow, check_text_prompt, check_text_response, take_off_prompt
from hf_prefopt.data.transcripts import is_transcript, read_transcript

# Who begins a whole conversation.
_ASKING = ("user", "system", "developer")
# The beginning of a text that a chat template has written already.
_RENDERED = re.compile(r"\s*(<s>|<bos>|<\|[\w ]+\|>|\[INST\]|<start_of_turn>|<｜)")


# How trainers mark answers that are not to be trained on, if the value is zero or false.
_MARKS = ("weight", "train", "training", "loss")


def _untrained(message: Message) -> list[str]:
    return [f"{key}={message[key]!r}" for key in _MARKS if key in message and message[key] in (0, "0")]


@dataclass(frozen=True)
class Conversation:
    """Messages of a prompt and of responses by column.

    Attributes:
        prompt_is_read: whether the prompt column was used. If not, the responses have said it: who reads the row must
            make sure that they have.

    Raises:
        BadRow: the assistant begins some responses only. In these the header of its turn is part of the prompt. Or an
            answer within a response is marked as not to be trained on, and all of a response is.
    """

    prompt: list[Message]
    responses: dict[str, list[Message]]
    prompt_is_read: bool = True

    def __post_init__(self):
        roles = {column: messages[0]["role"] for column, messages in self.responses.items()}
        others = [column for column, role in roles.items() if role != "assistant"]
        if others and len(others) < len(roles):
            problem = f"begins with {roles[others[0]]!r}, and another response with the assistant"
            raise BadRow(others[0], problem, "begin all responses of a row with an assistant message, or none")
        for column, messages in self.responses.items():
            marks = [key for message in messages if message["role"] == "assistant" for key in _untrained(message)]
            if marks:
                problem = f"has an answer marked as not to be trained on ({marks[0]}), and all answers in it are"
                raise BadRow(column, problem, "put it into the prompt, or take the mark off")


def join_conversation(prompt: Content | None, responses: Mapping[str, Content], begins: bool = True) -> Conversation:
    """The messages of a prompt and its responses, checked.

    Args:
        prompt: None if the responses are whole conversations.
        responses: by column.
        begins: whether a prompt may end with the assistant's words, which the responses continue.

    Raises:
        BadRow: messages that cannot be used, or of which it is not clear where the response begins.
    """
    contents = dict(responses)
    if isinstance(prompt, str):
        texts = {column: content for column, content in responses.items() if isinstance(content, str)}
        alone = take_off_prompt(prompt, texts) if texts else texts
        if alone is not texts:  # the white space between a prompt and its response is no part of a message
            contents |= {column: text.lstrip() for column, text in alone.items()}
    replies = {column: _reply(column, content) for column, content in contents.items()}
    written = [column for column, content in responses.items() if isinstance(content, str)]
    whole = {column: messages for column, messages in replies.items() if messages[0]["role"] in _ASKING}
    if prompt is not None and not whole:
        asked = _without_answer(_prompt(prompt), replies, begins)
        _reject_question_in_replies(asked, replies)
        if not asked or asked[-1]["role"] != "assistant":
            replies |= {column: _without_joint(replies[column]) for column in written}
        return Conversation(asked, replies)
    if isinstance(prompt, list):
        asked = check_messages("prompt", prompt)
        rest = {column: _after(asked, messages) for column, messages in whole.items()}
        if asked and all(rest.values()):
            return Conversation(
                asked, {**replies, **{column: check_says_something(column, end) for column, end in rest.items()}}
            )
        if not asked or (asked[-1]["role"] not in _ASKING and begins and not any(rest.values())):
            return Conversation(asked, replies)
    if len(whole) < len(replies) and whole:
        asked = next(iter(whole.values()))[:-1]
        if any(messages[:-1] != asked or len(messages) < 2 for messages in whole.values()):
            column = next(iter(whole))
            raise BadRow(column, "is a whole conversation, and another response is a reply alone", "give replies alone")
        return Conversation(
            asked, {**replies, **{column: whole[column][-1:] for column in whole}}, prompt_is_read=False
        )
    shared, rest = split_conversations(replies)
    return Conversation(shared, rest, prompt_is_read=False)


def _after(asked: list[Message], messages: list[Message]) -> list[Message]:
    """What follows the prompt in a conversation that begins with it, perhaps without its system prompt; or nothing."""
    for begin in (asked, asked[1:]) if asked and asked[0]["role"] == "system" else (asked,):
        if begin and messages[: len(begin)] == begin:
            return messages[len(begin) :]
    return []


def text_as_messages(text: str) -> list[Message]:
    """A text as a prompt: the turns of a transcript, or the user's message."""
    if _RENDERED.match(text):
        cure = "give messages, or use the columns prompt, chosen and rejected for texts that are to stay as they are"
        raise BadRow("prompt", f"is written by a chat template already ({text.strip()[:20]!r})", cure)
    if not text.strip():
        raise BadRow("prompt", "is only whitespace" if text else "is empty")
    return read_transcript(text) if is_transcript(text) else [{"role": "user", "content": text}]


def _reject_question_in_replies(asked: list[Message], replies: Mapping[str, list[Message]]) -> None:
    """Raise `BadRow` if a response asks again what the prompt ends with: then it is a conversation, and not a reply."""
    if asked and asked[-1] in (message for messages in replies.values() for message in messages[1:]):
        column = next(column for column, messages in replies.items() if asked[-1] in messages)
        raise BadRow(column, "repeats the end of `prompt` after other messages", "remove the `prompt` column")


def _prompt(prompt: Content) -> list[Message]:
    if isinstance(prompt, str):
        return text_as_messages(check_text_prompt("prompt", prompt))
    return check_messages("prompt", prompt)


def _reply(column: str, content: Content) -> list[Message]:
    if isinstance(content, str):
        return [{"role": "assistant", "content": check_text_response(column, content)}]
    return check_reply(column, content)


def _without_joint(reply: list[Message]) -> list[Message]:
    """A reply made of a text without the blank that joined it to its prompt, which is no part of a message."""
    return [{**reply[0], "content": reply[0]["content"].removeprefix(" ")}]


def _without_answer(prompt: list[Message], replies: Mapping[str, list[Message]], begins: bool) -> list[Message]:
    """The prompt without an answer at its end that is also one of the responses."""
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt
    last: Any = prompt[-1].get("content")
    if isinstance(last, str) and any(last.strip() == text_of(messages[0]).strip() for messages in replies.values()):
        return prompt[:-1]
    if not begins:
        cure = "end it with the user's message, or name the column `prompt` if the responses continue these words"
        raise BadRow("prompt", "ends with an answer that is none of the responses", cure)
    return prompt
