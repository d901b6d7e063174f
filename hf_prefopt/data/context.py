"""Reject rows with context that the model would never see: text in a column that is neither prompt nor response.

A row says its context in whichever column its author liked. A column that no format reads is harmless where it is
empty, where the model reads the same elsewhere, or where it is about the row (an id, a source, a model's name, a
judge's words) and not for the model. Its name tells where it can, by its last word of meaning: `question_id` is an id,
`labelling_prompt` was for a judge. A name that tells nothing leaves it to the text: labels are short, context is prose.

"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from hf_prefopt.data.messages import MEDIA_CURE, BadRow, find_media
from hf_prefopt.data.rows import UNSPACED, CanonicalRow

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words that say nothing of what a column holds; so do letters and numbers, as in `response_a` or `turn_2`.
_CARRIERS = _set("text content string str raw full value json list")
# For the model: whatever such a column says, it was meant to be read.
_CONTEXT = _set(
    "prompt preprompt prefix preamble system question instruction input query queries context ctx history histories "
    "problem message conversation dialogue dialog chat background passage article document premise persona scenario "
    "choices options tool function step shot demonstration table fact concept schema code hint src"
)
# What was answered and what was thought of it: all that such a column holds.
_ANSWERS = _set(
    "chosen rejected response answer completion output reply replies solution ref reference gold golden target truth "
    "label feedback critique rationale comment explanation justification reason reasoning thinking thought analysis "
    "judgement judgment verdict correction winner loser best worst better summary summaries translation"
)
# How the rows were made and judged: in whichever place of the name.
_MAKING = _set(
    "generation generated generator labeling labelling labeler labeller annotation annotator judge judging grader "
    "grading rater rating reward rm verifier evaluation evaluator critic preference meta metadata distilabel license "
    "citation criteria criterion rubric principle constitution aspect"
)
# Names of things, at times long ones.
_LABELS = _set(
    "id uuid hash source dataset subset split origin model engine name type kind category categories subject topic "
    "domain skill ability intent style tag attribute language lang locale country author agent worker url uri link "
    "path file version date time timestamp status difficulty level group key"
)
_NEVER, _IN_LABELS, _IN_UNKNOWN, _AT_ALL = math.inf, 15, 4, 0
# The words of the shortest sentence that counts as one, by bar.
_SENTENCE: dict[float, float] = {_IN_UNKNOWN: 2, _IN_LABELS: 3}
_SPEAKERS = frozenset(("role", "from", "type"))
_REPLIERS = frozenset(("assistant", "gpt", "model", "bot", "chatgpt", "ai"))
_NOTHING = frozenset(("", "none", "null", "nan", "n/a", "na", "yes", "no", "true", "false"))
# A flag or a count, whatever it is of: `is_question`, `n_shot`.
_FLAGS = frozenset(("is", "has", "was", "num", "n"))
_UNSPACED = re.compile(f"[{UNSPACED}]{{2}}")
_SENTENCE_ENDS = tuple(".?!…。？！।؟")


def refuse_unused(row: Mapping[str, Any], used: Collection[str], read: CanonicalRow) -> None:
    """Raise `BadRow` where a column that is not used says or shows what the model should see and would not.

    Args:
        row: the raw row.
        used: the columns of its format.
        read: what was read of it. Of tokens, which are taken as they are, nobody knows what they say.
    """
    beside = ("tools", "chat_template_kwargs") if read.kind == "messages" else ()
    unused = {column: value for column, value in row.items() if column not in used and column not in beside}
    media = find_media(unused)
    if media is not None:
        raise BadRow(media, "holds something that is not text", MEDIA_CURE.format(f"it (remove_columns({media!r}))"))
    if read.kind == "tokens":
        return
    texts = {column: _context_of(value, _bar(column)) for column, value in unused.items()}
    sequences = _sequences(read) if any(texts.values()) else []
    unsaid = {
        column: text
        for column, found in texts.items()
        for text, bar in reversed(found)
        if not _is_said(text, bar, sequences)
    }
    if unsaid:
        first, *others = unsaid
        shown = unsaid[first] if len(unsaid[first]) <= 40 else unsaid[first][:40] + "…"
        also = f" (nor what {', '.join(f'`{column}`' for column in others)} says)" if others else ""
        problem = (
            f"says {shown!r}, which is not in the prompt (nor in every response), so the model would not read it{also}"
        )
        cure = f"join it into `prompt` (or rename the column so); if it is no context: remove_columns({[*unsaid]})"
        raise BadRow(first, problem, cure)


def _sequences(read: CanonicalRow) -> list[str]:
    """What the model reads: the texts of the prompt and of each response, in one line."""
    whole = [_texts((read.prompt, response), _AT_ALL, lambda _: _AT_ALL) for response in read.responses]
    return [_line(" ".join(text for text, _ in texts)) for texts in whole]


def _is_said(text: str, bar: float, sequences: list[str]) -> bool:
    """Whether the model reads a text: context with every response, of other names it may be a copy of one."""
    return (all if bar == _AT_ALL else any)(_line(text) in sequence for sequence in sequences)


def _line(text: str) -> str:
    return " ".join(text.split())


def _context_of(value: Any, bar: float) -> list[tuple[str, float]]:
    """The texts in a column's value that are context, each with its bar (see `_bar`)."""
    if bar == _NEVER:
        return []
    return [found for found in _texts(_without_last_reply(value), bar, _bar) if _is_context(*found)]


def _is_context(text: str, bar: float) -> bool:
    if text.strip(" \n[]{}\"'").lower() in _NOTHING:
        return False
    words = sum(any(map(str.isalpha, word)) for word in text.split()) + len(_UNSPACED.findall(text))
    least = _SENTENCE.get(bar, _NEVER)
    is_sentence = words >= least and "://" not in text and text.rstrip().endswith(_SENTENCE_ENDS)
    return (bar == _AT_ALL and not text.strip().isdecimal()) or words > bar or is_sentence


def _without_last_reply(value: Any) -> Any:
    """A conversation without the answer that ends it, which may be another one than the chosen or the rejected."""
    while isinstance(value, list | tuple) and value and isinstance(value[-1], dict):
        if (value[-1].get("role") or value[-1].get("from")) not in _REPLIERS:
            break
        value = value[:-1]
    return value


def _texts(value: Any, bar: float, bar_of: Callable[[str], float]) -> Iterator[tuple[str, float]]:
    """The texts in a value, at any depth, each with the bar of the key that holds it."""
    if isinstance(value, str):
        yield value, bar
    elif isinstance(value, dict):
        for key, item in value.items():
            own = bar_of(key)
            if key not in _SPEAKERS and own != _NEVER:
                yield from _texts(item, bar if own == _IN_UNKNOWN else own, bar_of)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, bar, bar_of)


@lru_cache(maxsize=1024)
def _bar(name: str) -> float:
    """How many words a text of a column, or of a key in it, may have and still be no context."""
    words = [word.lower() for word in _WORD.findall(name)]
    if words and words[0] in _FLAGS:
        return _NEVER
    words = [word for word in words if word not in _CARRIERS and (len(word) > 2 or word in ("id", "rm"))]
    stems = [{word, word.removesuffix("s")} for word in words]
    if any(stem & _MAKING for stem in stems):
        return _NEVER
    head = stems[-1] if stems else set()
    if head & _CONTEXT:
        return _AT_ALL
    if head & _LABELS:
        return _IN_LABELS
    return _NEVER if any(stem & _ANSWERS for stem in stems) else _IN_UNKNOWN
