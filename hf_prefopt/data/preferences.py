"""Read values that say which of two responses is better, or whether a response is desirable, in common notations."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_prefopt.data.rows import BadRow, Tie, as_number

_DESIRABLE = {
    **dict.fromkeys(("true", "1", "chosen", "good", "desirable", "desired", "positive", "accepted", "preferred"), True),
    **dict.fromkeys(("correct", "passed", "pass", "yes", "up", "like", "liked", "upvote", "👍"), True),
    **dict.fromkeys(("thumbs_up", "thumbs up", "thumb_up", "thumbsup"), True),
    **dict.fromkeys(("false", "0", "-1", "rejected", "bad", "undesirable", "undesired", "negative"), False),
    **dict.fromkeys(("incorrect", "failed", "fail", "no", "down", "dislike", "disliked", "downvote", "👎"), False),
    **dict.fromkeys(("thumbs_down", "thumbs down", "thumb_down", "thumbsdown"), False),
}
# Words for a tie. Spaces, underscores, points and hyphens are removed from a verdict before it is compared with them.
_TIES = {
    *("tie", "ties", "tied", "both", "neither", "same", "aboutthesame", "equal", "draw", "nopreference", "a=b"),
    *("bothbad", "bothgood", "botharebad", "botharegood", "tiebothbad", "tiebothgood", "equallybad", "equallygood"),
}
_JOINTS = re.compile(r"[\s_.\-]")
# Brackets around the verdict of an LLM judge: `[[A]]`.
_BRACKETS = re.compile(r"\[+(.*?)\]+", re.DOTALL)
# Words that may precede the letter or number of a response: `model_a`, `Response 1`.
_BEFORE = "model|response|assistant|answer|output|completion|candidate|option|conversation|generation|summary|reply"
_SIDE = re.compile(rf"(?:(?:{_BEFORE})[\s_-]*)?([ab012]|left|right|first|second)", re.IGNORECASE)
# Comparisons of two responses: `A>B` means that A is better, and `B<<A` that A is much better.
_COMPARED = re.compile(r"([^<>]+?)\s*(<+|>+)\s*([^<>]+)")
# Words for the first (0) and the second (1) response, whatever their columns are called. Numbers are not listed: some
# datasets count from 0, others from 1.
_ORDINALS = {"a": 0, "b": 1, "left": 0, "right": 1, "first": 0, "second": 1}


def read_label(column: str, value: Any) -> bool:
    """Return True if the value means that a response is desirable, False if it means that it is undesirable.

    Accepted values are booleans, 1 (desirable), 0 and −1 (undesirable), and words such as "good" and "bad".

    Raises:
        BadRow: If the value is none of these.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (1, 0, -1):
        return value == 1
    label = _DESIRABLE.get(value.strip().lower()) if isinstance(value, str) else None
    if label is None:
        raise BadRow(column, f"is {value!r}", "make it true (desirable) or false")
    return label


def read_quantile(column: str, value: Any) -> float:
    """Return the value as a number from 0 to 1. Raises `BadRow` for any other value."""
    number = _number(column, value)
    if isinstance(value, bool) or not 0 <= number <= 1:
        cure = "set it to the share of the reference's responses that this response is at least as good as, 0 to 1"
        raise BadRow(column, f"is {value!r}", cure)
    return number


def names_a_side(value: Any) -> bool:
    """Return True if a text names the better of two responses by a letter or a word, but not by a number.

    Examples: `B`, `model_a`, `A>>B`, `[[left]]`.
    """
    if not isinstance(value, str):
        return False
    text = _BRACKETS.sub(r"\1", value.strip())
    sides = [text] if (compared := _COMPARED.fullmatch(text)) is None else [compared[1], compared[3]]
    return all(found is not None and not found[1].isdecimal() for found in map(_SIDE.fullmatch, sides))


def by_name(column: str, value: Any, names: tuple[str, str], suffixes: tuple[str, str], models: tuple[Any, Any]) -> int:
    """Return the index, 0 or 1, of the response that the value names: by a letter, a number, a column or a model.

    A comparison (`A>B`) names the better response.

    Args:
        column: Column of the value, for errors.
        value: The value.
        names: Columns of the two responses, such as `response_a` and `response_b`.
        suffixes: Suffixes of these columns, such as `a` and `b`.
        models: Names of the models that wrote the responses; None if unknown.

    Raises:
        Tie: If the value means that neither response is better.
        BadRow: If the value names no response.
    """
    if value is None:
        raise BadRow(column, "is missing")
    cure = f"write {names[0]!r} or {names[1]!r} for the better response, or 'tie' if neither is better"
    if isinstance(value, bool):
        raise BadRow(column, f"is {value!r}, which names no response", cure)
    text = f"{value:g}" if isinstance(value, int | float) else str(value).strip()
    bracketed = _BRACKETS.fullmatch(text)
    text = bracketed[1].strip() if bracketed else text
    if models[0] != models[1] and text in models:
        return models.index(text)
    if _JOINTS.sub("", text.lower().split("(")[0]) in _TIES:
        raise Tie(column, f"is {value!r}")
    place = _place(text, names, suffixes)
    compared = _COMPARED.fullmatch(text)
    if place is None and compared is not None:
        left, right = (_place(side, names, suffixes) for side in (compared[1], compared[3]))
        place = None if left == right else left if compared[2][0] == ">" else right
    if place is not None:
        return place
    raise BadRow(column, f"is {value!r}, which names neither {names[0]} nor {names[1]}", cure)


