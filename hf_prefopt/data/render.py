"""Render a canonical row (`rows.CanonicalRow`) as text: the prompt, each prompt + response, and the ranges to score.

Conversations are rendered with the chat template. Plain text gets an EOS if it does not end with one. tokenize.py
passes the texts of many rows to the tokenizer in one call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.messages import Message, text_of
from hf_prefopt.data.rows import BadRow, CanonicalRow, shared_length
from hf_prefopt.data.template import TEMPLATE_ERRORS, THINKING_MARKER, ChatTemplate, Span, blaming
from hf_prefopt.data.turns import scored_spans
from hf_prefopt.data.unwritten import check_prompt_written, check_response_written

# Number of characters shown before and after a difference between the prompts in generation and in training.
_SHOWN = 16


@dataclass(frozen=True)
class RenderedRow:
    """The texts of one row.

    Attributes:
        prompt: The prompt as text. If it is None, the prompt is the common prefix of the token ids of `full`.
        full: K texts: prompt + response, for each response.
        spans: For each text in `full`, the character ranges `(start, end)` to score. None instead of the ranges scores
            everything after the prompt.
        add_special_tokens: Whether the tokenizer should add its special tokens, such as BOS. False for messages: the
            chat template writes these tokens.
        change: If the prompts in generation and in training differ, two texts: the end of the prompt in generation, and
            the text at the same place in training. Otherwise None.
    """

    prompt: str | None
    full: list[str]
    spans: list[list[Span] | None]
    add_special_tokens: bool
    change: tuple[str, str] | None = None


class Renderer:
    """A renderer of rows. A chat template is analyzed only once for the same tools and template arguments.

    Raises:
        ValueError: If rows contain messages and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None):
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs or {})
        self._templates: dict[str, ChatTemplate] = {}

    def render(self, row: CanonicalRow) -> RenderedRow:
        """Return the texts of a row of text or messages. Raises `BadRow` if the chat template rejects the row."""
        rendered = self._render_text(row) if row.content_type == "text" else self._render_messages(row)
        _reject_surrogates(row, rendered)
        return rendered

    def asked(self, row: CanonicalRow, prompt: list[Message]) -> str:
        """Return the messages `prompt` as text, rendered with the template and arguments of `row`."""
        return _render_prompt(prompt, _continues_last_message(row), [], self._template(row))

    def head(self, row: CanonicalRow) -> str:
        """Return the text before the content of the first user message.

        It consists of the template's own beginning, the row's system prompt and the header of the user turn. If the
        template rejects these messages, return "".
        """
        template = self._template(row)
        system = [message for message in row.prompt[:1] if message["role"] in ("system", "developer")]
        try:
            one, other = (template.render([*system, {"role": "user", "content": word}]) for word in ("a", "b"))
        except TEMPLATE_ERRORS:
            return ""
        return one[: shared_length(one, other)]

    @cached_property
    def _added(self) -> tuple[bool, bool]:
        """Two flags: whether the tokenizer adds a BOS, and whether it adds an EOS."""
        ids = self.tokenizer("a")["input_ids"]
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return ids[:1] == [known[0]], ids[-1:] == [known[1]]

    def _render_text(self, row: CanonicalRow) -> RenderedRow:
        """Render prompt + response with exactly one BOS, if the tokenizer adds one, and exactly one EOS."""
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        adds_bos, adds_eos = self._added
        prompt, texts = row.prompt, [(row.prompt or "") + response for response in row.responses]
        if adds_bos:
            prompt, texts = prompt and _without(bos, prompt), [_without(bos, text) for text in texts]
            _reject_later_bos(bos, prompt, row)
        full = [_ended(text, eos, adds_eos) for text in texts]
        return RenderedRow(prompt, full, [None] * len(full), add_special_tokens=True)

    def _template(self, row: CanonicalRow) -> ChatTemplate:
        key = repr((row.tools, row.chat_template_kwargs))
        if key not in self._templates:
            self._templates[key] = ChatTemplate(self.tokenizer, row.tools, {**self.kwargs, **row.chat_template_kwargs})
        return self._templates[key]

    def _render_messages(self, row: CanonicalRow) -> RenderedRow:
        """Render the conversation with the chat template."""
        template = self._template(row)
        continues = _continues_last_message(row)
        shared, responses = row.prompt, row.responses
        if continues:
            shared, last = row.prompt[:-1], row.prompt[-1]
            responses = [[_join_messages(last, response[0]), *response[1:]] for response in row.responses]
        full, spans = [], []
        for column, response in zip(row.columns, responses, strict=True):
            with blaming(column):
                full.append(template.render(shared + response))
        with blaming("prompt"):
            asked = _render_prompt(row.prompt, continues, full, template)
            check_prompt_written(shared, responses[0], template)
        for column, said, response, text in zip(row.columns, row.responses, responses, full, strict=True):
            with blaming(column):
                spans.append(scored_spans(column, text, asked, shared, response, template))
                check_response_written(column, shared, said, text[spans[-1][0][0] if spans[-1] else 0 :], template)
        prompt = _unscored_beginning(asked, full, spans)
        kept = [None if span == [(len(prompt), len(text))] else span for span, text in zip(spans, full, strict=True)]
        return RenderedRow(prompt, full, kept, add_special_tokens=False, change=_change(asked, full))


