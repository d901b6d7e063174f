"""Convert a prompt and its responses, each of which is text or messages, to messages.

A text becomes a message: a prompt becomes a user message, and a response an assistant message. A response is either a
reply to the prompt, or a whole conversation that begins with the prompt. In the second case, the prompt is removed from
the response.
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
from hf_prefopt.data.rows import BadRow, check_text_prompt, check_text_response, is_blank, take_off_prompt
from hf_prefopt.data.transcripts import is_transcript, read_transcript

# If the first message of a response has one of these roles, the response is a whole conversation.
_ASKING = ("user", "system", "developer")
# Matches the beginning of a text to which a chat template has already been applied.
_RENDERED = re.compile(r"\s*(<s>|<bos>|<\|[\w ]+\|>|\[INST\]|<start_of_turn>|<｜)")


# Keys of a message. If the value of one of them is zero or false, trainers exclude the message from training.
_MARKS = ("weight", "train", "training", "loss")


def _untrained(message: Message) -> list[str]:
    return [f"{key}={message[key]!r}" for key in _MARKS if key in message and message[key] in (0, "0")]


@dataclass(frozen=True)
class Conversation:
    """The messages of a prompt and of each of its responses.

    Attributes:
        prompt: The messages of the prompt.
        responses: The messages of each response, keyed by column.
        prompt_is_read: Whether `prompt` comes from the prompt column. If False, it comes from the responses, and the
            caller must check that the responses contain the text of the prompt column.

    Raises:
        BadRow: If some responses begin with an assistant message and others do not, because the header of the
            assistant's turn would then belong to the prompt of only some responses. Also if an assistant message of a
            response is marked as excluded from training, because all assistant messages of a response are trained on.
    """

    prompt: list[Message]
    responses: dict[str, list[Message]]
    prompt_is_read: bool = True

    def __post_init__(self):
        roles = {column: messages[0]["role"] for column, messages in self.responses.items()}
        others = [column for column, role in roles.items() if role != "assistant"]
        if others and len(others) < len(roles):
            problem = f"begins with role {roles[others[0]]!r}, but another response begins with the assistant"
            raise BadRow(others[0], problem, "begin all responses of a row with an assistant message, or none")
        for column, messages in self.responses.items():
            marks = [key for message in messages if message["role"] == "assistant" for key in _untrained(message)]
            if marks:
                problem = f"has an answer marked as not trained on ({marks[0]}), but all answers in it are trained on"
                raise BadRow(column, problem, "move it to the prompt, or remove the mark")


def join_conversation(prompt: Content | None, responses: Mapping[str, Content], begins: bool = True) -> Conversation:
    """Return the checked messages of a prompt and its responses.

    Args:
        prompt: The prompt. None if the responses are whole conversations.
        responses: The responses, keyed by column.
        begins: Whether the prompt may end with the beginning of an assistant message that the responses continue.

    Raises:
        BadRow: If messages are invalid, or if it is ambiguous where a response begins.
    """
    contents = dict(responses)
    if isinstance(prompt, str):
        texts = {column: content for column, content in responses.items() if isinstance(content, str)}
        alone = take_off_prompt(prompt, texts) if texts else texts
        if alone is not texts:  # whitespace between a prompt and its response is part of neither message
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
            problem = "is a whole conversation, but another response is only a reply"
            raise BadRow(column, problem, "give only replies")
        return Conversation(
            asked, {**replies, **{column: whole[column][-1:] for column in whole}}, prompt_is_read=False
        )
    shared, rest = split_conversations(replies)
    return Conversation(shared, rest, prompt_is_read=False)


def _after(asked: list[Message], messages: list[Message]) -> list[Message]:
    """Return the messages that follow the prompt in a conversation.

    The conversation must begin with the prompt, but it may lack the prompt's system message. If it does not begin with
    the prompt, an empty list is returned.

    Args:
        asked: The messages of the prompt.
        messages: The messages of the conversation.
    """
    for begin in (asked, asked[1:]) if asked and asked[0]["role"] == "system" else (asked,):
        if begin and messages[: len(begin)] == begin:
            return messages[len(begin) :]
    return []


def text_as_messages(text: str) -> list[Message]:
    """Convert a prompt text to messages: one for each turn if the text is a transcript, or else one user message.

    Raises:
        BadRow: If the text is empty or only whitespace, or if a chat template has already been applied to it.
    """
    if _RENDERED.match(text):
        cure = "use messages, or use the columns prompt, chosen and rejected for texts that should stay unchanged"
        raise BadRow("prompt", f"is already rendered by a chat template ({text.strip()[:20]!r})", cure)
    if is_blank(text):
        raise BadRow("prompt", "is only whitespace" if text else "is empty")
    return read_transcript(text) if is_transcript(text) else [{"role": "user", "content": text}]


def _reject_question_in_replies(asked: list[Message], replies: Mapping[str, list[Message]]) -> None:
    """Raise `BadRow` if a response repeats the prompt's last message after its own first message.

    The response is then a conversation that contains the prompt, not a reply.
    """
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
    """Remove a space at the start of a reply. It separated the reply from its prompt and is not part of the message."""
    return [{**reply[0], "content": reply[0]["content"].removeprefix(" ")}]


def _without_answer(prompt: list[Message], replies: Mapping[str, list[Message]], begins: bool) -> list[Message]:
    """If the prompt ends with an assistant message that is also one of the responses, return it without this message.

    Raises:
        BadRow: If the prompt ends with another assistant message, but `begins` is False.
    """
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt
    last: Any = prompt[-1].get("content")
    if isinstance(last, str) and any(last.strip() == text_of(messages[0]).strip() for messages in replies.values()):
        return prompt[:-1]
    if not begins:
        cure = "end it with a user message, or name the column `prompt` if the responses continue this answer"
        raise BadRow("prompt", "ends with an answer that is none of the responses", cure)
    return prompt
