"""Rows of every format become canonical rows, and the error of a bad row says what is wrong and how to fix it."""

import pytest

from hf_prefopt.data.column_layouts import find_layout
from hf_prefopt.data.formats import FORMATS
from hf_prefopt.data.rows import BadRow
from hf_prefopt.kinds import PAIRS, TRIPLES, UNPAIRED
from tests.data.helpers import READ, ask, chat_pair, reply, say, text_pair

SAMPLES = {
    **{column: [1] for column in ("ranks", "scores", "responses")},
    "completion": [say("user", "a"), say("assistant", "b")],
    "label": True,
    "quantile": 0.5,
}


def find_format(columns, kind=None):
    return find_layout({column: SAMPLES.get(column, "a") for column in columns}, kind).format


@pytest.mark.parametrize("name", [name for name in FORMATS if "conversations" not in name])
def test_each_format_is_found_by_its_columns_and_others_are_left_aside(name):
    row_format = FORMATS[name]
    assert find_format([*row_format.columns, "problem_id"], row_format.kind) is row_format


@pytest.mark.parametrize("kind", [None, PAIRS, UNPAIRED])
def test_a_reference_is_a_gold_response_only_where_triples_are_wanted(kind):
    """`reference` is a column of other datasets, too; losses of pairs ignore it, as in TRL's trainers."""
    columns = ["prompt", "chosen", "rejected", "reference"]
    assert find_format(columns, kind).name == "pairs"
    assert find_format(columns, TRIPLES).name == "triples"
    assert find_format(columns[:3], TRIPLES).name == "pairs"


def test_a_triple_is_a_pair_and_a_gold_response():
    """A triple may be text, messages that contain the prompt, or tokens."""
    explicit = READ["triples"]({**text_pair(), "reference": " Paris!"})
    assert explicit.responses == [*READ["pairs"](text_pair()).responses, " Paris!"]
    sides = {side: [*ask(), *reply(side)] for side in ("chosen", "rejected", "reference")}
    implicit = READ["triples that begin with their prompt"](sides)
    assert (implicit.prompt, implicit.responses) == (ask(), [reply(side) for side in sides])
    ids = READ["tokenized triples"]({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "reference_ids": [4]})
    assert ids.responses == [[2], [3], [4]]
    for row in (explicit, implicit, ids):
        assert row.example_columns == {"pairs": [[0, 1]], "golds": [2]}


@pytest.mark.parametrize(
    ("columns", "missing"), [(["prompt", "chosen"], "`rejected`"), (["prompt_ids", "chosen_ids"], "`rejected_ids`")]
)
def test_a_missing_column_is_named(columns, missing):
    with pytest.raises(ValueError, match=f"columns? {missing} (is|are) missing"):
        find_format(columns)


def test_explicit_pairs_keep_their_parts():
    row = READ["pairs"](chat_pair())
    assert (row.content_type, row.prompt, row.responses) == ("messages", ask(), [reply("Paris."), reply("Rome.")])
    assert row.example_columns == {"pairs": [[0, 1]]}


def test_implicit_messages_split_after_the_messages_that_both_sides_share():
    """Both conversations share user and assistant; the second user turn differs, so
    responses are their last two messages.
    """
    start = [*ask("Hi"), *reply("Hello")]
    row = READ["pairs that begin with their prompt"](
        {"chosen": [*start, *ask("2+2?"), *reply("4")], "rejected": [*start, *ask("3+3?"), *reply("5")]}
    )
    assert row.prompt == start
    assert row.responses == [[*ask("2+2?"), *reply("4")], [*ask("3+3?"), *reply("5")]]


def test_a_shared_prompt_never_swallows_a_response():
    """The rejected conversation continues the chosen one, whose last message is still its response."""
    longer = [*ask("Hi"), *reply("Hello"), *ask("2+2?"), *reply("4")]
    row = READ["pairs that begin with their prompt"]({"chosen": longer[:2], "rejected": longer})
    assert row.prompt == ask("Hi")
    assert row.responses == [reply("Hello"), longer[1:]]


