"""Reject rows with unread context: text that belongs to the prompt or the response, in a column that is not used.

The model would never see this text. Columns with context may have any name. An unread column is harmless if it is
empty, if the model reads the same text in another column, or if it only describes the row (an id, a source, a model's
name, a judge's comment).

Whether a column holds context is decided by its name first. Usually, the last meaningful word of the name counts:
`question_id` is an id. Words about generating and judging count at any position: `labelling_prompt` is a judge's
prompt. If the name is unknown, the length of the text decides, because labels are short and context is prose.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from hf_prefopt.data.messages import MEDIA_CURE, find_media
from hf_prefopt.data.rows import UNSPACED, BadRow, CanonicalRow

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words in column names that do not say what the column holds. They are ignored, like the letters and numbers in
# `response_a` or `turn_2`.
_CARRIERS = _set("text content string str raw full value json list")
# Columns whose names end with one of these words contain context, even if the text is short.
_CONTEXT = _set(
    "prompt preprompt prefix preamble system question instruction input query queries context ctx history histories "
    "problem message conversation dialogue dialog chat background passage article document premise persona scenario "
    "choices options tool function step shot demonstration table fact concept schema code hint src"
)
# Words for answers, and for comments on answers.
_ANSWERS = _set(
    "chosen rejected response answer completion output reply replies solution ref reference gold golden target truth "
    "label feedback critique rationale comment explanation justification reason reasoning thinking thought analysis "
    "judgement judgment verdict correction winner loser best worst better summary summaries translation"
)
# Words for a part of an answer. They count if the name also says which answer it belongs to, with a word in `_SIDES`:
# `chosen_reasoning`, `rejected_tool_calls`.
_PARTS = _set("reasoning thinking think thought cot scratchpad trace call")
_SIDES = _set(
    "chosen rejected preferred dispreferred accepted selected better worse winning losing response completion"
)
# Words about how the rows were generated and judged. They count at any position in the name.
_MAKING = _set(
    "generation generated generator labelling labeling labeler labeller annotation annotator judge judging grader "
    "grading rater rating reward rm verifier evaluation evaluator critic preference meta metadata distilabel license "
    "citation criteria criterion rubric principle constitution aspect"
)
# Words for labels: ids, and names of things. Such texts may have several words.
_LABELS = _set(
    "id uuid hash source dataset subset split origin model engine name type kind category categories subject topic "
    "domain skill ability intent style tag attribute language lang locale country author agent worker url uri link "
    "path file version date time timestamp status difficulty level group key"
)
# Limits for the number of words in a text: a text with more words than the limit of its column is context. Columns
# whose names say that they are never context have the first limit. Columns of labels (`_LABELS`) have the second limit,
# columns with unknown names the third, and columns of context (`_CONTEXT`) the last.
_NEVER, _IN_LABELS, _IN_UNKNOWN, _ANY_TEXT = math.inf, 15, 4, 0
# Limit for columns with a part of an answer. It is below 1, so a text of any length is context, and the model must read
# it with at least one response.
_OF_ANSWER = 0.5
# With two of the limits above, a text within the limit is also context if it is a sentence of at least this many words.
# A sentence ends with a sign in `_SENTENCE_ENDS`.
_SENTENCE: dict[float, float] = {_IN_UNKNOWN: 2, _IN_LABELS: 3}
_SPEAKERS = frozenset(("role", "from", "type"))
_ASSISTANTS = frozenset(("assistant", "gpt", "model", "bot", "chatgpt", "ai"))
_NOTHING = frozenset(("", "none", "null", "nan", "n/a", "na", "yes", "no", "true", "false"))
# First words in the names of flags and counts, such as `is_question` and `n_shot`.
_FLAGS = frozenset(("is", "has", "was", "num", "n"))
_UNSPACED = re.compile(f"[{UNSPACED}]{{2}}")
_SENTENCE_ENDS = tuple(".?!…。？！।؟")


def reject_unread_context(unused: Mapping[str, Any], read: CanonicalRow) -> None:
    """Raise `BadRow` if an unused column contains context, or if it contains images, video or audio.

    Args:
        unused: The values of the raw row in columns that were not used, keyed by column.
        read: The canonical row. If it contains token ids, only images, video and audio raise an error, because texts
            cannot be compared with token ids.
    """
    if read.content_type == "messages":
        unused = {column: value for column, value in unused.items() if column not in ("tools", "chat_template_kwargs")}
    media = find_media(unused)
    if media is not None:
        raise BadRow(media, "contains data that is not text", MEDIA_CURE.format(f"it (remove_columns=[{media!r}])"))
    if read.content_type == "tokens":
        return
    contexts = {column: _contexts(value, _column_limit(column)) for column, value in unused.items()}
    sequences = _sequences(read) if any(contexts.values()) else []
    unread = {
        column: text
        for column, found in contexts.items()
        for text, limit in reversed(found)
        if not _is_read(text, limit, sequences)
    }
    if unread:
        first, *others = unread
        shown = unread[first] if len(unread[first]) <= 40 else unread[first][:40] + "…"
        also = f" (nor the text of {', '.join(f'`{column}`' for column in others)})" if others else ""
        problem = (
            f"contains {shown!r}, which is not in the prompt (nor in every response): the model would not read it{also}"
        )
        cure = f"join it into `prompt`, or name the column `prompt`; if it is not context: remove_columns={[*unread]}"
        if _column_limit(first) == _OF_ANSWER:
            cure = f"join it into the response; if it should not be trained on: remove_columns={[*unread]}"
        raise BadRow(first, problem, cure)


def _sequences(read: CanonicalRow) -> list[str]:
    """Return one text for each response: all that the model reads in the prompt and this response, in one line."""
    texts = [_texts((read.prompt, response), _ANY_TEXT, lambda _: _ANY_TEXT) for response in read.responses]
    return [_one_line(" ".join(text for text, _ in pair)) for pair in texts]


def _is_read(text: str, limit: float, sequences: list[str]) -> bool:
    """Return True if the model reads this text in `sequences`, the results of `_sequences`.

    Text with the limit `_ANY_TEXT` must be in every sequence, because it belongs to the prompt. Other text must be in
    at least one sequence.
    """
    return (all if limit == _ANY_TEXT else any)(_one_line(text) in sequence for sequence in sequences)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _contexts(value: Any, limit: float) -> list[tuple[str, float]]:
    """Return the texts in a column's value that are context. Each is returned with its limit (see `_word_limit`)."""
    if limit == _NEVER:
        return []
    return [found for found in _texts(_without_last_reply(value), limit, _word_limit) if _is_context(*found)]


