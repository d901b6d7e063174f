"""Convert the token ids of a prompt to the text of its messages, without the chat template, for display."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.messages import Message
from hf_prefopt.data.template import TEMPLATE_ERRORS, THINKING_MARKER, ChatTemplate

# Maximum number of user turns into which a prompt is split.
_TURNS = 12
_MARK = "prefopt{}mark"
_ANY_MARK = re.compile(r"prefopt\d+mark")


class PromptText:
    """A converter from the token ids of prompts to their text.

    Args:
        tokenizer: Tokenizer that produced the token ids. Without a chat template, prompts are only decoded.
        template_kwargs: Arguments of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None):
        self._tokenizer = tokenizer
        kwargs = dict(template_kwargs or {})
        has_template = tokenizer.chat_template or kwargs.get("chat_template")
        self._template = ChatTemplate(tokenizer, None, kwargs) if has_template else None
        self._frame = lru_cache(maxsize=None)(self._rendered_frame)

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt: the content of its message or, for several messages, `role: content` for each.

        If the ids are not a conversation in the form that the template writes, they are decoded without special tokens.
        This is the case for plain text. A system prompt that the template adds by itself is left out.
        """
        found = self.messages(ids)
        if found is None:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        if len(found) == 1:
            return found[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in found)

    def messages(self, ids: Sequence[int]) -> list[Message] | None:
        """Return the messages of a prompt, or `None` if it is not a conversation in the template's form."""
        if self._template is None:
            return None
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for turns in range(_TURNS, 0, -1):  # most turns first: with fewer, several messages would match as one
            for has_system in (False, True):
                roles = (*["system"] * has_system, *["user", "assistant"] * (turns - 1), "user")
                frame = self._frame(roles)
                found = _contents(text, frame) if frame else None
                if found is not None:
                    # The rest after the last header may be the beginning of a response or an empty thinking block.
                    *contents, rest = found
                    named = list(zip(roles, contents, strict=True))
                    named += [("assistant", rest)] * bool(THINKING_MARKER.sub("", rest).strip())
                    return [{"role": role, "content": content} for role, content in named]
        return None

    def _rendered_frame(self, roles: tuple[str, ...]) -> list[str] | None:
        """Return the frame: the texts that the template writes before, between and after messages with these roles.

        Return `None` if there is no text between two messages, or if the template rejects, omits or moves a message.
        """
        assert self._template is not None
        messages: list[Message] = [{"role": role, "content": _MARK.format(at)} for at, role in enumerate(roles)]
        try:
            rendered = self._template.render(messages, generation_prompt=True)
        except TEMPLATE_ERRORS:
            return None
        if _ANY_MARK.findall(rendered) != [message["content"] for message in messages]:
            return None
        frame = [part.strip() for part in _ANY_MARK.split(rendered)]
        return frame if all(frame[1:]) else None  # without text between two messages, their boundary is unknown


def _contents(text: str, frame: Sequence[str]) -> list[str] | None:
    """Return the texts between the parts of a frame (see `_rendered_frame`), and the text after its last part.

    Return `None` if the text does not contain the parts in their order.
    """
    first, *others = map(_pattern, frame)
    begin = first.match(text)
    if begin is None:
        return None
    at, found = begin.end(), []
    for pattern in others[:-1]:
        end = pattern.search(text, at)
        if end is None:
            return None
        found.append(text[at : end.start()])
        at = end.end()
    if end := others[-1].search(text, at):
        return [*found, text[at : end.start()], text[end.end() :]]
    # Tokens may merge at the boundary of prompt and response, so the prompt may lack the end of the last part.
    rest = text[at:].rstrip()
    cut = next((k for k in range(len(frame[-1]), 0, -1) if rest.endswith(frame[-1][:k].rstrip())), None)
    return None if cut is None else [*found, rest.removesuffix(frame[-1][:cut].rstrip()).rstrip(), ""]


@lru_cache(maxsize=256)
def _pattern(part: str) -> re.Pattern[str]:
    """Return a pattern that matches the part with any white space, because decoding may change white space."""
    return re.compile(r"\s*".join(["", *map(re.escape, part.split()), ""]))