def _reject_surrogates(row: CanonicalRow, rendered: RenderedRow) -> None:
    """Raise `BadRow` if a text contains half of a surrogate pair, because no tokenizer can encode it.

    Such a half occurs, for example, if JSON was cut inside an emoji.
    """
    named = zip(("prompt", *row.columns), (rendered.prompt or "", *rendered.full), strict=True)
    for column, text in named:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"contains {text[error.start]!r} at character {error.start:,}, which is half of a surrogate pair"
            raise BadRow(column, problem, "remove it, or pass on_bad_rows='drop'") from None


def _unscored_beginning(asked: str, full: list[str], spans: list[list[Span]]) -> str:
    """Return the common prefix of all texts, which ends at the latest before the first scored character of any text."""
    starts = [span[0][0] if span else shared_length(asked, text) for span, text in zip(spans, full, strict=True)]
    beginning = full[0][: min(starts)]
    return beginning[: min(shared_length(beginning, text) for text in full)]


def _change(asked: str, full: list[str]) -> tuple[str, str] | None:
    """Return the end of the generation prompt, and the text at its place in the first text that differs from it.

    Return None if all texts begin with the generation prompt.
    """
    for text in full:
        shared = shared_length(asked, text)
        if shared < len(asked):
            shown = max(0, shared - _SHOWN)
            return asked[shown:], text[shown : len(asked) + _SHOWN]
    return None


def _without(bos: str, text: str) -> str:
    """Remove every BOS from the beginning of a text."""
    while text.startswith(bos):
        text = text.removeprefix(bos)
    return text


def _reject_later_bos(bos: str, prompt: str | None, row: CanonicalRow) -> None:
    """Raise `BadRow` if a response begins with the BOS although a prompt precedes it."""
    for column, response in zip(row.columns, row.responses, strict=True):
        if prompt and response.lstrip().startswith(bos):
            cure = "remove it, or the `prompt` column if the responses contain the prompt"
            raise BadRow(column, f"begins with {bos!r}, which is only allowed at the beginning of a sequence", cure)


def _ended(text: str, eos: str, adds_eos: bool) -> str:
    """Return the text with one EOS at its end, or without it if the tokenizer adds the EOS.

    A text that ends with an EOS and white space, as rendered by some chat templates, is returned unchanged.
    """
    if not eos:
        return text
    bare = text if text.endswith(eos) else text.rstrip()
    if not bare.endswith(eos):
        return text if adds_eos else text + eos
    return bare.removesuffix(eos) if adds_eos else text


def _continues_last_message(row: CanonicalRow) -> bool:
    """Return True if the responses continue the prompt's last, unfinished assistant message."""
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
    # transformers cannot render an empty conversation. Therefore, an empty prompt is rendered as the text that the
    # template writes before an assistant message, possibly without the thinking marker at the end of this text.
    for header in (template.header, THINKING_MARKER.sub("", template.header).rstrip()):
        beginning = full[0][: full[0].find(header) + len(header)]
        if header and header in full[0] and all(text.startswith(beginning) for text in full):
            return beginning
    return ""
