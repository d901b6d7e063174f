"""Truncate a row's prompt and responses to a maximum number of tokens.

A truncated response keeps the control token at its end (EOS, or the template's end of turn). All responses of a row
keep the same prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_prefopt.data.beginnings import Beginning
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds


@dataclass(frozen=True)
class Cuts:
    """The effect of truncation on one row.

    Attributes:
        responses: Number of truncated responses.
        prompt: Whether the prompt was truncated.
        longest: Number of tokens of prompt + longest response, before truncation.
    """

    responses: int = 0
    prompt: bool = False
    longest: int = 0


def truncate_row(
    row: TokenizedRow,
    max_length: int | None,
    mode: str,
    kinds: TokenKinds,
    begin: Callable[[], Beginning] = Beginning,
) -> tuple[TokenizedRow | None, Cuts]:
    """Truncate a row so that prompt + response has at most `max_length` tokens, for each response.

    Args:
        row: The tokenized row.
        max_length: Maximum number of tokens; None disables truncation.
        mode: A key of `TRUNCATION_MODES`.
        kinds: Classification of the token ids.
        begin: Function that finds where the prompt may be cut. It is called only if a prompt must be cut.

    Returns:
        The truncated row, and the effect of truncation. The row is None if the prompt cannot be cut enough, or if a
        response would keep only control tokens and whitespace.
    """
    longest = len(row.prompt_ids) + max(map(len, row.response_ids))
    if max_length is None or longest <= max_length:
        return row, Cuts(longest=longest)
    prompt = TRUNCATION_MODES[mode](row, max_length, begin)
    if prompt is None:
        return None, Cuts(longest=longest)
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
    columns = dict(row.example_columns)
    if "token_weights" in columns:
        weighted = zip(columns["token_weights"], kept, strict=True)
        columns["token_weights"] = [[weights[at] for at in places] for weights, places in weighted]
    return TokenizedRow(prompt, responses, masks, columns), cuts


Begin = Callable[[], Beginning]


def _whole_prompt(row: TokenizedRow, max_length: int, begin: Begin) -> list[int] | None:
    return row.prompt_ids


def _end_of_prompt(row: TokenizedRow, max_length: int, begin: Begin) -> list[int] | None:
    """Return the head of the prompt (`Beginning.head`), and the last tokens that fit before the longest response.

    At least one token is kept, because it predicts the first response token. Return None if the head does not fit, or
    if the last tokens would start within a turn other than the last user turn.
    """
    room = max(1, max_length - max(map(len, row.response_ids)))
    prompt = row.prompt_ids
    if len(prompt) <= room:
        return prompt
    beginning = begin()
    kept = min(beginning.head, len(prompt) - 1)
    for place in beginning.turns:
        if kept + len(prompt) - place <= room:
            return [*prompt[:kept], *prompt[place:]]
    # The head, the tail and one token before the tail are always kept. If a response does not fit, it is truncated.
    end = max(beginning.tail + 1, room - kept)
    if not beginning.splits or kept + end > max_length - 1:
        return None
    return [*prompt[:kept], *prompt[-end:]]


# Functions that return the prompt tokens to keep if a row is too long. The responses get the rest of max_length.
TRUNCATION_MODES: dict[str, Callable[[TokenizedRow, int, Begin], list[int] | None]] = {
    "keep_start": _whole_prompt,
    "keep_end": _end_of_prompt,
}


def _cut_response(
    ids: list[int], mask: list[int], room: int, kinds: TokenKinds
) -> tuple[list[int], list[int], Sequence[int]]:
    """Return the first tokens of a response and the control token that closes it, at most `room` tokens together.

    If the cut is inside an unscored turn, this whole turn is removed, and no closing token is added. The same applies
    if the cut is directly after the first token of a scored turn, because the closing token would replace that token.

    Returns:
        The tokens, their scored mask, and their positions in the original response.
    """
    end = max(0, room)
    if 0 in mask[max(0, end - 2) : end]:
        end -= mask[end - 1]
        while end and not mask[end - 1]:
            end -= 1
        return ids[:end], mask[:end], range(end)
    closing = kinds.closing_token(ids)
    if closing is None or not end:
        return ids[:end], mask[:end], range(end)
    closed_at = len(ids) - 1 - ids[::-1].index(closing)
    return [*ids[: end - 1], closing], [*mask[: end - 1], mask[closed_at]], [*range(end - 1), closed_at]
