"""Functions that convert the rows of a column layout to rows of a format, used in `layout_table.LAYOUTS`.

Each function gets the values of a row, keyed by role (`Given`). A role is the meaning of a column, such as "prompt" or
"chosen" (see `roles.py`). The function returns a row with the columns of a format, which formats.py then converts to a
`CanonicalRow`. Most functions only move values. They convert texts to messages only where turns must be joined, for
example to add a system prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_prefopt.data.contents import read_content
from hf_prefopt.data.context import is_about_the_row
from hf_prefopt.data.conversations import text_as_messages
from hf_prefopt.data.messages import CONTENT_KEYS, ROLE_KEYS, check_messages
from hf_prefopt.data.preferences import VERDICTS, by_flags, by_name, by_scores, by_votes, first_if_true
from hf_prefopt.data.roles import ITEM_RANKS, ITEM_SCORES, ITEM_TEXTS, SUFFIXES, read_texts
from hf_prefopt.data.rows import BadRow, as_number, check_list
from hf_prefopt.data.transcripts import is_transcript

Row = dict[str, Any]


class Given(dict[str, Any]):
    """The values of a row, keyed by role.

    Attributes:
        columns: The column of each role, for errors.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]):
        super().__init__({part: row.get(column) for part, column in columns.items()})
        self.columns = columns


def plain(given: Given) -> Row:
    """Keep all values under the names of their roles, and join all values that belong to the prompt into the prompt."""
    around = ("system", "history", "instruction", "input", "prefix")
    return {part: value for part, value in given.items() if part not in around} | _prompt(given)


def talks(given: Given) -> Row:
    """Return a row of whole conversations. If the row has a separate system prompt, each of them begins with it."""
    row = {part: value for part, value in given.items() if part != "system"}
    for part in ("chosen", "rejected", "reference", "completion"):
        if part in row:
            row[part] = _told(given, part, row[part])
    return row


def _told(given: Given, part: str, value: Any) -> Any:
    """If the row has a separate system prompt, return the conversation in `value` as messages that begin with it."""
    if not given.get("system"):
        return value
    content = read_content(part, value)
    # A text that is not a transcript may be only an answer, whose question is in another column. It stays unchanged.
    return value if isinstance(content, str) and not is_transcript(content) else _surrounded(content, given["system"])


def better_of_two(given: Given) -> Row:
    """Return a pair from two responses and a verdict, which says which of the two is better."""
    better = _place_of_text(given["verdict"], (given["first"], given["second"]))
    if better is None:
        verdict = given.columns["verdict"]
        better = VERDICTS.get(verdict, by_name)(verdict, given["verdict"], *_names(given))
    return _ordered(given, better)


def _names(given: Given) -> tuple[tuple[str, str], tuple[str, str], tuple[Any, Any]]:
    """Return the names by which a verdict may call the two responses.

    These are the names of their columns, the suffixes of these names, and the models that wrote the responses (None if
    unknown).
    """
    names = (given.columns["first"], given.columns["second"])
    first, second = SUFFIXES[names]
    return names, (first, second), (given.get("first_model"), given.get("second_model"))


def voted_two(given: Given) -> Row:
    """Return a pair from two responses and a list of votes for the better one.

    In Argilla's format, each vote has a status, and only votes with the status "submitted" count.
    """
    column, votes = given.columns["votes"], read_texts(given["votes"])
    statuses = given.get("statuses") or ["submitted"] * len(votes or ())
    if votes is not None and len(votes) != len(statuses):
        raise BadRow("votes", f"has {len(votes)} verdicts, but there are {len(statuses)} statuses")
    cast = [vote for vote, status in zip(votes or (), statuses, strict=True) if status == "submitted"]
    return _ordered(given, by_votes(column, cast, lambda vote: by_name(column, vote, *_names(given))))


def _place_of_text(verdict: Any, responses: tuple[Any, Any]) -> int | None:
    """Return the index of the response whose whole text the verdict repeats.

    Return None if it repeats neither, if both responses are equal, or if the verdict is a single word.
    """
    if not isinstance(verdict, str) or not all(isinstance(response, str) for response in responses):
        return None
    texts = [response.strip() for response in responses]
    is_told = len(verdict.split()) > 1 and texts[0] != texts[1] and verdict.strip() in texts
    return texts.index(verdict.strip()) if is_told else None


def flagged_first(given: Given) -> Row:
    """Return a pair from two responses and a flag, which is 1 if the first is better and 0 if the second is better."""
    return _ordered(given, first_if_true(given.columns["verdict"], given["verdict"]))


def scored_two(given: Given) -> Row:
    """Return a pair from two responses with one score each. The response with the higher score is the chosen one."""
    parts = ("first_score", "second_score")
    return _ordered(given, by_scores([given.columns[part] for part in parts], [given[part] for part in parts]))


