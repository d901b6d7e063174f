"""Warn if a chat template ignores keys of messages, ignores its arguments, or writes today's date."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.messages import Message
from hf_prefopt.data.rows import CanonicalRow
from hf_prefopt.data.template import TEMPLATE_ERRORS, ChatTemplate

_ALWAYS_READ = ("role", "content")
# Names of the chat template's arguments that replace today's date in the rendered prompt.
_DATES = ("date_string", "current_date", "date")


def describe_template(
    rows: Sequence[CanonicalRow], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> list[str]:
    """Return warnings about the chat template for these rows.

    Args:
        rows: Canonical rows.
        tokenizer: The tokenizer.
        kwargs: Arguments of the chat template from the settings.

    Raises:
        ValueError: If the template does not read one of the arguments in `kwargs`.
    """
    talks = [row for row in rows if row.content_type == "messages"]
    if not talks:
        unused = kwargs and "chat_template_kwargs are not used: no row contains messages"
        return [unused] if unused else []
    if not (tokenizer.chat_template or kwargs.get("chat_template")):
        return []  # rendering raises the error
    lines = []
    unwritten = unrendered_keys(talks, tokenizer, kwargs)
    if unwritten:
        lines.append(
            f"the chat template does not write {', '.join(unwritten)} of the messages: the model does not see it"
        )
    first = ChatTemplate(tokenizer, talks[0].tools, {**kwargs, **talks[0].chat_template_kwargs})
    unread = [name for name in first.arguments if name not in ("tools", "chat_template") and not first.reads(name)]
    for name in unread:
        if name in kwargs:
            raise ValueError(
                f"chat_template_kwargs={dict(kwargs)!r}: the chat template does not read {name!r}; remove it"
            )
    if unread:
        lines.append(f"the chat template does not read {', '.join(unread)} of chat_template_kwargs")
    return lines + _describe_date(talks[0], first)


def _describe_date(row: CanonicalRow, template: ChatTemplate) -> list[str]:
    """Return a one-line warning, with a fix, if the chat template inserts today's date."""
    messages = [*row.prompt, *row.responses[0]]
    try:
        if not template.writes_date(messages):
            return []
        names = [name for name in _DATES if not template.writes_date(messages, **{name: "1 Jan 2025"})]
    except TEMPLATE_ERRORS:
        return []
    cure = f"chat_template_kwargs={{{names[0]!r}: '1 Jan 2025'}}" if names else "a chat template with a fixed date"
    return [f"the chat template writes today's date, so rows and caches change every day; fix the date with {cure}"]


def unrendered_keys(
    rows: Iterable[CanonicalRow], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> list[str]:
    """Return the message keys that do not affect the rendered text in any of these rows.

    The result includes `tools` if the template does not write the row's tool schemas.
    """
    written: dict[str, bool] = {}
    for row in rows:
        for response in row.responses:
            for key, makes_difference in _try_without(row, [*row.prompt, *response], tokenizer, kwargs).items():
                written[key] = written.get(key, False) or makes_difference
    return [key for key, is_written in written.items() if not is_written]


def _try_without(
    row: CanonicalRow, messages: list[Message], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> dict[str, bool]:
    """Return, for each message key, whether the rendered text changes if the key is removed.

    The keys `role` and `content` are left out. The result also has the key `tools` if the row has tool schemas.
    """
    keys = dict.fromkeys(key for message in messages for key in message if key not in _ALWAYS_READ)
    if not keys and not row.tools:
        return {}
    arguments = {**kwargs, **row.chat_template_kwargs}
    template, bare = (ChatTemplate(tokenizer, tools, arguments) for tools in (row.tools, None))
    try:
        full = template.render(messages)
        differs = {
            key: template.render([{k: v for k, v in message.items() if k != key} for message in messages]) != full
            for key in keys
        }
        return differs | ({"tools": bare.render(messages) != full} if row.tools else {})
    except TEMPLATE_ERRORS:
        return {}  # rendering such rows raises the error
