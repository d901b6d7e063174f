"""Convert canonical rows to token ids: the prompt that all responses share, and the scored tokens of each response.

The texts of many rows are tokenized in one call. Tokens may merge across the boundary of prompt and response.
Therefore, the shared prompt ends before the first token in which any prompt + response differs from the prompt alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.render import RenderedRow, Renderer
from hf_prefopt.data.rows import BadRow, CanonicalRow, shared_length
from hf_prefopt.data.template import Span


@dataclass(frozen=True)
class TokenizedRow:
    """A prompt and all its responses, as token ids.

    Attributes:
        prompt_ids: Token ids of the prompt that all responses share.
        response_ids: K lists of token ids, one list per response.
        scored_masks: K lists with an entry per response token: 1 if its log-prob is used, otherwise 0.
        example_columns: See `CanonicalRow`.
        change: If the prompts in generation and in training differ, two texts: the end of the prompt in generation, and
            the text at the same place in training. Otherwise None.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    scored_masks: list[list[int]]
    example_columns: dict[str, list]
    change: tuple[str, str] | None = None


class TokenKinds:
    """A classification of the token ids of a tokenizer: control tokens, whitespace, and other tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._blank: dict[int, bool] = {}

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of all control tokens."""
        added = (token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return frozenset(chain(self.tokenizer.all_special_ids, added))

    def is_blank(self, token_id: int) -> bool:
        """Return True if the token is only whitespace."""
        if token_id not in self._blank:
            self._blank[token_id] = not cast(str, self.tokenizer.decode([token_id])).strip()
        return self._blank[token_id]

    def closing_token(self, ids: Sequence[int]) -> int | None:
        """Return the control token at the end of these ids, such as EOS or the template's end of turn.

        Whitespace after it is ignored. Return None if the ids end with another token.
        """
        for token_id in reversed(ids):
            if token_id in self.special:
                return token_id
            if not self.is_blank(token_id):
                return None
        return None

    def is_closed(self, ids: Sequence[int], scored: Sequence[int]) -> bool:
        """Return True if a scored control token ends these ids (see `closing_token`).

        Otherwise, the model does not learn to stop.
        """
        closing = self.closing_token(ids)
        return closing is not None and bool(scored[len(ids) - 1 - list(reversed(ids)).index(closing)])

    def has_words(self, ids: Sequence[int], scored: Sequence[int]) -> bool:
        """Return True if any scored token is neither a control token nor whitespace."""
        words = (i for i, is_scored in zip(ids, scored, strict=True) if is_scored and i not in self.special)
        return any(not self.is_blank(token_id) for token_id in words)


def tokenize_rows(
    rows: Sequence[CanonicalRow],
    tokenizer: PreTrainedTokenizerBase,
    kinds: TokenKinds,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[TokenizedRow | BadRow]:
    """Tokenize the rows. For a row that cannot be tokenized, return the `BadRow` with the reason.

    Args:
        rows: Canonical rows.
        tokenizer: The tokenizer.
        kinds: Classification of its token ids.
        template_kwargs: Arguments of the chat template; the arguments of a row take precedence.

    Raises:
        ValueError: If the tokenizer has no chat template, or if only parts of a response are scored and the tokenizer
            is not a fast tokenizer.
    """
    renderer = Renderer(tokenizer, template_kwargs)
    rendered = [None if row.content_type == "tokens" else _try(renderer.render, row) for row in rows]
    encodings = _encode_all([r for r in rendered if isinstance(r, RenderedRow)], tokenizer)
    done: list[TokenizedRow | BadRow] = []
    for row, texts in zip(rows, rendered, strict=True):
        if isinstance(texts, BadRow):
            done.append(texts)
        elif texts is None:
            done.append(_try(_take_ids, row, len(tokenizer)))
        else:
            done.append(_try(_split_row, row, texts, next(encodings), kinds))
    return done


def _try(step, *arguments):
    """Call a function with these arguments. Return its result, or the `BadRow` that it raised."""
    try:
        return step(*arguments)
    except BadRow as error:
        return error


@dataclass(frozen=True)
class _Encoding:
    """The token ids of a row's texts. `offsets`: the character range of each token in `full`; None if not needed."""

    prompt: list[int] | None
    full: list[list[int]]
    offsets: list[list[Span]] | None


def _encode_all(rows: list[RenderedRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Encoding]:
    """Return the encodings of the rows, in order.

    The tokenizer is called at most twice: for the rows that need special tokens, and for the others.
    """
    done: dict[int, _Encoding] = {}
    for add_special_tokens in (False, True):
        group = {at: row for at, row in enumerate(rows) if row.add_special_tokens == add_special_tokens}
        done.update(zip(group, _encode(list(group.values()), add_special_tokens, tokenizer), strict=True))
    return iter([done[at] for at in range(len(rows))])


def _encode(rows: list[RenderedRow], add_special_tokens: bool, tokenizer: PreTrainedTokenizerBase) -> list[_Encoding]:
    if not rows:
        return []
    needs_offsets = any(spans is not None for row in rows for spans in row.spans)
    if needs_offsets and not tokenizer.is_fast:
        raise ValueError("finding the assistant's turns needs a fast tokenizer: load it with use_fast=True")
    encoded = tokenizer(
        [text for row in rows for text in (row.prompt or "", *row.full)],
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=needs_offsets,
        verbose=False,  # no warning about texts longer than the model's maximum: they are truncated later
    )
    ids, offsets = encoded["input_ids"], encoded.get("offset_mapping")
    done, at = [], 0
    for row in rows:
        first, at = at + 1, at + 1 + len(row.full)
        prompt = None if row.prompt is None else ids[first - 1]
        done.append(_Encoding(prompt, ids[first:at], offsets[first:at] if needs_offsets else None))
    return done


def _split_row(row: CanonicalRow, texts: RenderedRow, encoding: _Encoding, kinds: TokenKinds) -> TokenizedRow:
    boundary = _boundary(encoding)
    responses = [ids[boundary:] for ids in encoding.full]
    masks = [_scored_mask(texts, encoding, k)[boundary:] for k in range(len(responses))]
    change = texts.change or _token_change(texts, encoding, boundary, kinds)
    tokenized = _finish_row(row, encoding.full[0][:boundary], responses, masks, change)
    if texts.prompt is not None:
        for column, ids, mask in zip(row.columns, responses, tokenized.scored_masks, strict=True):
            if not kinds.has_words(ids, mask):
                is_merged = not boundary and row.prompt and kinds.has_words(ids, [1] * len(ids))
                raise BadRow(column, *(_MERGED if is_merged else _NO_WORDS[row.content_type]))
    return tokenized


def _token_change(texts: RenderedRow, encoding: _Encoding, boundary: int, kinds: TokenKinds) -> tuple[str, str] | None:
    """Return the end of the prompt tokenized alone, and the text at its place in prompt + response.

    Return None if no tokens merge at the boundary, or if the scored text does not begin directly after the prompt.
    """
    prompt = encoding.prompt or []
    first = next((k for k, ids in enumerate(encoding.full) if shared_length(prompt, ids) < len(prompt)), None)
    begins = [span is None or (span and span[0][0] == len(texts.prompt or "")) for span in texts.spans]
    if first is None or not all(begins):
        return None
    ends = (prompt[boundary:], encoding.full[first][boundary : boundary + len(prompt) - boundary])
    alone, joined = (cast(str, kinds.tokenizer.decode(ids)) for ids in ends)
    return alone, joined


_MERGED = (
    "and the prompt merge into one token, the first of the sequence, which no position predicts",
    "put white space between them, or add a token before the prompt",
)
_NO_WORDS = {
    "text": ("has nothing to score beyond special tokens",),
    "messages": (
        "has nothing to score beyond the end of the turn: the chat template ignores its tool_calls or its content",
        "use a chat template that renders them, drop the row or pass on_bad_rows='drop'",
    ),
}


def _take_ids(row: CanonicalRow, vocabulary: int) -> TokenizedRow:
    for column, ids in zip(("prompt_ids", *row.columns), (row.prompt, *row.responses), strict=True):
        if ids and max(ids) >= vocabulary:
            cure = "use the tokenizer that made the ids"
            raise BadRow(column, f"contains token id {max(ids)}, but the tokenizer has {vocabulary:,} tokens", cure)
    return _finish_row(row, row.prompt, row.responses, [[1] * len(ids) for ids in row.responses])


def _finish_row(
    row: CanonicalRow,
    prompt: list[int],
    responses: list[list[int]],
    masks: list[list[int]],
    change: tuple[str, str] | None = None,
) -> TokenizedRow:
    if not prompt:
        # No position predicts the first token of a sequence.
        masks = [[0, *mask[1:]] for mask in masks]
    for column, mask in zip(row.columns, masks, strict=True):
        if not any(mask):
            raise BadRow(column, "has no token to score")
    return TokenizedRow(prompt, responses, masks, row.example_columns, change)


def _boundary(encoding: _Encoding) -> int:
    """Return the number of tokens that all sequences share with the prompt.

    If there is no separate prompt, count the tokens that the sequences share with each other. In both cases, each
    sequence has at least one more token.
    """
    if encoding.prompt is None:
        first, *others = encoding.full
        shared = min(shared_length(first, ids) for ids in others)
    else:
        shared = min(shared_length(encoding.prompt, ids) for ids in encoding.full)
    return max(0, min(shared, *(len(ids) - 1 for ids in encoding.full)))


def _scored_mask(texts: RenderedRow, encoding: _Encoding, k: int) -> list[int]:
    """Return 0 / 1 for each token of prompt + response `k`: 1 if the token's last character is in a span."""
    spans = texts.spans[k]
    if spans is None or encoding.offsets is None:
        return [1] * len(encoding.full[k])
    # The end decides, because a byte-level tokenizer moves the start of a token past its leading spaces.
    return [int(any(start < end <= stop for start, stop in spans)) for _, end in encoding.offsets[k]]
