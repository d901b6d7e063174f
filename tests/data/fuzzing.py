"""Rows for fuzzing: valid rows with their meaning, mutations of them, and an
independent implementation of reading them.

`Meaning` is what the model should see. `expected_row` converts a `Meaning` to token ids, with a ChatML template that is
written by hand, and one plain call of the tokenizer for each sequence.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

KNOWN = [json.loads(line) for line in Path(__file__).with_name("layouts.jsonl").open(encoding="utf-8")]
Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Meaning:
    """The meaning of a row.

    Attributes:
        prompt: text or messages.
        responses: K texts or lists of messages; for a pair, the chosen response, then the rejected one.
        columns: the example columns of the prepared row.
    """

    prompt: str | list[Message]
    responses: list[Any]
    columns: dict[str, Any]


def chatml(messages: list[Message], opened: str = "") -> str:
    """Return the text of messages in ChatML, followed by the header of the next turn."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + (f"<|im_start|>{opened}\n" if opened else "")


def expected_row(meaning: Meaning, tokenizer) -> Row:
    """Return the prepared row without its number: each sequence is tokenized separately."""
    is_text = isinstance(meaning.prompt, str)
    prompt = meaning.prompt if is_text else chatml(meaning.prompt, "assistant")
    full, scored = [], []
    for response in meaning.responses:
        pieces = [(response + tokenizer.eos_token, True)] if is_text else _pieces(response)
        full.append(prompt + "".join(text for text, _ in pieces))
        scored.append([is_scored for text, is_scored in pieces for _ in text])
    encode = {"add_special_tokens": is_text, "return_offsets_mapping": True}
    prompt_ids = tokenizer(prompt, **encode)["input_ids"]
    encoded = [tokenizer(text, **encode) for text in full]
    # A token that spans the boundary belongs to the response.
    shared = min(_common(prompt_ids, one["input_ids"]) for one in encoded)
    masks = []
    for one, is_scored in zip(encoded, scored, strict=True):
        ends = [end for _, end in one["offset_mapping"]][shared:]
        words = [int(end <= len(prompt) or is_scored[end - len(prompt) - 1]) for end in ends]
        masks.append(words if shared else [0, *words[1:]])  # nothing predicts the first token of the sequence
    return {
        "prompt_ids": encoded[0]["input_ids"][:shared],
        "response_ids": [one["input_ids"][shared:] for one in encoded],
        "scored_masks": masks,
        **meaning.columns,
    }


def _pieces(response: list[Message]) -> list[tuple[str, bool]]:
    """Return the text of a reply after the header of its first turn, and the parts
    of the text that the assistant writes.
    """
    pieces = []
    for place, message in enumerate(response):
        words = f"{message['content']}<|im_end|>\n"
        pieces += [(f"<|im_start|>{message['role']}\n", False)] if place else []
        pieces.append((words, message["role"] == "assistant"))
    return pieces


def _common(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(left), len(right)))


# Valid rows. Their texts contain spaces, control characters, joiners, other scripts and symbols of other formats.
ODD = "\x00 \t\n\r\u00a0\u200b\u200d\u2028\ufeff\u0301\u202e{}[]<>|%#\"'\\:?👩‍🚀🇩🇪ßİ漢字ไทยעברית"
words = st.text(st.sampled_from("abcXYZ .,!?\n0159" + ODD) | st.characters(exclude_categories=["Cs"]), max_size=12)
texts = st.lists(words, min_size=1, max_size=4).map(" ".join).filter(lambda text: text.strip() and _is_plain(text))


