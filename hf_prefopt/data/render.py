"""A canonical row as text: its prompt, and prompt + response for each response, with the characters to score.

Conversations go through the tokenizer's chat template, texts get an EOS. tokenize.py passes the texts of many rows to
the tokenizer in one call.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hf_prefopt.data.messages import Message, text_of
from hf_prefopt.data.rows import BadRow, CanonicalRow, shared_length

Span = tuple[int, int]

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class RenderedRow:
    """The texts of one row.

    Attributes:
        prompt: the prompt as text; None if it is whatever tokens all of `full` begin with.
        full: K texts, prompt + response.
        spans: for each of `full` the character ranges `(start, end)` that the model should write; None for everything
            after the prompt.
        add_special_tokens: whether the tokenizer should add its BOS. A chat template writes its own.
    """

    prompt: str | None
    full: list[str]
    spans: list[list[Span] | None]
    add_special_tokens: bool


class Renderer:
    """Renders rows; what depends only on the tokenizer, or on tools and template arguments, is found once.

    Raises:
        ValueError: rows hold messages, and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._templates: dict[str, ChatTemplate] = {}

    def render(self, row: CanonicalRow) -> RenderedRow:
        """The texts of a row of text or messages. Raises `BadRow` if the chat template rejects it."""
        return self._render_text(row) if row.content_type == "text" else self._render_messages(row)

    def head(self, row: CanonicalRow) -> str:
        """What the template writes before a user's words: its own beginning, the system prompt, the user's header."""
        template = self._template(row)
        system = [message for message in row.prompt[:1] if message["role"] in ("system", "developer")]
        try:
            one, other = (template.render([*system, {"role": "user", "content": word}]) for word in ("a", "b"))
        except (jinja2.TemplateError, TypeError, KeyError, ValueError):
            return ""
        return one[: shared_length(one, other)]

    @cached_property
    def _added(self) -> tuple[bool, bool]:
        """Whether the tokenizer adds a BOS and an EOS by itself."""
        ids = self.tokenizer("a")["input_ids"]
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return ids[:1] == [known[0]], ids[-1:] == [known[1]]

    def _render_text(self, row: CanonicalRow) -> RenderedRow:
        """prompt + response with one BOS, if the tokenizer adds one, and one EOS at the end, whoever wrote them."""
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        adds_bos, adds_eos = self._added
        prompt, texts = row.prompt, [(row.prompt or "") + response for response in row.responses]
        if adds_bos:
            prompt, texts = prompt and _without(bos, prompt), [_without(bos, text) for text in texts]
            _reject_later_bos(bos, prompt, row)
        full = [_ended(text, eos, adds_eos) for text in texts]
        return RenderedRow(prompt, full, [None] * len(full), add_special_tokens=True)

    def _template(self, row: CanonicalRow) -> "ChatTemplate":
        key = repr((row.tools, row.chat_template_kwargs))
        if key not in self._templates:
            self._templates[key] = ChatTemplate(self.tokenizer, row.tools, row.chat_template_kwargs)
        return self._templates[key]

    def _render_messages(self, row: CanonicalRow) -> RenderedRow:
        """The conversation by the chat template."""
        template = self._template(row)
        continues = _continues_last_message(row)
        shared, responses = row.prompt, row.responses
        if continues:
            shared, last = row.prompt[:-1], row.prompt[-1]
            responses = [[_join_messages(last, response[0]), *response[1:]] for response in row.responses]
        full, spans = [], []
        for column, response in zip(row.columns, responses, strict=True):
            with _blaming(column):
                full.append(template.render(shared + response))
        with _blaming("prompt"):
            prompt = _render_prompt(row.prompt, continues, full, template)
        for column, response, text in zip(row.columns, responses, full, strict=True):
            with _blaming(column):
                spans.append(_scored_spans(text, prompt, shared, response, template))
        return RenderedRow(prompt, full, spans, add_special_tokens=False)


def _without(bos: str, text: str) -> str:
    """The text without the BOS that it begins with, however often."""
    while text.startswith(bos):
        text = text.removeprefix(bos)
    return text


def _reject_later_bos(bos: str, prompt: str | None, row: CanonicalRow) -> None:
    """Raise `BadRow` if a response begins with the BOS although a prompt precedes it."""
    for column, response in zip(row.columns, row.responses, strict=True):
        if prompt and response.lstrip().startswith(bos):
            cure = "remove it, or the `prompt` column if the responses hold the prompt"
            raise BadRow(column, f"begins with {bos!r}, with which only a whole sequence begins", cure)


def _ended(text: str, eos: str, adds_eos: bool) -> str:
    """The text with one EOS, or without where the tokenizer adds it. White space after an EOS, which a chat template
    has written, stays."""
    if not eos:
        return text
    if text.endswith(eos):
        return text.removesuffix(eos) if adds_eos else text
    return text if text.rstrip().endswith(eos) and not adds_eos else text + ("" if adds_eos else eos)


@contextmanager
def _blaming(column: str) -> Iterator[None]:
    """Name this column in the error if the template cannot render it."""
    try:
        yield
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadRow(column, f"is rejected by the chat template ({error})") from error


