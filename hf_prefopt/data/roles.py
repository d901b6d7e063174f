"""The roles of columns, such as "prompt" or "chosen and rejected response", and the column names that identify them.

A role may consist of several parts (a chosen and a rejected response). Each entry of `Role.names` is therefore a tuple
of columns, one for each part. A dataset has the role if, for one of these entries, all columns exist and hold values
that the role accepts; the first such entry is used. `layout_table.py` defines the layouts by these roles.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hf_prefopt.data.contents import is_message
from hf_prefopt.data.preferences import NAMING
from hf_prefopt.data.rows import as_list, as_number

Names = tuple[str, ...]


def is_content(value: Any) -> bool:
    """Return True for a text, a dict such as a message, and a list, but False for a list of texts."""
    return isinstance(value, str | dict) or (isinstance(value, list | tuple) and not is_texts(value))


def is_texts(value: Any) -> bool:
    """Return True if the value is a list of texts."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


def _is_list(value: Any) -> bool:
    return isinstance(as_list(value), list | tuple)


def _is_text_or_number(value: Any) -> bool:
    return isinstance(value, str | int | float)


@dataclass(frozen=True)
class Role:
    """The meaning of one or several columns.

    Attributes:
        parts: Names of the parts. The functions in converters.py get the values under these names.
        names: Column names that identify the role, preferred names first. Each entry has one column for each part.
        accepts: Function that returns whether a value can have this role. It is called for a value of each column.
        others: For an entry of `names`, the columns that must not exist, such as the column of a third response.
        wanted: Description of the values that the role accepts, for errors.
    """

    parts: Names
    names: tuple[Names, ...]
    accepts: Callable[[Any], bool] = is_content
    others: Mapping[Names, Collection[str]] = field(default_factory=dict)
    wanted: str = "text or messages"

    def find(self, sample: Mapping[str, Any], mapped: Collection[str] = ()) -> dict[str, str] | None:
        """Return the column of each part; None if the dataset does not have this role.

        Args:
            sample: One example value per column.
            mapped: New names of columns in the user's column_mapping. Names of the role with such a column take
                precedence.
        """
        found = [names for names in self.names if self._fits(names, sample)]
        found.sort(key=lambda names: not set(names).intersection(mapped))
        return dict(zip(self.parts, found[0], strict=True)) if found else None

    def _fits(self, names: Names, sample: Mapping[str, Any]) -> bool:
        if not all(name in sample for name in names) or any(other in sample for other in self.others.get(names, ())):
            return False
        return all(sample[name] is None or self.accepts(sample[name]) for name in names)


def _words(text: str) -> Names:
    return tuple(text.split())


def role(part: str, *names: str, accepts: Callable[[Any], bool] = is_content, wanted: str = "text or messages") -> Role:
    """Return a role with one part, which is in the first of the columns `names` that exists."""
    return Role((part,), tuple((name,) for name in names), accepts, wanted=wanted)


def _spellings(words: Iterable[Names], nouns: Sequence[str]) -> tuple[Names, ...]:
    """Return the column names that can be built from each pair of words: alone, before a noun, and after a noun.

    For the word "chosen" and the noun "response", these are `chosen`, `chosen_response` and `response_chosen`.
    """
    joined = [
        [pair, *[tuple(f"{word}_{noun}" for word in pair) for noun in nouns]]
        + [tuple(f"{noun}_{word}" for word in pair) for noun in nouns]
        for pair in words
    ]
    return tuple(names for group in joined for names in group)