def flagged_two(given: Given) -> Row:
    """Return a pair from two responses with one flag each, which says that this response is better.

    There may also be a flag for a tie.
    """
    parts = [part for part in ("first_wins", "second_wins", "tie") if part in given]
    return _ordered(given, by_flags([given.columns[part] for part in parts], [given[part] for part in parts]))


def items(given: Given) -> Row:
    """Return a list of responses from a list of structs, each with the text of a response and its score or rank."""
    structs = given["items"]
    if isinstance(structs, Mapping):  # `datasets` turns a `Sequence` of structs into a struct of lists
        structs = [dict(zip(structs, values, strict=True)) for values in zip(*structs.values(), strict=True)]
    if not isinstance(structs, list | tuple) or not all(isinstance(item, Mapping) for item in structs):
        raise BadRow("items", "is not a list of structs")
    keys = {"responses": ITEM_TEXTS, "scores": ITEM_SCORES, "ranks": ITEM_RANKS}
    found = {
        part: [key for key in names if any(item.get(key) is not None for item in structs)]
        for part, names in keys.items()
    }
    for part, names in found.items():
        if part != "ranks":
            _reject_other_items(part, names, structs)
    return _prompt(given) | {part: [item.get(names[0]) for item in structs] for part, names in found.items() if names}


def _reject_other_items(part: str, keys: Sequence[str], structs: Sequence[Mapping[str, Any]]) -> None:
    """Raise `BadRow` if structs hold several texts that differ, or several scores that order the responses differently.

    If there is an overall score, no error is raised, because it takes precedence over the other scores.

    Args:
        part: What the keys hold: "responses" or "scores".
        keys: The keys of the structs that hold it, preferred keys first.
        structs: The structs, one for each response.
    """
    for key in keys[1:]:
        first, other = ([item.get(name) for item in structs] for name in (keys[0], key))
        is_same = first == other if part == "responses" else _order(first) == _order(other)
        if not is_same and keys[0] != "overall_score":
            problem = (
                f"have {keys[0]!r} and {key!r}, and either may be {'the text' if part == 'responses' else 'the score'}"
            )
            raise BadRow("items", problem, "keep one of them: dataset.map")


def _order(numbers: Sequence[Any]) -> list[list[bool]]:
    """Return a matrix. Entry (i, j) is True if number i is larger than number j, and False if one of them is None."""
    return [[None not in (left, right) and left > right for right in numbers] for left in numbers]


def flagged_list(given: Given) -> Row:
    """Return a list of responses from responses with flags. A response has score 1 if its flag is true, otherwise 0."""
    flags = check_list("flags", given["flags"], "booleans")
    if not all(isinstance(flag, bool) for flag in flags):
        raise BadRow("flags", f"is {flags}", "make each true (right) or false")
    return {**_prompt(given), "responses": given["responses"], "scores": [float(flag) for flag in flags]}


def one_of_each(given: Given) -> Row:
    """Return a pair from a list with one chosen response and a list with one rejected response."""
    for side in ("chosen", "rejected"):
        count = len(check_list(side, given[side], "one response"))
        if count != 1:
            raise BadRow(side, f"holds {count} responses, but a loss of pairs compares two", "use a loss of lists")
    return {**_prompt(given), "chosen": given["chosen"][0], "rejected": given["rejected"][0]}


def good_and_bad(given: Given) -> Row:
    """Return a list of responses: all chosen ones, with rank 1, and all rejected ones, with rank 2.

    Each side of the row may be one response or a list of responses.
    """
    sides = (given[side] for side in ("chosen", "rejected"))
    chosen, rejected = ([side] if isinstance(side, str) else list(side or ()) for side in sides)
    if not chosen or not rejected:
        raise BadRow("rejected" if chosen else "chosen", "is empty")
    if given.get("prompt") in chosen:
        raise BadRow("chosen", "contains the prompt: these are turns, not responses", "use messages")
    ranks = [1.0] * len(chosen) + [2.0] * len(rejected)
    return {**_prompt(given), "responses": [*chosen, *rejected], "ranks": ranks}


def turns(given: Given) -> Row:
    """Return a pair from two conversations, which are stored as lists of turns, and a verdict on them."""
    return better_of_two(_talks(given))


def turns_flagged(given: Given) -> Row:
    """Return a pair from two conversations, which are stored as lists of turns, and one flag for each."""
    return flagged_two(_talks(given))


