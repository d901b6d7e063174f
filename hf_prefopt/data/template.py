"""Render messages with a tokenizer's chat template, and find out what the template reads and writes."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hf_prefopt.data.messages import Message, text_of
from hf_prefopt.data.rows import BadRow, shared_length

Span = tuple[int, int]

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Errors that a template raises for messages that it does not support.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, KeyError, ValueError)
# Thinking markers of any template: <think>, [/THINK], <|begin_of_thought|>, ...
THINKING_MARKER = re.compile(r"[<\[][^<>\[\]\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]]", re.IGNORECASE)
_PROBE = "prefopt"
_DATE = re.compile(r"strftime_now\([^()]*\)")


@contextmanager
def blaming(column: str) -> Iterator[None]:
    """Convert an error that the template raises in this context to a `BadRow` that names this column."""
    try:
        yield
    except BadRow:
        raise
    except TEMPLATE_ERRORS as error:
        raise BadRow(column, f"is rejected by the chat template ({error})") from error


class ChatTemplate:
    """The chat template of a tokenizer, with the tools and other arguments that it gets in each call.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list | None, kwargs: dict[str, Any]):
        if not (tokenizer.chat_template or kwargs.get("chat_template")):
            raise ValueError(
                "the dataset holds messages, but the tokenizer has no chat template: use an instruction-tuned model, "
                "pass a template, chat_template_kwargs={'chat_template': '...'}, or give prompt, chosen and rejected "
                "as plain text"
            )
        self.tokenizer = tokenizer
        self.arguments = {"tools": tools, **kwargs}
        self.source = tokenizer.get_chat_template(kwargs.get("chat_template"), tools)
        self.has_markers = bool(_GENERATION_MARKER.search(self.source))
        self.reads_blocks = _reads_blocks(self.source)
        self.knows_thinking = bool(THINKING_MARKER.search(self.source)) or "thought" in self.source
        self._unwritten: dict[tuple[tuple[str, bool], ...], frozenset[int]] = {}

    def _contents(self, messages: list[Message]) -> list[Message]:
        """Return the messages with contents and tool-call arguments in the form that the template reads."""
        if any(message.get("tool_calls") for message in messages) and _reads_arguments(self.source):
            messages = [_with_arguments(message) for message in messages]
        if not self.reads_blocks:
            return messages
        return [{**message, "content": [{"type": "text", "text": text_of(message)}]} for message in messages]

    def render(self, messages: list[Message], generation_prompt: bool = False, unfinished: bool = False) -> str:
        """Render the messages as text.

        With `generation_prompt`, the header of an assistant turn follows. With `unfinished`, the last message is left
        open, without its end of turn.
        """
        how = {"add_generation_prompt": generation_prompt, "continue_final_message": unfinished, "tokenize": False}
        contents = self._contents(messages)
        return cast(str, self.tokenizer.apply_chat_template(contents, **{**self.arguments, **how}))

    def generated_spans(self, messages: list[Message]) -> list[Span]:
        """Return the character ranges between the template's `{% generation %}` markers."""
        how = {"return_assistant_tokens_mask": True, "add_generation_prompt": False}
        return self._render_alone(messages, **how)[1]

    def _render_alone(self, messages: list[Message], **how: Any) -> tuple[str, list[Span]]:
        """Render the messages without the tokenizer. Return the text, and the ranges between generation markers."""
        arguments = {**self.tokenizer.special_tokens_map, **self.arguments, "chat_template": self.source, **how}
        rendered = render_jinja_template([self._contents(messages)], **arguments)
        texts, spans = cast(tuple[list[str], list[list[Span]]], rendered)
        return texts[0], spans[0] if spans else []

    @cached_property
    def header(self) -> str:
        """The text before an assistant message: the part that the generation prompt adds after a user message."""
        question = [{"role": "user", "content": "a"}]
        try:
            asked, alone = self.render(question, generation_prompt=True), self.render(question)
        except TEMPLATE_ERRORS:
            return ""
        return asked[shared_length(asked, alone) :]

    def unwritten(self, messages: list[Message]) -> frozenset[int]:
        """Return the positions of the messages whose content the template does not write.

        The result is cached for all messages with the same sequence of roles and the same places of tool calls.
        """
        roles = tuple((message["role"], bool(message.get("tool_calls"))) for message in messages)
        if roles not in self._unwritten:
            self._unwritten[roles] = self._find_unwritten(messages)
        return self._unwritten[roles]

    def _find_unwritten(self, messages: list[Message]) -> frozenset[int]:
        marks = [f"{_PROBE}{at}." for at in range(len(messages))]
        try:
            text = self.render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
        except TEMPLATE_ERRORS:
            text = ""
        # A mark may also be missing because the template changes the text that it writes, so test this separately.
        missing = (at for at, mark in enumerate(marks) if mark not in text)
        return frozenset(at for at in missing if not self._makes_difference(messages, at))

    def _makes_difference(self, messages: list[Message], at: int) -> bool:
        other = [*messages[:at], {**messages[at], "content": _PROBE}, *messages[at + 1 :]]
        try:
            return self.render(other) != self.render(messages)
        except TEMPLATE_ERRORS:
            return True  # rendering this row raises the error

    def writes_date(self, messages: list[Message], **names: str) -> bool:
        """Return True if the template, called with the further arguments `names`, writes today's date."""
        if "strftime_now" not in self.source:
            return False
        dated = _DATE.sub(repr(_PROBE), self.source)
        return _PROBE in self._render_alone(messages, **{**names, "chat_template": dated})[0]

    def reads(self, name: str) -> bool:
        """Return True if the template contains a variable with this name."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None


def _with_arguments(message: Message) -> Message:
    """Convert the arguments of tool calls from JSON, as in OpenAI's format, to dicts."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_dict(call) for call in calls]} if isinstance(calls, list) else message


def _with_dict(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


@lru_cache(maxsize=64)
def _reads_arguments(template: str) -> bool:
    """Return True if a chat template accepts tool-call arguments as a dict.

    Arguments are then given as a dict, because the template may put arguments that are text in quotes.
    """
    function = {"name": "f", "arguments": {"a": _PROBE}}
    call = {"type": "function", "id": "abcdefghi", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        rendered = render_jinja_template([[{"role": "user", "content": "a"}, called]], chat_template=template)[0]
    except TEMPLATE_ERRORS:
        return False
    return _PROBE in rendered[0]


@lru_cache(maxsize=64)
def _reads_blocks(template: str) -> bool:
    """Return True if a chat template writes content given as a list of blocks, but not content given as text."""
    shown = []
    for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
        try:
            rendered = render_jinja_template([[{"role": "user", "content": content}]], chat_template=template)[0]
            shown.append(_PROBE in rendered[0])
        except TEMPLATE_ERRORS:
            shown.append(False)
    return shown == [False, True]
