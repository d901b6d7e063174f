"""Prompt groups cut to a length in tokens: what goes, what stays, and what has to be told about it.

Whatever is cut, a response keeps the token that ends it (EOS, or the template's end of turn), and all responses of a
row keep one and the same prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hf_prefopt.data.tokenize import TokenisedRow, TokenKinds


@dataclass(frozen=True)
class Cuts:
    """What truncation did to one row: responses cut at their end, whether its prompt lost its start, and its length
    (tokens of prompt + longest response) before."""

    responses: int = 0
    prompt: bool = False
    longest: int = 0


def truncate_row(
    row: TokenisedRow, max_length: int | None, mode: str, kinds: TokenKinds
) -> tuple[TokenisedRow | None, Cuts]:
    """Cut a row so that prompt + response is at most `max_length` tokens, for each response.

    Args:
        row: the row.
        max_length: tokens; None cuts nothing.
        mode: a key of `TRUNCATION_MODES`.
        kinds: the tokenizer's control tokens and blanks.

    Returns:
        The row, or None where a response would keep nothing that says something; and what was cut.
    """
    longest = len(row.prompt_ids) + max(map(len, row.response_ids))
    if max_length is None or longest <= max_length:
        return row, Cuts(longest=longest)
    prompt = TRUNCATION_MODES[mode](row, max_length)
    room = max_length - len(prompt)
    responses, masks = [], []
    for ids, mask in zip(row.response_ids, row.scored_masks, strict=True):
        if len(ids) > room:
            ids, mask = _cut_response(ids, mask, room, kinds)
            if not kinds.says_something(ids, mask):
                return None, Cuts(longest=longest)
        responses.append(ids)
        masks.append(mask)
    cut = sum(len(ids) > room for ids in row.response_ids)
    cuts = Cuts(cut, prompt=len(prompt) < len(row.prompt_ids), longest=longest)
    return replace(row, prompt_ids=prompt, response_ids=responses, scored_masks=masks), cuts


def _whole_prompt(row: TokenisedRow, max_length: int) -> list[int]:
    return row.prompt_ids


def _end_of_prompt(row: TokenisedRow, max_length: int) -> list[int]:
    """What fits before the longest response, one token at least: the first token of a response has to be predicted."""
    room = max(1, max_length - max(map(len, row.response_ids)))
    return row.prompt_ids[-room:]


# What is kept of the prompt of a row that is too long; the responses get what is left of max_length.
TRUNCATION_MODES: dict[str, Callable[[TokenisedRow, int], list[int]]] = {
    "keep_start": _whole_prompt,
    "keep_end": _end_of_prompt,
}


def _cut_response(ids: list[int], mask: list[int], room: int, kinds: TokenKinds) -> tuple[list[int], list[int]]:
    """The response's first tokens, ended as the whole one was; an unscored turn that the cut goes through goes."""
    end = max(0, room)
    if end and not mask[end - 1]:
        while end and not mask[end - 1]:
            end -= 1
        return ids[:end], mask[:end]
    closing = kinds.closing_token(ids)
    if closing is None or not end:
        return ids[:end], mask[:end]
    return [*ids[: end - 1], closing], [*mask[: end - 1], 1]