class ChatTemplate:
    """A tokenizer's chat template with tools and further arguments."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list | None, kwargs: dict[str, Any]):
        if not (tokenizer.chat_template or kwargs.get("chat_template")):
            raise ValueError(
                "the data set holds messages but the tokenizer has no chat template; set tokenizer.chat_template, load "
                "the tokenizer of the instruction-tuned model, or give prompt, chosen and rejected as text"
            )
        self.tokenizer = tokenizer
        self.arguments = {"tools": tools, **kwargs}
        self.source = tokenizer.get_chat_template(kwargs.get("chat_template"), tools)
        self.has_markers = bool(_GENERATION_MARKER.search(self.source))
        self.reads_blocks = _reads_blocks(self.source)

    def _contents(self, messages: list[Message]) -> list[Message]:
        """The messages with their content in the form that the template reads."""
        if not self.reads_blocks:
            return messages
        return [{**message, "content": [{"type": "text", "text": text_of(message)}]} for message in messages]

    def render(self, messages: list[Message], generation_prompt: bool = False, unfinished: bool = False) -> str:
        """The messages as text, followed by the header of an assistant turn or with the last message left open."""
        how = {"add_generation_prompt": generation_prompt, "continue_final_message": unfinished, "tokenize": False}
        contents = self._contents(messages)
        return cast(str, self.tokenizer.apply_chat_template(contents, **{**self.arguments, **how}))

    def generated_spans(self, messages: list[Message]) -> list[Span]:
        """The character ranges between the template's `{% generation %}` markers."""
        how = {"chat_template": self.source, "return_assistant_tokens_mask": True, "add_generation_prompt": False}
        rendered = render_jinja_template(
            [self._contents(messages)], **{**self.tokenizer.special_tokens_map, **self.arguments, **how}
        )
        _, spans = cast(tuple[list[str], list[list[Span]]], rendered)
        return spans[0]


@lru_cache(maxsize=64)
def _reads_blocks(template: str) -> bool:
    """Whether a chat template reads only content blocks, and would write nothing for content given as text."""
    word = "prefopt"
    shown = []
    for content in (word, [{"type": "text", "text": word}]):
        try:
            rendered = render_jinja_template([[{"role": "user", "content": content}]], chat_template=template)[0]
            shown.append(word in rendered[0])
        except (jinja2.TemplateError, TypeError, KeyError, ValueError):
            shown.append(False)
    return shown == [False, True]


def _continues_last_message(row: CanonicalRow) -> bool:
    """Whether the responses continue the prompt's last, unfinished assistant message."""
    if not row.prompt or row.prompt[-1]["role"] != "assistant":
        return False
    begins = [response[0]["role"] == "assistant" for response in row.responses]
    if any(begins) != all(begins):
        column = row.columns[begins.index(False)]
        problem = "does not continue the assistant message that ends the prompt, as the other response does"
        raise BadRow(column, problem, "begin all responses of a row with an assistant message, or none")
    return all(begins)


def _join_messages(start: Message, rest: Message) -> Message:
    return {**start, **rest, "content": text_of(start) + text_of(rest)}


def _render_prompt(prompt: list[Message], continues: bool, full: list[str], template: ChatTemplate) -> str:
    if continues:
        return template.render(prompt, unfinished=True)
    if prompt:
        return template.render(prompt, generation_prompt=True)
    # transformers rejects an empty conversation: the prompt is what the template writes before an assistant's words.
    user_turn = [{"role": "user", "content": "a"}]
    header = template.render(user_turn, generation_prompt=True).removeprefix(template.render(user_turn))
    beginning = full[0][: full[0].find(header) + len(header)] if header in full[0] else ""
    return beginning if all(text.startswith(beginning) for text in full) else ""


def _scored_spans(
    full: str, prompt: str, shared: list[Message], response: list[Message], template: ChatTemplate
) -> list[Span] | None:
    """The character ranges of `full` that the assistant writes; None: everything after the prompt.

    Without generation markers in the template, an assistant turn is what rendering one more message adds after the
    generation prompt: its words and the end of turn, but not its header.
    """
    messages = shared + response
    if template.has_markers:
        return template.generated_spans(messages)
    if [message["role"] for message in response] == ["assistant"]:
        return None
    spans = []
    for at in range(len(shared), len(messages)):
        if messages[at]["role"] == "assistant":
            start = _turn_start(full, prompt, messages[:at], template, first=at == len(shared))
            spans.append((start, _turn_end(full, start, messages, at, template)))
    return spans


_REWRITES = "it rewrites earlier turns, which hides where the assistant's begin: give it {% generation %} markers"


def _turn_start(full: str, prompt: str, before: list[Message], template: ChatTemplate, first: bool) -> int:
    if first:
        return shared_length(prompt, full)
    start = shared_length(template.render(before, generation_prompt=True), full)
    if start < len(template.render(before)):
        raise ValueError(_REWRITES)
    return start


def _turn_end(full: str, start: int, messages: list[Message], at: int, template: ChatTemplate) -> int:
    if at == len(messages) - 1:
        return len(full)
    turn = template.render(messages[: at + 1])[start:]
    # A template may write more in the last turn than in an earlier one (Qwen3: its thinking), with the same end.
    for skipped in range(len(turn.rstrip())):
        if full.startswith(turn[skipped:], start):
            return start + len(turn) - skipped
    raise ValueError(_REWRITES)
