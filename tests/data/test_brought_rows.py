"""Rows as people bring them, in forms that no page describes: read completely, or an error that says what to do."""

import json
from decimal import Decimal

import pytest
from datasets import Dataset, IterableDataset

from hf_prefopt.data.prepare import prepare_dataset
from tests.data.helpers import ask, chat_pair, prepare_row, reply, say, scored_text, text_pair
from tests.tokenizers import CHATML, tiny_tokenizer

CALLS = [{"type": "function", "function": {"name": name, "arguments": {"city": name}}} for name in ("one", "two")]
TOOLS = [{"type": "function", "function": {"name": "one"}}]
TOKENIZER = tiny_tokenizer()
READS_TOOLS = tiny_tokenizer("{%- if tools -%}{{ tools | tojson }}{%- endif -%}" + CHATML)
WRITTEN = "{{- '<tool_call>' + call['function'] | tojson + '</tool_call>' -}}"
CALLED = "message['tool_calls'] or []"


def called(calls=CALLS, **more):
    return {**chat_pair(), "chosen": [{**reply("Look.")[0], "tool_calls": calls, **more}]}


def template(old, new):
    assert old in CHATML
    return tiny_tokenizer(CHATML.replace(old, new))


WITHOUT_EARLIER_ANSWERS = tiny_tokenizer(
    CHATML.replace("messages -%}", "messages -%}{%- if message['role'] != 'assistant' or loop.last -%}", 1).replace(
        "{{- '<|im_end|>\n' -}}", "{{- '<|im_end|>\n' -}}{%- endif -%}"
    )
)
LATEST = template("for message in messages", "for message in messages[-3:]")
TALK = [*ask("One?"), *reply("1."), *ask("Two?")]
TWO = {"prompt": "Q: ", "response_a": "Yes.", "response_b": "No."}
# What is wrong, the row, its tokenizer, and what is said.
REFUSED = {
    "calls that the template leaves out": (called(), template(CALLED, "[]"), "has `tool_calls`, wh"),
    "all calls but the first": (called(), template(CALLED, f"({CALLED})[:1]"), r"`tool_calls\[1\]`, wh"),
    "all calls but the last": (called(), template(CALLED, f"({CALLED})[-1:]"), r"`tool_calls\[0\]`, wh"),
    "arguments": (called(), template(WRITTEN, "{{- call['function']['name'] -}}"), "has arguments in `tool_calls`, wh"),
    "a call by its former name": (
        {**chat_pair(), "chosen": [{**reply("Look.")[0], "function_call": {"name": "one", "arguments": "{}"}}]},
        TOKENIZER,
        "has `function_call`, which the chat template does not write",
    ),
    "calls that are no JSON": (called("one()"), TOKENIZER, "`tool_calls` in message 0 .* that are not JSON"),
    "calls of another form": (called([["one"]]), TOKENIZER, "`tool_calls` of another form"),
    "earlier turns": (chat_pair(prompt=[*TALK, *reply("2."), *ask()]), LATEST, "has a message of role 'user', which"),
    "an earlier answer": (
        chat_pair(prompt=TALK),
        WITHOUT_EARLIER_ANSWERS,
        "has a message of role 'assistant', which the chat template does not write",
    ),
    "a zero-width space": (text_pair(chosen="\u200b"), TOKENIZER, "`chosen` is only whitespace"),
    "a byte order mark": (chat_pair(rejected="\ufeff "), TOKENIZER, "`rejected` is only whitespace"),
    "a number for a prompt": ({**text_pair(), "prompt": 5}, TOKENIZER, "`prompt` is of type int; make it text"),
    "another verdict": (
        {**text_pair(), "winner": "rejected"},
        TOKENIZER,
        "`winner` is 'rejected', but the better resp",
    ),
    "votes as numbers": ({**TWO, "votes": [0, 1]}, TOKENIZER, "a list with the name of the better response"),
}


@pytest.mark.parametrize(("row", "tokenizer", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(row, tokenizer, said):
    with pytest.raises(ValueError, match=said):
        prepare_row(row, tokenizer)


HALVES = {
    "prompt": {**text_pair(), "prompt": "\ud83d"},
    "chosen": chat_pair(chosen="So \ud83d"),
    "rejected": text_pair(rejected="\udc80"),
}


@pytest.mark.parametrize("column", HALVES)
def test_half_of_a_surrogate_pair_is_named(column):
    """Arrow stores no such text; a stream brings it."""
    stream = IterableDataset.from_generator(
        lambda: iter([text_pair() if column != "chosen" else chat_pair(), HALVES[column]])
    )
    with pytest.raises(
        ValueError, match=f"train: row 1: `{column}` contains '.*' at character .*, which is half of a surrogate pair"
    ):
        list(prepare_dataset(stream, TOKENIZER))


SAME = {
    "calls as JSON": (called(json.dumps(CALLS)), called(), TOKENIZER),
    "one call without a list": (called(CALLS[0]), called(CALLS[:1]), TOKENIZER),
    "each tool as JSON": (
        {**chat_pair(), "tools": [json.dumps(tool) for tool in TOOLS]},
        {**chat_pair(), "tools": TOOLS},
        READS_TOOLS,
    ),
    "decimal numbers": (
        {**TWO, "score_a": Decimal("1.5"), "score_b": Decimal("2.5")},
        {**TWO, "score_a": 1.5, "score_b": 2.5},
        TOKENIZER,
    ),
}


@pytest.mark.parametrize(("row", "other", "tokenizer"), SAME.values(), ids=SAME)
def test_what_is_read_alike(row, other, tokenizer):
    assert prepare_row(row, tokenizer) == prepare_row(other, tokenizer)


def test_pairs_that_look_alike_are_counted(caplog):
    rows = [text_pair(chosen=" caf\u00e9", rejected=" cafe\u0301"), text_pair(chosen=" A b.", rejected=" A  b. ")]
    prepare_dataset(Dataset.from_list([*rows, text_pair()]), TOKENIZER)
    prepare_dataset(
        Dataset.from_list([chat_pair(chosen="A\nb."), chat_pair(chosen="A b.", rejected="A\nb.")]), TOKENIZER
    )
    found = [text for text in caplog.messages if "differ only in white space" in text]
    assert ["2 pairs kept whose" in found[0], "1 pair kept whose" in found[1]] == [True, True]


@pytest.mark.parametrize("max_length", range(4, 24))
def test_a_prompt_cut_at_its_start_keeps_its_end(max_length):
    """The header of the user, a token of the question at least, the end of the turn, and the header of the answer."""
    row = chat_pair("It is Paris.", "Rome.", ask("Which of them is it?"))
    whole = prepare_row(row, TOKENIZER)["prompt_ids"]
    end = TOKENIZER("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    head = TOKENIZER("<|im_start|>user\n")["input_ids"]
    try:
        cut = prepare_row(row, TOKENIZER, max_length=max_length, truncation_mode="keep_end")
    except ValueError as error:
        assert "none of 1 row is left" in str(error) and max_length < len(head) + 1 + len(end) + 2
        return
    ids = cut["prompt_ids"]
    assert ids == [*head, *whole[len(head) - len(ids) :]] and len(ids) > len(head) + len(end)
    assert all(len(ids) + len(response) <= max_length for response in cut["response_ids"])
    assert "<|im_end|>" in scored_text(cut, 0, TOKENIZER)


def test_a_later_system_message_is_context():
    row = chat_pair(prompt=[*ask(), *reply("Paris."), say("system", "Be brief."), *ask("And now?")])
    assert "Be brief." in TOKENIZER.decode(prepare_row(row, TOKENIZER)["prompt_ids"])