def _talks(given: Given) -> Given:
    """Replace lists of turns by two conversations, and remove the prompt.

    The prompt is the list of the user's turns, which both conversations share. Each response is the list of the
    assistant's turns in one conversation.
    """
    lists = {part: read_texts(given[part]) for part in ("prompt", "first", "second")}
    for part, texts in lists.items():
        if texts is None or None in texts:
            raise BadRow(part, "is not a list of texts" if texts is None else "has a turn without text")
    if len({len(texts or ()) for texts in lists.values()}) > 1:
        raise BadRow("prompt", "and the responses have different numbers of turns")
    talks = Given({}, given.columns)
    talks.update({part: value for part, value in given.items() if part != "prompt"})
    for part in ("first", "second"):
        talks[part] = _in_turn(zip(lists["prompt"] or (), lists[part] or (), strict=True))
    return talks


def _ordered(given: Given, better: int) -> Row:
    sides = [_up_to(given.get("turn"), part, given[part]) for part in ("first", "second")]
    prompt = _prompt(given)
    if prompt.get("prompt") is None:  # the two responses are whole conversations
        sides = [_told(given, part, side) for part, side in zip(("first", "second"), sides, strict=True)]
    scores = [as_number(given.get(part)) for part in ("first_score", "second_score")]
    return {
        **prompt,
        "chosen": sides[better],
        "rejected": sides[1 - better],
        "against": scores[better] < scores[1 - better],
    }


def _up_to(turn: int | None, part: str, value: Any) -> Any:
    """Remove from a conversation all messages after the answer that was judged.

    Args:
        turn: Number of the user's message whose answer was judged, counted from 1. If None, the conversation is
            returned unchanged.
        part: The role of the conversation, for errors.
        value: The conversation. A text is returned unchanged.
    """
    content = None if turn is None else read_content(part, value)
    if turn is None or not isinstance(content, list):
        return value
    messages = check_messages(part, content)
    asked = [at for at, message in enumerate(messages) if message["role"] == "user"]
    if not 1 <= turn <= len(asked):
        raise BadRow(
            "turn",
            f"is {turn}, but the conversation has {len(asked)} user messages",
            "remove the column: remove_columns",
        )
    return messages[: asked[turn]] if turn < len(asked) else messages


# Keys that may hold the text of a question in a struct.
_QUESTION_KEYS = ("full_text", "text", "question", "prompt")


def _prompt(given: Given) -> Row:
    """Return a row with the column `prompt`, or an empty row if there is no prompt.

    The prompt is the question. An instruction and its input are joined by a line break. If the row has a system prompt,
    earlier turns or the start of an answer, the prompt becomes messages that also contain these.
    """
    if "instruction" in given:
        instruction, more = given["instruction"], given["input"]
        question = f"{instruction}\n{more}" if instruction and more and more.strip() else instruction or more
    elif "prompt" in given:
        question = given["prompt"]
    else:
        return {}
    if isinstance(question, Mapping):
        _reject_other_keys(question)
    if isinstance(question, Mapping) and "messages" in question:  # a struct in OpenAI's format
        return {"prompt": question["messages"], **({"tools": question["tools"]} if question.get("tools") else {})}
    if isinstance(question, Mapping):
        question = next((question[key] for key in _QUESTION_KEYS if isinstance(question.get(key), str)), question)
    around = {part: given[part] for part in ("system", "history", "prefix") if given.get(part)}
    if not around or question is None:
        return {"prompt": question}
    return {"prompt": _surrounded(question, **around)}


def _reject_other_keys(question: Mapping[str, Any]) -> None:
    """Raise `BadRow` if a struct holds more than its question, unless the other keys only describe the row (ids, …)."""
    known = (*_QUESTION_KEYS, *ROLE_KEYS, *CONTENT_KEYS, "messages", "tools", "parallel_tool_calls")
    others = [key for key, value in question.items() if value and key not in known and not is_about_the_row(key)]
    if others:
        raise BadRow(
            "prompt", f"has {', '.join(map(repr, others))} in addition to its text", "make it messages: dataset.map"
        )


def _surrounded(question: Any, system: str = "", history: Any = (), prefix: str = "") -> list[dict[str, Any]]:
    content = read_content("prompt", question)
    messages = text_as_messages(content) if isinstance(content, str) else check_messages("prompt", content)
    messages = [*_earlier(history), *messages]
    if system.strip() and messages[:1] and messages[0]["role"] == "system":
        if messages[0].get("content", "").strip() != system.strip():
            raise BadRow("system", "differs from the system prompt in the messages", "remove one of them")
    elif system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    return [*messages, {"role": "assistant", "content": prefix}] if prefix else messages


def _earlier(history: Any) -> list[dict[str, Any]]:
    """Return earlier turns as messages. They are given as messages, or as pairs of a question and its answer."""
    if all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        return _in_turn(history)
    return check_messages("history", history)


def _in_turn(exchanges: Iterable[Iterable[Any]]) -> list[dict[str, Any]]:
    """Convert pairs of a question and its answer to user and assistant messages."""
    speakers = ("user", "assistant")
    return [{"role": role, "content": text} for turn in exchanges for role, text in zip(speakers, turn, strict=True)]
