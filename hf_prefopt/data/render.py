"""A canonical row as text: its prompt, and prompt + response for each response, with the characters that are scored.

Conversations go through the tokenizer's chat template, texts get their EOS. Nothing is tokenized here, so that
tokenize.py can hand the texts of many rows to the tokenizer at once.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hf_prefopt.data.messages import BadRow, Message, text_of
from hf_prefopt.data.rows import CanonicalRow, shared_length

Span = tuple[int, int]

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class RenderedRow:
    """The texts of one row.

    Attributes:
        prompt: the prompt as text; None where it has to be found as the tokens that all of `full` begin with.
        full: prompt + response as text, K of them.
        spans: for each of `full` the character ranges `(start, end)` that the model is to write, or None for everything
            after the prompt.
        add_special_tokens: whether the tokenizer is to add its own BOS (a chat template writes its own).
    """

    prompt: str | None
    full: list[str]
    spans: list[list[Span] | None]
    add_special_tokens: bool


def render_text(row: CanonicalRow, tokenizer: PreTrainedTokenizerBase) -> RenderedRow:
    """prompt + response, ended by one EOS unless the text has it already or the tokenizer adds it by itself."""
    eos = "" if _adds_eos(tokenizer) else tokenizer.eos_token or ""
    texts = [(row.prompt or "") + response for response in row.responses]
    full = [text if eos and text.endswith(eos) else text + eos for text in texts]
    return RenderedRow(row.prompt, full, [None] * len(full), add_special_tokens=True)


def _adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]


def render_messages(row: CanonicalRow, tokenizer: PreTrainedTokenizerBase) -> RenderedRow:
    """The conversation by the chat template. Raises `BadRow` where the template refuses it."""
    template = ChatTemplate(tokenizer, row.tools, row.chat_template_kwargs)
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


@contextmanager
def _blaming(column: str) -> Iterator[None]:
    """Whatever the template cannot render is this column's fault."""
    try:
        yield
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadRow(column, f"is refused by the chat template ({error})") from error


RENDERERS: dict[str, Callable[[CanonicalRow, PreTrainedTokenizerBase], RenderedRow]] = {
    "text": render_text,
    "messages": render_messages,
}


class ChatTemplate:
    """A tokenizer's chat template with one row's tools and arguments."""

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
        self.wants_blocks = _wants_blocks(self.source)

    def _contents(self, messages: list[Message]) -> list[Message]:
        """The messages with their content as the template reads it."""
        if not self.wants_blocks:
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
def _wants_blocks(template: str) -> bool:
    """Whether a chat template reads content as blocks alone: of a content that is text it would write nothing."""
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
    """Whether the responses go on with the prompt's last, unfinished assistant message."""
    if not row.prompt or row.prompt[-1]["role"] != "assistant":
        return False
    begins = [response[0]["role"] == "assistant" for response in row.responses]
    if any(begins) != all(begins):
        column = row.columns[begins.index(False)]
        problem = "does not go on with the assistant message that ends the prompt, as the other response does"
        raise BadRow(column, problem, "begin all responses of a row with an assistant message, or none")
    return all(begins)


def _join_messages(begun: Message, rest: Message) -> Message:
    """One message out of a begun one and its continuation."""
    return {**begun, **rest, "content": text_of(begun) + text_of(rest)}


def _render_prompt(prompt: list[Message], continues: bool, full: list[str], template: ChatTemplate) -> str:
    if continues:
        return template.render(prompt, unfinished=True)
    if prompt:
        return template.render(prompt, generation_prompt=True)
    # transformers refuses an empty conversation: the prompt is what the template writes before an assistant's words.
    anyone = [{"role": "user", "content": "a"}]
    header = template.render(anyone, generation_prompt=True).removeprefix(template.render(anyone))
    beginning = full[0][: full[0].find(header) + len(header)] if header in full[0] else ""
    return beginning if all(text.startswith(beginning) for text in full) else ""


def _scored_spans(
    full: str, prompt: str, shared: list[Message], response: list[Message], template: ChatTemplate
) -> list[Span] | None:
    """The character ranges of `full` that the assistant writes; None: everything after the prompt.

    Without the template's own markers, an assistant turn is what rendering one more message adds after the generation
    prompt: its words and the end of turn, not its header.
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


_REWRITES = "it rewrites earlier turns, so that the assistant's cannot be told apart: give it {% generation %} markers"


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
    # A template may write more in a last turn than in an earlier one (Qwen3: its thinking) and leave the end alike.
    for skipped in range(len(turn.rstrip())):
        if full.startswith(turn[skipped:], start):
            return start + len(turn) - skipped
    raise ValueError(_REWRITES)