def _is_plain(text: str) -> bool:
    """Return whether a text is not a transcript, not JSON, and without control
    tokens, which would have another meaning.
    """
    return text.lstrip()[:1] not in ("[", "{") and not any(
        word in text for word in ("<|", "<s>", "<bos>", "<｜", "<pad>", "<extra_id", "Human:", "Assistant:", "[INST]")
    )


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@st.composite
def conversations(draw) -> list[Message]:
    """Draw a prompt: possibly a system prompt, some turns, and the user's message."""
    messages = [say("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages += [say("user", draw(texts)), say("assistant", draw(texts))]
    return [*messages, say("user", draw(texts))]


@st.composite
def replies(draw) -> list[Message]:
    """Draw a reply: usually one turn of the assistant, sometimes with another user turn and its answer."""
    messages = [say("assistant", draw(texts))]
    if draw(st.integers(0, 4)) == 0:
        messages += [say("user", draw(texts)), say("assistant", draw(texts))]
    return messages


PAIR = {"pairs": [[0, 1]]}


@st.composite
def right_rows(draw) -> tuple[Row, Meaning]:
    """Draw a row of one of the formats, with its meaning."""
    is_text = draw(st.booleans())
    prompt = draw(texts if is_text else conversations())
    count = draw(st.integers(2, 4))
    responses = draw(st.lists(texts if is_text else replies(), min_size=count, max_size=count))
    # Responses that repeat the prompt or its question have another meaning.
    asked = prompt.strip() if is_text else prompt[-1]
    assume(not any(asked in (response if is_text else response[1:]) for response in responses))
    return draw(st.sampled_from(_FORMATS))(draw, prompt, responses, is_text)


def _pair(draw, prompt, responses, is_text):
    chosen, rejected = responses[:2]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, Meaning(prompt, [chosen, rejected], PAIR)


def _implicit_pair(draw, prompt, responses, is_text):
    if is_text or responses[0][0] == responses[1][0]:
        return _pair(draw, prompt, responses, is_text)
    chosen, rejected = responses[:2]
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}, Meaning(prompt, [chosen, rejected], PAIR)


def _triple(draw, prompt, responses, is_text):
    sides = [*responses, responses[0]][:3]
    row = {"prompt": prompt, **dict(zip(("chosen", "rejected", "reference"), sides, strict=True))}
    return row, Meaning(prompt, sides, {**PAIR, "golds": [2]})


def _labeled(draw, prompt, responses, is_text):
    label = draw(st.booleans())
    return {"prompt": prompt, "completion": responses[0], "label": label}, Meaning(
        prompt, responses[:1], {"labels": [label]}
    )


def _scored(draw, prompt, responses, is_text):
    scores = draw(st.lists(st.integers(-3, 3).map(float), min_size=len(responses), max_size=len(responses)))
    ranks = [1.0 + sum(other > score for other in scores) for score in scores]
    row = {"prompt": prompt, "responses": responses, "scores": scores}
    return row, Meaning(prompt, responses, {"scores": scores, "ranks": ranks})


def _ranked(draw, prompt, responses, is_text):
    ranks = draw(st.lists(st.integers(1, 4).map(float), min_size=len(responses), max_size=len(responses)))
    row = {"prompt": prompt, "responses": responses, "ranks": ranks}
    return row, Meaning(prompt, responses, {"scores": [], "ranks": ranks})


_FORMATS = (_pair, _implicit_pair, _triple, _labeled, _scored, _ranked)


# Rows of known layouts: pairs, labeled responses or lists.
def known_meaning(means: Row) -> Meaning | None:
    """Return the meaning of a row of layouts.jsonl; None if the row needs whole texts, or must raise an error."""
    if not {"prompt"} <= means.keys() or "prefix" in means:
        return None
    is_text = isinstance(means["prompt"], str)
    sides = means.get("list") or [means[s] for s in ("chosen", "rejected", "reference", "completion") if s in means]
    responses = sides if is_text else [[say("assistant", text)] for text in sides]
    columns = PAIR if len(sides) == 2 else {**PAIR, "golds": [2]}
    if "label" in means:
        columns = {"labels": [means["label"]]}
    if "list" in means:
        scores = means.get("scores", [])
        ranks = [1.0 + sum(other > score for other in scores) for score in scores] or means["ranks"]
        columns = {"scores": scores, "ranks": ranks}
    return Meaning(means["prompt"], responses, columns)


KNOWN_ROWS = [
    (row, meaning)
    for case in KNOWN
    for row, means in zip(case["rows"], case["means"], strict=True)
    if not {"drop", "refuse", "either"}.intersection(means) and (meaning := known_meaning(means)) is not None
]


# Mutations. The first kind does not change the meaning.
def _shuffled(draw, row: Row) -> Row:
    return {name: row[name] for name in draw(st.permutations(list(row)))}


HARMLESS = {
    "columns in another order": _shuffled,
    "an id": lambda draw, row: {**row, "row_id": draw(st.uuids()).hex},
    "an empty column": lambda draw, row: {draw(st.sampled_from(["history", "system", "images", "zz"])): None, **row},
    "a source": lambda draw, row: {**row, "source": draw(st.sampled_from(["a", "some/set", ""]))},
    "empty tools": lambda draw, row: {**row, "tools": draw(st.sampled_from([None, [], "", "[]", "null"]))},
}


def _somewhere(change):
    """Return a mutation that applies a change to the value of one random column."""

    def mutate(draw, row: Row) -> Row:
        name = draw(st.sampled_from(list(row)))
        return {**row, name: change(draw, copy.deepcopy(row[name]))}

    return mutate


def _renamed(draw, row: Row) -> Row:
    name = draw(st.sampled_from(list(row)))
    new = draw(st.sampled_from([name.upper(), name + "_2", "zz", "my " + name, name[:-1], name + "s", "question_x"]))
    return {new if key == name else key: value for key, value in row.items()}


def _without(draw, row: Row) -> Row:
    name = draw(st.sampled_from(list(row)))
    return {key: value for key, value in row.items() if key != name} or row


def _deep(change):
    """Return a mutation that applies a change to one random value at any depth."""

    def walk(draw, value):
        if isinstance(value, dict) and value:
            key = draw(st.sampled_from(list(value)))
            return {**value, key: walk(draw, value[key])}
        if isinstance(value, list) and value:
            at = draw(st.integers(0, len(value) - 1))
            return [*value[:at], walk(draw, value[at]), *value[at + 1 :]]
        return change(draw, value)

    return _somewhere(walk)


def _role_swapped(draw, value: Any) -> Any:
    """Draw a value in which one message has another role, or lacks or renames another key."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _message_changed(draw, value[at]), *value[at + 1 :]]
    return _message_changed(draw, value) if isinstance(value, dict) else value


def _message_changed(draw, message: Row) -> Row:
    key = draw(st.sampled_from(list(message)))
    how = draw(st.sampled_from(["drop", "rename", "role", "null"]))
    if how == "role":
        role = draw(st.sampled_from(["user", "assistant", "system", "tool", "critic", "", None, 3]))
        return {**message, key: role} if key in ("role", "from") else message
    if how == "null":
        return {**message, key: None}
    rest = {name: value for name, value in message.items() if name != key}
    return rest if how == "drop" else {**rest, key + "_": message[key]}


scalars = st.none() | st.booleans() | st.integers(-3, 10**19) | st.floats() | words
BLANK = ["", " ", "\n\t", "\u00a0", None, [], {}]
HARMFUL = {
    "a column renamed": _renamed,
    "a column dropped": _without,
    "a value missing": _somewhere(lambda draw, value: None),
    "another type": _somewhere(lambda draw, value: draw(scalars)),
    "another type inside": _deep(lambda draw, value: draw(scalars)),
    "nothing inside": _deep(lambda draw, value: draw(st.sampled_from(BLANK))),
    "a list around": _somewhere(lambda draw, value: [value]),
    "a list around something inside": _deep(lambda draw, value: [value]),
    "a struct around": _somewhere(lambda draw, value: {draw(st.sampled_from(["text", "value", "a"])): value}),
    "JSON": _somewhere(lambda draw, value: json.dumps(value)),
    "what Python prints": _somewhere(lambda draw, value: str(value)),
    "blank": _somewhere(lambda draw, value: draw(st.sampled_from(BLANK))),
    "a role swapped": _somewhere(_role_swapped),
    "half a character": _deep(lambda draw, value: f"{value}\ud83d"),
    "bytes": _somewhere(lambda draw, value: str(value).encode()),
}


def mutated(kind: dict[str, Any]) -> st.SearchStrategy:
    """Draw a known or random valid row with its meaning, a mutation of the row, and the name of the mutation."""

    @st.composite
    def draws(draw) -> tuple[str, Row, Row, Meaning]:
        row, meaning = draw(right_rows() | st.sampled_from(KNOWN_ROWS))
        name = draw(st.sampled_from(list(kind)))
        return name, row, kind[name](draw, row), meaning

    return draws()


# Arbitrary values in columns with known names, and possibly in other columns.
NAMES = sorted(
    {name for case in KNOWN for row in case["rows"] for name in row} | {"tools", "weight", "margin", "images"}
)
# Arrow truncates names at a NUL.
names = st.sampled_from(NAMES) | words.filter(lambda name: "\0" not in name)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "human", "x"]), "content": texts},
    optional={"name": words, "tool_calls": st.lists(st.dictionaries(names, words, max_size=2), max_size=2)},
)
values = st.recursive(
    scalars | texts | st.lists(messages, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
any_rows = st.dictionaries(names, values, min_size=1, max_size=5)
