"""Prompt groups cut to a length in tokens: what goes, what stays, and what has to be told about it.

Whatever is cut, a response keeps the token that ends it (EOS, or the template's end of turn), and all responses of a
row keep one and the same prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds


@dataclass(frozen=True)
class Cuts:
    """What truncation did to one row: responses cut at their end, whether its prompt lost its start, and its length
    (tokens of prompt + longest response) before."""

    responses: int = 0
    prompt: bool = False
    longest: int = 0


def truncate_row(
    row: TokenizedRow, max_length: int | None, mode: str, kinds: TokenKinds
) -> tuple[TokenizedRow | None, Cuts]:
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
    kept: list[Sequence[int]] = []
    for ids, mask in zip(row.response_ids, row.scored_masks, strict=True):
        places: Sequence[int] = range(len(ids))
        if len(ids) > room:
            ids, mask, places = _cut_response(ids, mask, room, kinds)
            if not kinds.has_words(ids, mask):
                return None, Cuts(longest=longest)
        responses.append(ids)
        masks.append(mask)
        kept.append(places)
    cut = sum(len(ids) > room for ids in row.response_ids)
    cuts = Cuts(cut, prompt=len(prompt) < len(row.prompt_ids), longest=longest)
    example_columns = {
        name: _kept(values, kept) if name in TOKEN_MARKS else values for name, values in row.example_columns.items()
    }
    return replace(
        row, prompt_ids=prompt, response_ids=responses, scored_masks=masks, example_columns=example_columns
    ), cuts


# Marks that say something of each token, and go where it goes; the others are of whole responses.
TOKEN_MARKS = ("token_weights",)


def _kept(values: list[list[float]], places: list[Sequence[int]]) -> list[list[float]]:
    """The values of the tokens that stayed, response by response."""
    return [[of_tokens[at] for at in kept] for of_tokens, kept in zip(values, places, strict=True)]


def _whole_prompt(row: TokenizedRow, max_length: int) -> list[int]:
    return row.prompt_ids


def _end_of_prompt(row: TokenizedRow, max_length: int) -> list[int]:
    """What fits before the longest response, one token at least: the first token of a response has to be predicted."""
    room = max(1, max_length - max(map(len, row.response_ids)))
    return row.prompt_ids[-room:]


# What is kept of the prompt of a row that is too long; the responses get what is left of max_length.
TRUNCATION_MODES: dict[str, Callable[[TokenizedRow, int], list[int]]] = {
    "keep_start": _whole_prompt,
    "keep_end": _end_of_prompt,
}


def _cut_response(
    ids: list[int], mask: list[int], room: int, kinds: TokenKinds
) -> tuple[list[int], list[int], Sequence[int]]:
    """The response's first tokens, ended as the whole one was; an unscored turn that the cut goes through goes.

    Returns:
        The tokens, which of them are scored, and where each stood.
    """
    end = max(0, room)
    if end and not mask[end - 1]:
        while end and not mask[end - 1]:
            end -= 1
        return ids[:end], mask[:end], range(end)
    closing = kinds.closing_token(ids)
    if closing is None or not end:
        return ids[:end], mask[:end], range(end)
    closed_at = len(ids) - 1 - ids[::-1].index(closing)
    return [*ids[: end - 1], closing], [*mask[: end - 1], 1], [*range(end - 1), closed_at]