def _place(text: str, names: tuple[str, str], suffixes: tuple[str, str]) -> int | None:
    """Return the index, 0 or 1, of the response that a text names; None if it names neither response."""
    if text in names:
        return names.index(text)
    found = _SIDE.fullmatch(text)
    side = found[1].lower() if found else ""
    lower = tuple(suffix.lower() for suffix in suffixes)
    return lower.index(side) if side in lower else _ORDINALS.get(side)


def by_votes(column: str, votes: Any, place_of: Callable[[Any], int]) -> int:
    """Return the index of the response that has more votes. A vote for a tie counts for neither response.

    Args:
        column: Column of the votes, for errors.
        votes: A list with one verdict per rater. A verdict names a response, or it is a tie.
        place_of: Function that returns the index of the response that a verdict names.

    Raises:
        Tie: If both responses have the same number of votes.
        BadRow: If the value is not a list or is empty, or a verdict names no response.
    """
    if not isinstance(votes, Sequence) or isinstance(votes, str) or not votes:
        raise BadRow(column, "is not a list of verdicts")
    counts = [0, 0]
    for vote in votes:
        try:
            counts[place_of(vote)] += 1
        except Tie:
            continue
    if counts[0] == counts[1]:
        raise Tie(column, "has equally many votes for both responses")
    return int(counts[1] > counts[0])


def by_sign(column: str, value: Any, *_: Any) -> int:
    """Return 0 (the first response) for a negative number and 1 for a positive number. Raises `Tie` for zero."""
    number = _number(column, value)
    if number == 0:
        raise Tie(column, "is 0")
    return int(number > 0)


def first_if_true(column: str, value: Any, *_: Any) -> int:
    """Return 0 (the first response) for the value 1, and 1 for the value 0. Raises `BadRow` for other values."""
    if value not in (0, 1):
        raise BadRow(column, f"is {value!r}", "make it 1 if the first response is better, 0 if the second is better")
    return 0 if value else 1


def by_scores(columns: Sequence[str], scores: Sequence[Any]) -> int:
    """Return the index of the higher score. Raises `Tie` if the scores are equal, `BadRow` if one is not a number."""
    first, second = (_number(column, score) for column, score in zip(columns, scores, strict=True))
    if first == second:
        raise Tie(columns[0], f"and `{columns[1]}` are equal")
    return int(second > first)


def by_flags(columns: Sequence[str], flags: Sequence[Any]) -> int:
    """Return the index of the response whose flag is set. There are two flags, and an optional third flag for a tie.

    Raises:
        Tie: If the third flag is set.
        BadRow: If not exactly one flag is set.
    """
    values = [_number(column, flag) for column, flag in zip(columns, flags, strict=True)]
    if sorted(values) != [0.0] * (len(values) - 1) + [1.0]:
        raise BadRow(columns[0], f"and the other flags are {list(flags)}", "set exactly one of them")
    if values.index(1.0) == 2:
        raise Tie(columns[2], "is set")
    return values.index(1.0)


def _number(column: str, value: Any) -> float:
    number = float(value) if isinstance(value, bool) else as_number(value)
    if not math.isfinite(number):
        raise BadRow(column, "is missing" if value is None else f"is {value!r}, not a number", "make it a number")
    return number


NAMING = (
    *("better_response_id", "better_response", "better", "best_response", "best", "preferred_response", "preferred"),
    *("human_preference", "orig_preference", "preference", "choice", "chosen", "selected", "verdict"),
)
# Columns that say which of two responses is better, mapped to the function that reads the column. In some datasets,
# columns in `NAMING` mean something else. Therefore, `by_name` rejects values that name neither response.
VERDICTS: Mapping[str, Callable[..., int]] = {
    "winner": by_name,
    "overall_preference": by_sign,
    "preference_strength": by_sign,
    **dict.fromkeys(NAMING, by_name),
}
