"""Convert prepared rows to text for display: the text that the model sees, its scored tokens and its truncated tokens.

Consecutive tokens are decoded together, because one character may consist of several tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from hf_prefopt.data.notes import plural
from hf_prefopt.data.rows import shared_length
from hf_prefopt.data.tokenize import TokenKinds

State = Literal["prompt", "scored", "masked", "cut"]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens with the same state.

    Attributes:
        text: The decoded tokens.
        state: "prompt" for prompt tokens; "scored" for response tokens whose log-prob counts; "masked" for other
            response tokens; or "cut" for tokens that were removed because of `max_length`.
        is_special: True if the tokens are control tokens.
        tokens: Number of tokens.
    """

    text: str
    state: State
    is_special: bool
    tokens: int


@dataclass(frozen=True)
class ShownText:
    """A prompt or a response.

    Attributes:
        name: "prompt", or the name of a response, such as "chosen", "rejected", "desirable" or "response 0".
        about: Rank, score and quantile of a response, as text; "" if there are none.
        pieces: The pieces of the text, including truncated tokens.
    """

    name: str
    about: str
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens, without truncated tokens."""
        return sum(piece.tokens for piece in self.pieces if piece.state != "cut")

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return sum(piece.tokens for piece in self.pieces if piece.state == "scored")

    @property
    def cut(self) -> int:
        """The number of truncated tokens."""
        return sum(piece.tokens for piece in self.pieces if piece.state == "cut")

    @property
    def counts(self) -> list[str]:
        """Texts with the numbers of all, of scored and of truncated tokens, followed by `about`."""
        counts = [plural(self.tokens, "token")] + [f"{self.scored:,} scored"] * (self.name != "prompt")
        return counts + [f"{self.cut:,} cut"] * bool(self.cut) + [self.about] * bool(self.about)


@dataclass(frozen=True)
class ShownRow:
    """A row: its index in the dataset, its prompt and its responses."""

    number: int
    prompt: ShownText
    responses: tuple[ShownText, ...]


def show_row(row: Mapping[str, Any], kinds: TokenKinds, uncut: Mapping[str, Any] | None = None) -> ShownRow:
    """Convert a prepared row to text.

    Args:
        row: The prepared row.
        kinds: Token kinds of the tokenizer with which the row was prepared.
        uncut: The same row before truncation; None if the row was not truncated.
    """
    uncut = uncut or row
    prompt = _pieces(uncut["prompt_ids"], row["prompt_ids"], ["prompt"] * len(row["prompt_ids"]), kinds)
    responses = zip(
        _names(row), _abouts(row), row["response_ids"], row["scored_masks"], uncut["response_ids"], strict=True
    )
    return ShownRow(
        row["row"],
        ShownText("prompt", "", prompt),
        tuple(
            ShownText(name, about, _pieces(full, ids, ["scored" if scored else "masked" for scored in mask], kinds))
            for name, about, ids, mask, full in responses
        ),
    )


def _pieces(full: Sequence[int], kept: Sequence[int], states: Sequence[State], kinds: TokenKinds) -> tuple[Piece, ...]:
    """Return the pieces of a text.

    Args:
        full: Token ids of the text before truncation.
        kept: Token ids after truncation.
        states: State of each token in `kept`.
    """
    places = kept_places(full, kept)
    marked = [(token, "cut" if at is None else states[at]) for token, at in zip(full, places, strict=True)]
    runs = groupby(marked, key=lambda token: (token[1], token[0] in kinds.special))
    return tuple(_piece([token for token, _ in run], *key, kinds) for key, run in runs)


def _piece(ids: list[int], state: State, is_special: bool, kinds: TokenKinds) -> Piece:
    text = kinds.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Piece(str(text), state, is_special, len(ids))


def kept_places(full: Sequence[int], kept: Sequence[int]) -> list[int | None]:
    """Return, for each token in `full`, its index in `kept`, or None if truncation has removed it.

    Truncation keeps the first tokens of a text. In addition, it may keep the last tokens of a prompt, or the closing
    token of a response.

    Raises:
        ValueError: If `kept` is not a truncation of `full`.
    """
    full, kept = list(full), list(kept)
    begin = shared_length(full, kept)
    rest = kept[begin:]
    places: list[int | None] = [*range(begin), *[None] * (len(full) - begin)]
    if rest:
        last = (at for at in range(len(full) - len(rest), begin - 1, -1) if full[at : at + len(rest)] == rest)
        at = next(last, None)
        if at is None:
            raise ValueError("`kept` is not a truncation of `full`: prepare both with the same tokenizer")
        places[at : at + len(rest)] = range(begin, len(kept))
    return places


def _names(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the responses of a row.

    They are "chosen", "rejected" and "gold" for a pair or a triple, "desirable" and "undesirable" for unpaired
    examples, and "response 0" and so on for a list.
    """
    if [list(pair) for pair in row.get("pairs", ())] == [[0, 1]]:
        return ["chosen", "rejected", *("gold" for _ in row.get("golds", ()))]
    if "labels" in row:
        return ["desirable" if label else "undesirable" for label in row["labels"]]
    return [f"response {number}" for number in range(len(row["response_ids"]))]


def _abouts(row: Mapping[str, Any]) -> list[str]:
    """Describe the rank, score and quantile of each response, if the row has them."""
    said: list[list[str]] = [[] for _ in row["response_ids"]]
    for column, name in (("ranks", "rank"), ("scores", "score"), ("quantiles", "quantile")):
        for texts, value in zip(said, row.get(column, ()), strict=False):
            texts.append(f"{name} {value:g}")
    return [", ".join(texts) for texts in said]
