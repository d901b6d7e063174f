"""Where a prompt that is too long may begin, so that what is left of it is still a prompt.

BOS, the system prompt and the header of the first user's turn stay. Whole turns go first, up to a later user's turn, so
that nobody's words stand under the header of another. Only the last message of a user is cut within.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.render import Renderer
from hf_prefopt.data.rows import CanonicalRow, shared_length
from hf_prefopt.data.template import TEMPLATE_ERRORS


@dataclass(frozen=True)
class Beginning:
    """Where the tokens of a prompt may be cut.

    Attributes:
        head: the number of tokens at the start that stay.
        turns: the places, in order, from which the rest of the prompt may follow the head: whole turns.
        splits: whether the rest may also begin after the last of them, within a message.
    """

    head: int = 0
    turns: tuple[int, ...] = ()
    splits: bool = True


def find_beginning(
    row: CanonicalRow, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> Beginning:
    """Where the prompt of a row may be cut. Text may be cut anywhere after the BOS."""
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
    return Beginning(head, tuple(turns), splits=is_last)