def _is_context(text: str, limit: float) -> bool:
    if text.strip(" \n[]{}\"'").lower() in _NOTHING:
        return False
    words = sum(any(map(str.isalpha, word)) for word in text.split()) + len(_UNSPACED.findall(text))
    is_long = words >= _SENTENCE.get(limit, _NEVER)
    is_sentence = is_long and "://" not in text and text.rstrip().endswith(_SENTENCE_ENDS)
    return (limit == _ANY_TEXT and not text.strip().isdecimal()) or words > limit or is_sentence


def _without_last_reply(value: Any) -> Any:
    """Return a conversation without the assistant messages at its end. Return any other value unchanged.

    These messages are an answer to the prompt. They are not context, even if they are neither of the two responses.
    """
    while isinstance(value, list | tuple) and value and isinstance(value[-1], dict):
        if (value[-1].get("role") or value[-1].get("from")) not in _ASSISTANTS:
            break
        value = value[:-1]
    return value


def _speaks_as_assistant(value: Mapping[str, Any]) -> bool:
    return any(value.get(key) in _ASSISTANTS for key in ("role", "from"))


def _texts(value: Any, limit: float, limit_of: Callable[[str], float]) -> Iterator[tuple[str, float]]:
    """Yield all texts in a value, at any depth, each with its limit.

    Args:
        value: A text, or a dict or list that contains texts.
        limit: Limit of the column. It also applies to texts under keys with unknown names.
        limit_of: Function that returns the limit for a key.
    """
    if isinstance(value, str):
        yield value, limit
    elif isinstance(value, dict):
        # An assistant message in a column of context may be one of the responses, so one sequence with it is enough.
        limit = _OF_ANSWER if limit == _ANY_TEXT and _speaks_as_assistant(value) else limit
        for key, item in value.items():
            of_key = limit_of(key)
            if key not in _SPEAKERS and of_key != _NEVER:
                yield from _texts(item, limit if of_key == _IN_UNKNOWN else of_key, limit_of)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, limit, limit_of)


# Words for numbers: scores, counts and positions.
_MEASURES = _set("score scores count length len tokens rank index idx row turn turns number logp logps logprob")


def is_about_the_row(name: str) -> bool:
    """Return True if a column with this name only describes the row: an id, a source, a model's name, a score, …"""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[0] in _FLAGS or set(words) & _MAKING or {word.removesuffix("s") for word in words} & _MAKING:
        return bool(words)
    last = [word for word in words if word not in _CARRIERS][-1:] or words[-1:]
    return bool({*last, last[0].removesuffix("s")} & (_LABELS | _MEASURES))


def _column_limit(column: str) -> float:
    """Return the limit for a column: the one for parts of an answer, if the name has only words for these and "tool".

    Otherwise, return `_word_limit` of the name.
    """
    words = [word.lower().removesuffix("s") for word in _WORD.findall(column)]
    words = [word for word in words if word not in _CARRIERS]
    return _OF_ANSWER if words and set(words) <= _PARTS | {"tool"} else _word_limit(column)


@lru_cache(maxsize=1024)
def _word_limit(name: str) -> float:
    """Return the word limit for texts in a column, or under a key, with this name. A longer text is context."""
    words = [word.lower() for word in _WORD.findall(name)]
    if words and words[0] in _FLAGS:
        return _NEVER
    words = [word for word in words if word not in _CARRIERS and (len(word) > 2 or word in ("id", "rm"))]
    stems = [{word, word.removesuffix("s")} for word in words]
    if any(stem & _MAKING for stem in stems):
        return _NEVER
    head = stems[-1] if stems else set()
    parts, sides = ([bool(stem & words) for stem in stems] for words in (_PARTS, _SIDES))
    if any(parts) and any(sides) and (parts[-1] or sides[-1]):
        return _OF_ANSWER
    if head & _CONTEXT:
        return _ANY_TEXT
    if head & _LABELS:
        return _IN_LABELS
    return _NEVER if any(stem & _ANSWERS for stem in stems) else _IN_UNKNOWN
