"""Find the places where a prompt that is too long may be cut, so that the rest is still a valid prompt.

BOS, the system prompt and the header of the first user turn are always kept. The rest of the prompt starts at the
content of a later user message. All turns in between are removed whole, so that no text appears under the header of
another speaker. If this is not enough, the last user message loses the beginning of its text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.render import Renderer
from hf_prefopt.data.rows import CanonicalRow, shared_length
from hf_prefopt.data.template import TEMPLATE_ERRORS


@dataclass(frozen=True)
class Beginning:
    """The places where the tokens of a prompt may be cut.

    Attributes:
        head: Number of tokens at the start of the prompt that are always kept.
        turns: Token positions directly after the headers of the user turns that follow the first one, in ascending
            order. A cut prompt consists of the head, and of all tokens from one of these positions to the end.
        splits: Whether a cut prompt may also continue from any token after the last of these positions. The cut is then
            inside the text of the last user message.
        tail: Number of tokens at the end of the prompt that are always kept. They follow the content of the last
            message: for example, the end-of-turn token and the header of the assistant's turn.
    """

    head: int = 0
    turns: tuple[int, ...] = ()
    splits: bool = True
    tail: int = 0


def find_beginning(
    row: CanonicalRow, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> Beginning:
    """Find where the prompt of a row may be cut. A prompt that is not messages may be cut anywhere after the BOS."""
    if row.content_type != "messages":
        return Beginning(int(tokenizer.bos_token_id is not None and prompt_ids[:1] == [tokenizer.bos_token_id]))
    renderer = Renderer(tokenizer, template_kwargs)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    head = shared_length(tokens(renderer.head(row)), prompt_ids)
    system = row.prompt[: int(row.prompt[:1] != [] and row.prompt[0]["role"] in ("system", "developer"))]
    users = [at for at in range(len(system), len(row.prompt)) if row.prompt[at]["role"] == "user"]
    whole, turns = tokens(renderer.asked(row, row.prompt)), []
    for at in users[1:]:
        try:
            part = tokens(renderer.asked(row, [*system, *row.prompt[at:]]))
        except TEMPLATE_ERRORS:
            continue
        place = head + len(whole) - len(part)
        if whole[:head] == part[:head] and whole[place:] == part[head:]:
            turns.append(place)
    is_last = users[-1:] == [len(row.prompt) - 1] and len(turns) == len(users) - 1
    return Beginning(head, tuple(turns), is_last, _tail(row, whole, renderer, tokens) if is_last else 0)


def _tail(row: CanonicalRow, whole: list[int], renderer: Renderer, tokens: Callable[[str], list[int]]) -> int:
    """Return the number of tokens that follow the content of the last message.

    They do not depend on the content. They are therefore found by comparing the end of the prompt (`whole`) with the
    ends of two prompts in which the last message has another content.
    """
    asked = (renderer.asked(row, [*row.prompt[:-1], {**row.prompt[-1], "content": word}]) for word in ("a", "1"))
    return min(shared_length(whole[::-1], tokens(text)[::-1]) for text in asked)
