"""Keys of messages that a chat template does not write: the model never sees what they say."""

from collections.abc import Iterable

import jinja2
from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.messages import Message
from hf_prefopt.data.render import ChatTemplate
from hf_prefopt.data.rows import CanonicalRow

_ALWAYS_READ = ("role", "content")


def unrendered_keys(rows: Iterable[CanonicalRow], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The keys in messages of these rows without which the template writes the same text, wherever they are.

    `tools` is among them if the template does not write the row's tool schemas.
    """
    written: dict[str, bool] = {}
    for row in rows:
        if row.content_type != "messages":
            continue
        for response in row.responses:
            for key, makes_difference in _try_without(row, [*row.prompt, *response], tokenizer).items():
                written[key] = written.get(key, False) or makes_difference
    return [key for key, is_written in written.items() if not is_written]


def _try_without(row: CanonicalRow, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """For each key beyond role and content, and for tools, whether the text changes without it."""
    keys = dict.fromkeys(key for message in messages for key in message if key not in _ALWAYS_READ)
    if not keys and not row.tools:
        return {}
    template = ChatTemplate(tokenizer, row.tools, row.chat_template_kwargs)
    bare = ChatTemplate(tokenizer, None, row.chat_template_kwargs)
    try:
        full = template.render(messages)
        differs = {
            key: template.render([{k: v for k, v in message.items() if k != key} for message in messages]) != full
            for key in keys
        }
        return differs | ({"tools": bare.render(messages) != full} if row.tools else {})
    except (jinja2.TemplateError, TypeError, KeyError, ValueError):
        return {}  # rows that the template rejects say so themselves
