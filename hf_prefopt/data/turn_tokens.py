"""Find special tokens of a chat template in the text of responses, because the model would learn to write them.

A text that was generated or rendered earlier often ends with the end-of-turn token. There the token is removed, because
the template writes it. At any other place, a special token raises an error. Prompts are not changed, because the
prompts that users write after training may contain such tokens, too.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.messages import Message
from hf_prefopt.data.rows import BadRow, CanonicalRow
from hf_prefopt.data.template import TEMPLATE_ERRORS, THINKING_MARKER, ChatTemplate

_ANSWER = "prefopt"


class TurnTokens:
    """The special tokens that a chat template writes around messages, and the EOS.

    Args:
        tokenizer: The tokenizer. If it has no chat template, nothing is checked.
        kwargs: Further arguments of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]):
        text = _short_conversation(tokenizer, kwargs)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = {token for token in (*tokenizer.all_special_tokens, *added) if not THINKING_MARKER.search(token)}
        ends = {token for token in special if token in text.rpartition(_ANSWER)[2]}
        eos = {tokenizer.eos_token} - {None} if text else set()
        self._any = _pattern({token for token in special if token in text} | eos)
        self._ends = _pattern(ends | eos, r"(?:\s*(?:{}))+\s*\Z")

    def checked(self, row: CanonicalRow | BadRow) -> CanonicalRow | BadRow:
        """Return the row without end-of-turn tokens at the end of its texts, or the reason why it cannot be used."""
        if isinstance(row, BadRow) or row.content_type != "messages":
            return row
        try:
            named = zip(row.columns, row.responses, strict=True)
            checked = [[self._checked(column, *numbered) for numbered in enumerate(said)] for column, said in named]
            return replace(row, responses=checked)
        except BadRow as error:
            return error

    def _checked(self, column: str, at: int, message: Message) -> Message:
        texts = {key: text for key, text in message.items() if key != "role" and isinstance(text, str)}
        if not any(map(self._any.search, texts.values())):
            return message
        texts = {key: self._ends.sub("", text) for key, text in texts.items()}
        found = next(filter(None, map(self._any.search, texts.values())), None)
        if found is not None:
            problem = (
                f"contains {found[0]!r} in the text of message {at} ({message['role']}), which the chat template "
                "writes around turns: the model would learn to write it"
            )
            raise BadRow(column, problem, "remove it from the text, or pass on_bad_rows='drop'")
        if not texts.get("content", "").strip() and not message.get("tool_calls"):
            raise BadRow(column, f"is only {message['content'].strip()!r} in message {at} ({message['role']})")
        return {**message, **texts}


def _short_conversation(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """Return a question and an answer, rendered with the chat template; "" if the template raises an error."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        return ChatTemplate(tokenizer, None, dict(kwargs)).render(messages)
    except TEMPLATE_ERRORS:  # rendering the rows raises the error
        return ""


def _pattern(tokens: Iterable[str], form: str = "{}") -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens. Without tokens, it matches nothing."""
    either = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.compile(form.format(either)) if either else re.compile(r"(?!)")