_NOUNS = _words(
    "response responses output answer completion reply text summary solution generation "
    "message messages conversation conversations"
)
_PLACES = (
    ("chosen", "rejected"),
    ("preferred", "non_preferred"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("winning", "losing"),
    ("chosen", "reject"),
    ("selected", "rejected"),
    ("accept", "reject"),
    ("preferred", "unpreferred"),
    ("good", "bad"),
    ("correct", "incorrect"),
    ("win", "lose"),
)
_OTHER_PLACES = (("response_j", "response_k"), ("response_w", "response_l"), ("y_w", "y_l"))
BY_PLACE = Role(
    ("chosen", "rejected"),
    (*_spellings(_PLACES, _NOUNS), *_OTHER_PLACES, ("winner_response", "loser_response")),
)
GOLD = role("reference", "reference")

# Stems of the column names of two responses, if another column says which one is better. A column name is a stem with a
# mark, such as `response_a` and `response_b`. Rows with the column of a third response (`response_c`) are not pairs.
_STEMS = (
    *_NOUNS,
    *_words("model_response assistant_response orig_response candidate human_ref model_output generated_text"),
)
# The marks of two responses (letters, numbers or words), mapped to those of a third response.
_SUFFIXES: dict[Names, str] = {("0", "1"): "2", ("1", "2"): "0 3", ("a", "b"): "c", ("A", "B"): "C"}
_WORDS: dict[Names, str] = {("left", "right"): "middle", ("first", "second"): "third"}
_MARKED = {
    "{stem}_{mark}": _SUFFIXES | _WORDS,
    "{stem}{mark}": _SUFFIXES,
    "{stem}-{mark}": _SUFFIXES,
    "{mark}_{stem}": _WORDS,
}
_PATTERNS = [(pattern.replace("{stem}", stem), marks) for stem in _STEMS for pattern, marks in _MARKED.items()]
_PATTERNS += [("{mark}", {("left", "right"): "middle"})]
SUFFIXES: dict[Names, Names] = {
    tuple(pattern.format(mark=mark) for mark in suffixes): suffixes
    for pattern, marks in _PATTERNS
    for suffixes in marks
}
_THREE: dict[Names, list[str]] = {
    tuple(pattern.format(mark=mark) for mark in suffixes): [pattern.format(mark=mark) for mark in thirds.split()]
    for pattern, marks in _PATTERNS
    for suffixes, thirds in marks.items()
}
# Maps the columns of two responses to the column of a third response.
THIRD: dict[Names, str] = {two: third for two, thirds in _THREE.items() for third in thirds}


def _two(accepts: Callable[[Any], bool] = is_content, parts: Names = (), beside: Sequence[Names] = ((),)) -> Role:
    """Return the role that is filled by the columns of two responses, such as `response_a` and `response_b`.

    Args:
        accepts: Function that returns whether a value can be a response.
        parts: Names of further values that the role needs, such as the two scores.
        beside: Names of the further columns, in which `{0}` and `{1}` stand for the suffixes of the two responses, such
            as `score_{0}`. Each entry of this sequence is an alternative.
    """
    names = {
        (*two, *[column.format(*suffixes) for column in columns]): _THREE[two]
        for two, suffixes in SUFFIXES.items()
        for columns in beside
    }
    return Role(("first", "second", *parts), tuple(names), accepts, names)


def _is_content_or_number(value: Any) -> bool:
    return is_content(value) or isinstance(value, int | float | Decimal)


def read_texts(value: Any) -> list[str | None] | None:
    """Return a list of texts, which may be stored as JSON; None for any other value."""
    value = as_list(value)
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return list(value) if is_list and all(isinstance(item, str | None) for item in value) else None


def _is_turns(value: Any) -> bool:
    return read_texts(value) is not None


_WINS = (("winner_model_{0}", "winner_model_{1}", "winner_tie"), ("winner_model_{0}", "winner_model_{1}"))
TWO = _two()
SCORED = _two(
    _is_content_or_number,
    ("first_score", "second_score"),
    [(f"{noun}_{{0}}", f"{noun}_{{1}}") for noun in ("score", "rating", "reward", "rm_score", "votes", "num_votes")],
)
FLAGGED = Role(
    ("first", "second", "first_wins", "second_wins", "tie"),
    _two(parts=("first_wins", "second_wins", "tie"), beside=_WINS[:1]).names,
    _is_content_or_number,
)
_SHP = ("human_ref_A", "human_ref_B", "labels")
FIRST_FLAGGED = Role(("first", "second", "verdict"), (_SHP,), _is_content_or_number)
FIRST_FLAGGED_SCORED = Role(
    (*FIRST_FLAGGED.parts, "first_score", "second_score"), ((*_SHP, "score_A", "score_B"),), _is_content_or_number
)
# Votes of several people. In Argilla's format (`SUBMITTED_VOTES`), a second column has the status of each vote.
VOTES = role(
    "votes",
    *("votes", "preferences", *[f"{name}.responses" for name in NAMING]),
    accepts=is_texts,
    wanted="a list with the name of the better response, such as 'a', for each vote",
)
SUBMITTED_VOTES = Role(
    ("votes", "statuses"),
    tuple((f"{name}.responses", f"{name}.responses.status") for name in NAMING),
    is_texts,
)
MODELS = Role(
    ("first_model", "second_model"),
    tuple(tuple(f"model_{suffix}" for suffix in suffixes) for suffixes in (*_SUFFIXES, *_WORDS)),
    lambda value: isinstance(value, str),
)
# The number of the turn that was judged; later turns are removed from the conversation.
JUDGED_TURN = role("turn", "turn", accepts=lambda value: isinstance(value, int) and not isinstance(value, bool))
# Conversations stored as separate lists of texts: the user's turns (`TURNS`), and the turns of each of two assistants.
TURNS = role("prompt", "prompt", "question", accepts=_is_turns)
TURNS_OF_TWO = _two(_is_turns)
TURNS_FLAGGED = Role(FLAGGED.parts, FLAGGED.names, lambda value: _is_turns(value) or isinstance(value, int))


def _is_question(value: Any) -> bool:
    """Return True if the value may be a question: text, a struct of text, or messages."""
    return isinstance(value, str | dict) or (_is_list(value) and all(map(is_message, value)))


QUESTION = role(
    "prompt",
    *_words("prompt orig_instruction question instruction query user_query user_prompt user problem input"),
    *_words("messages context_messages prompt_messages conversations conversation dialogue trajectory contents"),
    *_words("history context"),
    accepts=_is_question,
)
ALPACA = Role(
    ("instruction", "input"),
    (("instruction", "input"),),
    lambda value: isinstance(value, str),
    {("instruction", "input"): ["prompt", "orig_instruction"]},
)
SYSTEM = role("system", "system", "system_prompt", "system_message", "sys_prompt", accepts=lambda v: isinstance(v, str))
HISTORY = role("history", "history", accepts=_is_list)
PREFIX = role("prefix", "initial_reason_steps", accepts=lambda value: isinstance(value, str))
# Columns that may exist in addition to a question: a system prompt, earlier turns, and the beginning of the response.
# If one of them is present and not empty, a prompt and responses given as text are converted to messages.
AROUND = tuple(name for names in (SYSTEM, HISTORY, PREFIX) for (name,) in names.names)

COMPLETION = role("completion", "completion")
ANSWER = role("completion", *_words("completion response output generation solution answer reply"))
LABEL = role("label", "label", accepts=_is_text_or_number, wanted="true or false")
TAG = role("label", "desirable", "is_desirable", "kto_tag", accepts=_is_text_or_number, wanted="true or false")
# Boolean columns in which True means desirable. Numbers and texts are not accepted: their meaning is unknown.
FLAG = role(
    "label",
    *_words("label is_correct correct passed thumbs_up thumbs liked is_liked is_good is_preferred is_chosen accepted"),
    accepts=lambda value: isinstance(value, bool),
    wanted="true or false; if 1 means that the response is desirable, column_mapping={'desirable': '…'}",
)
QUANTILE = role(
    "quantile",
    "quantile",
    "quantile_reward",
    accepts=lambda value: math.isfinite(as_number(value)),
    wanted="a number from 0 to 1",
)
CONVERSATION = role("completion", "messages", "conversations", "conversation", accepts=_is_list)
# A conversation that ends with the chosen answer; another column has the rejected answer or conversation.
WHOLE = role("chosen", "messages", "conversations", accepts=_is_list)
REJECTED = role("rejected", "rejected_response", "rejected_messages")

LISTED = ["responses", "generations", "completions", "answers", "candidates", "outputs"]
# Columns that may contain the index of the best response of a list.
PLACES_IN_LISTS = _words("chosen choice best preference chosen_index chosen_idx best_index best_idx")
ITEM_TEXTS = ("response", "answer", "completion", "text", "output", "generation", "content", "message", "messages")
ITEM_SCORES = ("overall_score", "score", "rating", "reward", "rm_score", "pm_score")
ITEM_RANKS = ("rank",)


def _items_with(numbers: Names) -> Callable[[Any], bool]:
    """Return a function that checks for a list of structs, or a struct of lists, with a text and one of these keys."""

    def accepts(value: Any) -> bool:
        first = value if isinstance(value, dict) else value[0] if _is_list(value) and value else None
        return isinstance(first, dict) and all(any(key in first for key in keys) for keys in (ITEM_TEXTS, numbers))

    return accepts


RESPONSES = role("responses", *LISTED, accepts=_is_list, wanted="a list of responses")
_SCORES = _words("scores rm_scores rewards ratings rating score")
SCORES = role("scores", *_SCORES, accepts=_is_list, wanted="a list of numbers, one for each response")
RANKS = role("ranks", "ranks", "rank", accepts=_is_list, wanted=SCORES.wanted)
SCORED_ITEMS = role("items", *LISTED, accepts=_items_with(ITEM_SCORES))
RANKED_ITEMS = role("items", *LISTED, accepts=_items_with(ITEM_RANKS))
GOOD_AND_BAD = Role(("chosen", "rejected"), BY_PLACE.names, is_texts)
ONE_OF_EACH = Role(("chosen", "rejected"), BY_PLACE.names, lambda value: is_texts(value) and len(value) == 1)
# One better and several worse responses, or several better and one worse.
_GOOD, _BAD = ((side, *dict.fromkeys(names[at] for names in BY_PLACE.names)) for at, side in enumerate(BY_PLACE.parts))
ONE_GOOD, ONE_BAD = (role(*names, accepts=lambda value: isinstance(value, str)) for names in (_GOOD, _BAD))
SEVERAL_GOOD, SEVERAL_BAD = (role(*names, accepts=is_texts) for names in (_GOOD, _BAD))
# A list of flags that say whether each response of a list is correct.
FLAGS_OF_LIST = role(
    "flags",
    *_words("correctness correctness_math_verify is_correct correct passed"),
    accepts=lambda value: _is_list(value) and bool(value) and all(isinstance(item, bool) for item in value),
)