def test_identical_implicit_conversations_keep_their_last_message_as_response():
    row = READ["pairs that begin with their prompt"](
        {"chosen": [*ask(), *reply("Paris.")], "rejected": [*ask(), *reply("Paris.")]}
    )
    assert (row.prompt, row.responses) == (ask(), [reply("Paris."), reply("Paris.")])


def test_a_shared_assistant_message_is_no_unfinished_turn():
    """After one shared assistant message, both conversations have another one: the
    prompt ends before the first of the two.
    """
    chosen, rejected = ([*ask(), *reply("Well."), *reply(end)] for end in ("Paris.", "Rome."))
    row = READ["pairs that begin with their prompt"]({"chosen": chosen, "rejected": rejected})
    assert (row.prompt, row.responses) == (ask(), [chosen[1:], rejected[1:]])


def test_keys_that_arrow_filled_with_none_are_not_part_of_a_message():
    padded = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}
    row = READ["pairs"]({"prompt": [{**say("user", "Hi"), "name": None}], "chosen": [padded], "rejected": reply("No")})
    assert row.prompt == [say("user", "Hi")]
    assert row.responses[0][0]["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]


def test_tools_may_be_a_list_or_its_json_and_an_empty_list_is_none():
    tool = {"name": "search", "parameters": {}}
    given = [READ["pairs"]({**chat_pair(), "tools": tools}).tools for tools in ([tool], f"[{tool}]".replace("'", '"'))]
    assert given == [[tool], [tool]]
    assert READ["pairs"]({**chat_pair(), "tools": []}).tools is None


BAD_ROWS = {
    "a missing side": ("pairs", {**text_pair(), "rejected": None}, "`rejected` is missing"),
    "an empty side": ("pairs", text_pair(chosen=""), "`chosen` is empty"),
    "a blank side": ("pairs", text_pair(rejected=" \n"), "`rejected` is only whitespace"),
    "an empty message": ("pairs", chat_pair(rejected=""), "`rejected` is empty"),
    "no messages": ("pairs", {**chat_pair(), "chosen": []}, "`chosen` is empty"),
    "messages written as text beside plain text": (
        "pairs",
        {**text_pair(), "rejected": '[{"role": "assistant", "content": "Rome."}]'},
        "`rejected` contains messages written as text, but another response is plain text",
    ),
    "an empty gold response": ("triples", {**text_pair(), "reference": ""}, "`reference` is empty"),
    "no gold ids": (
        "tokenized triples",
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "reference_ids": None},
        "`reference_ids` is missing",
    ),
    "a number": ("pairs", {**text_pair(), "chosen": 4.5}, "`chosen` is of type float"),
    "no role": ("pairs", {**chat_pair(), "chosen": [{"content": "a"}]}, "no `role` in message 0"),
    "no content": ("pairs", {**chat_pair(), "chosen": [{"role": "assistant"}]}, "no `content` in message 0"),
    "no dict": ("pairs", {**chat_pair(), "chosen": ["Paris."]}, "contains a str where message 0"),
    "no reply": ("pairs", {**chat_pair(), "chosen": ask()}, "`chosen` has no assistant message"),
    "tools": ("pairs", {**chat_pair(), "tools": "[{"}, "`tools` is text but not JSON"),
    "no prompt": (
        "pairs that begin with their prompt",
        {"chosen": [*ask("a"), *reply("b")], "rejected": [*ask("c"), *reply("d")]},
        "no prompt",
    ),
    "no ids": (
        "tokenized pairs",
        {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]},
        "`chosen_ids` is empty",
    ),
    "negative ids": (
        "tokenized pairs",
        {"prompt_ids": [1], "chosen_ids": [2, -100], "rejected_ids": [2]},
        "`chosen_ids` contains -100 at position 1",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_names_its_column_and_a_cure(case):
    row_format, row, expected = BAD_ROWS[case]
    with pytest.raises(BadRow, match=expected) as caught:
        READ[row_format](row)
    assert "; " in str(caught.value)
