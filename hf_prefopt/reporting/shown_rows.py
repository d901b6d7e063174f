"""Prepared rows as text for a person: what the model sees, which tokens count, and which were cut.

Tokens are decoded run by run, since one character may be several tokens.
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
    """Neighboring tokens of one state.

    Attributes:
        text: the tokens decoded.
        state: "prompt"; "scored", whose log-probs count; "masked", response tokens that are not scored; or "cut", which
            `max_length` removed.
        is_special: whether they are control tokens.
        tokens: their number.
    """

    text: str
    state: State
    is_special: bool
    tokens: int


@dataclass(frozen=True)
class ShownText:
    """A prompt or a response.

    Attributes:
        name: prompt, chosen, rejected, desirable, response 0, ….
        about: what a list says of the response: its rank, its score.
        pieces: the text, cut tokens included.
    """

    name: str
    about: str
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens, without those cut."""
        return sum(piece.tokens for piece in self.pieces if piece.state != "cut")

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return sum(piece.tokens for piece in self.pieces if piece.state == "scored")

    @property
    def cut(self) -> int:
        """The number of tokens cut."""
        return sum(piece.tokens for piece in self.pieces if piece.state == "cut")

    @property
    def counts(self) -> list[str]:
        """Its tokens in words: how many, how many of them scored and cut, and what is said about it."""
        counts = [plural(self.tokens, "token")] + [f"{self.scored:,} scored"] * (self.name != "prompt")
        return counts + [f"{self.cut:,} cut"] * bool(self.cut) + [self.about] * bool(self.about)


@dataclass(frozen=True)
class ShownRow:
    """A row: its number in the data set, its prompt and its responses."""

    number: int
    prompt: ShownText
    responses: tuple[ShownText, ...]


def show_row(row: Mapping[str, Any], kinds: TokenKinds, uncut: Mapping[str, Any] | None = None) -> ShownRow:
    """A prepared row as text.

    Args:
        kinds: of the tokenizer that the row was prepared with.
        uncut: the same row before truncation; by default nothing was cut.
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
    """The tokens of a text, `full`, of which truncation has kept some. `states`: one for each that it kept."""
    places = kept_places(full, kept)
    marked = [(token, "cut" if at is None else states[at]) for token, at in zip(full, places, strict=True)]
    runs = groupby(marked, key=lambda token: (token[1], token[0] in kinds.special))
    return tuple(_piece([token for token, _ in run], *key, kinds) for key, run in runs)


def _piece(ids: list[int], state: State, is_special: bool, kinds: TokenKinds) -> Piece:
    text = kinds.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Piece(str(text), state, is_special, len(ids))


def kept_places(full: Sequence[int], kept: Sequence[int]) -> list[int | None]:
    """For each token its place among those that truncation has kept, or None if it was cut.

    What is kept is a beginning, and either the end (of a prompt) or one closing token (of a response).

    Raises:
        ValueError: `kept` was not cut from `full`.
    """
    full, kept = list(full), list(kept)
    begin = shared_length(full, kept)
    rest = kept[begin:]
    places: list[int | None] = [*range(begin), *[None] * (len(full) - begin)]
    if rest:
        last = (at for at in range(len(full) - len(rest), begin - 1, -1) if full[at : at + len(rest)] == rest)
        at = next(last, None)
        if at is None:
            raise ValueError("these tokens were not cut from those: prepare both with the same tokenizer")
        places[at : at + len(rest)] = range(begin, len(kept))
    return places


def _names(row: Mapping[str, Any]) -> list[str]:
    """The names of a pair's responses, and of a triple's third; by label for unpaired ones, numbers for a list's."""
    if [list(pair) for pair in row.get("pairs", ())] == [[0, 1]]:
        return ["chosen", "rejected", *("gold" for _ in row.get("golds", ()))]
    if "labels" in row:
        return ["desirable" if label else "undesirable" for label in row["labels"]]
    return [f"response {number}" for number in range(len(row["response_ids"]))]


def _abouts(row: Mapping[str, Any]) -> list[str]:
    """What a row says of each response: its rank, its score, its quantile, as far as there are any."""
    said: list[list[str]] = [[] for _ in row["response_ids"]]
    for column, name in (("ranks", "rank"), ("scores", "score"), ("quantiles", "quantile")):
        for texts, value in zip(said, row.get(column, ()), strict=False):
            texts.append(f"{name} {value:g}")
    return [", ".join(texts) for texts in said]
