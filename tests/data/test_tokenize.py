"""Rows become the right tokens, with the right boundary between prompt and response, and the right scored tokens."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import processors

from hf_prefopt.data import render
from hf_prefopt.data.prepare import prepare_dataset
from tests.data.helpers import ODD_CASES, ask, chat_pair, prepare_row, reply, say, scored_text, text_pair
from tests.tokenizers import (
    CHATML,
    CHATML_THINKING_LAST,
    CHATML_WITH_MARKERS,
    CHATML_WITHOUT_TOOLS,
    tiny_tokenizer,
)

UNUSABLE = {
    "empty_response": "`rejected` is empty",
    "empty_chosen": "`chosen` is empty",
    "empty_rejected": "`rejected` is empty",
    "whitespace_only_completion": "`rejected` is only whitespace",
    "missing_rejected": "`rejected` is missing",
}
# test_column_layouts.py has rows with several kinds of values.
USABLE = [name for name in ODD_CASES if name not in UNUSABLE and name != "wrong_types"]


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_odd_cases_are_refused_by_name(name):
    with pytest.raises(ValueError, match=UNUSABLE[name]):
        prepare_row(ODD_CASES[name]["data"], tiny_tokenizer())


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"pad_is_eos": True}], ids=str)
@pytest.mark.parametrize("name", USABLE)
def test_decoding_prompt_and_response_gives_the_rendered_text(name, options):
    """For any boundary, no text is lost or repeated; every response has a scored token."""
    tokenizer, data = tiny_tokenizer(**options), ODD_CASES[name]["data"]
    row = prepare_row(data, tokenizer)
    sides = ("completion",) if "completion" in data else ("chosen", "rejected")
    for ids, mask, side in zip(row["response_ids"], row["scored_masks"], sides, strict=True):
        assert tokenizer.decode(row["prompt_ids"] + ids) == _rendered(data, side, tokenizer)
        assert len(mask) == len(ids) and sum(mask) > 0


def _rendered(data: dict, side: str, tokenizer) -> str:
    if isinstance(data[side], str):
        return (tokenizer.bos_token or "") + data.get("prompt", "") + data[side] + tokenizer.eos_token
    prompt, response = data.get("prompt", []), data[side]
    # An end of turn in the response is not written a second time.
    response = [{**message, "content": (message["content"] or "").removesuffix("<|im_end|>")} for message in response]
    if prompt and prompt[-1]["role"] == "assistant":
        prompt, response = prompt[:-1], reply(prompt[-1]["content"] + response[0]["content"])
    return tokenizer.apply_chat_template(prompt + response, tools=data.get("tools"), tokenize=False)


def test_the_prompt_of_a_conversation_ends_with_the_generation_prompt():
    tokenizer = tiny_tokenizer()
    row = prepare_row(chat_pair(), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(row["response_ids"][0]) == "Paris.<|im_end|>\n"


def test_a_prompt_that_ends_with_an_assistant_message_is_continued():
    tokenizer = tiny_tokenizer()
    row = prepare_row(ODD_CASES["prompt_ends_with_assistant"]["data"], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\nThe capital is")
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == [" Paris.<|im_end|>\n", " Rome.<|im_end|>\n"]


def test_an_empty_list_of_messages_leaves_the_assistants_header_as_prompt():
    tokenizer = tiny_tokenizer()
    row = prepare_row(ODD_CASES["empty_prompt_list"]["data"], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>assistant\n"


def test_one_eos_ends_a_text_and_is_scored():
    """Of " Paris." and " Rome.<|im_end|>", only the first response gets an EOS."""
    tokenizer = tiny_tokenizer()
    row = prepare_row(text_pair(rejected=" Rome.<|im_end|>"), tokenizer)
    for ids, mask in zip(row["response_ids"], row["scored_masks"], strict=True):
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id and mask[-1] == 1


def test_eos_is_scored_where_it_is_also_the_pad_token():
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    for data in (text_pair(), chat_pair()):
        assert "<|im_end|>" in scored_text(prepare_row(data, tokenizer), 0, tokenizer)


def test_texts_get_the_tokenizers_bos_and_conversations_do_not():
    tokenizer = tiny_tokenizer(bos=True)
    assert prepare_row(text_pair(), tokenizer)["prompt_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in prepare_row(chat_pair(), tokenizer)["prompt_ids"]


def test_tokens_that_merge_across_the_boundary_belong_to_the_response_of_both():
    """The tokens of "unbelievable" do not begin with those of "un", so no token of
    "un" is in the prompt of both responses.
    """
    tokenizer = tiny_tokenizer(bos=True)
    row = prepare_row(ODD_CASES["boundary_merge"]["data"], tokenizer)
    assert row["prompt_ids"] == [tokenizer.bos_token_id]
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == [
        "unbelievable story<|im_end|>",
        "under the sea<|im_end|>",
    ]


def test_without_a_prompt_the_first_token_is_not_scored():
    row = prepare_row(text_pair(prompt="", chosen="Once upon a time", rejected="asdf"), tiny_tokenizer())
    assert row["prompt_ids"] == []
    for mask in row["scored_masks"]:
        assert mask == [0] + [1] * (len(mask) - 1)


def test_implicit_texts_split_on_whole_tokens():
    """The texts differ within a word, after "each toy c", which TRL uses as prompt.
    The tokens are " car" and " cost" here, so the prompt ends before them.
    """
    tokenizer = tiny_tokenizer()
    row = prepare_row({"chosen": "each toy car", "rejected": "each toy cost"}, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "each toy"
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == [" car<|im_end|>", " cost<|im_end|>"]


def test_an_implicit_text_that_the_other_begins_with_keeps_its_eos_to_score():
    tokenizer = tiny_tokenizer()
    row = prepare_row({"chosen": "The capital of", "rejected": "The capital of Rome"}, tokenizer)
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == ["<|im_end|>", " Rome<|im_end|>"]


def test_identical_implicit_texts_keep_one_token_each():
    """All tokens are shared, so the prompt has all tokens except for the last one, the EOS."""
    tokenizer = tiny_tokenizer()
    row = prepare_row({"chosen": "The capital", "rejected": "The capital"}, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "The capital"
    assert row["response_ids"] == [[tokenizer.eos_token_id]] * 2


def test_ids_are_taken_as_they_are():
    row = prepare_row({"prompt_ids": [7, 8], "chosen_ids": [9, 10], "rejected_ids": [11]}, tiny_tokenizer())
    assert (row["prompt_ids"], row["response_ids"]) == ([7, 8], [[9, 10], [11]])
    assert row["scored_masks"] == [[1, 1], [1]]


MULTI_TURN = {
    "prompt": ask("Hi"),
    "chosen": [*reply("Hello."), *ask("What is two and two?"), *reply("Four.")],
    "rejected": [say("assistant", "Hey."), say("tool", "nothing"), say("assistant", "Five.")],
}


def test_only_the_assistants_turns_of_a_response_are_scored():
    """Only the words, the end of turn and the line break after it are scored; no header, no user turn, no tool turn."""
    tokenizer = tiny_tokenizer()
    row = prepare_row(MULTI_TURN, tokenizer)
    assert scored_text(row, 0, tokenizer) == "Hello.<|im_end|>\nFour.<|im_end|>\n"
    assert scored_text(row, 1, tokenizer) == "Hey.<|im_end|>\nFive.<|im_end|>\n"


def test_a_templates_generation_markers_say_what_is_scored():
    """The generation markers of this template exclude the line break after the end of turn."""
    tokenizer = tiny_tokenizer(CHATML_WITH_MARKERS)
    row = prepare_row(MULTI_TURN, tokenizer)
    assert scored_text(row, 0, tokenizer) == "Hello.<|im_end|>Four.<|im_end|>"
    assert scored_text(prepare_row(chat_pair(), tokenizer), 0, tokenizer) == "Paris.<|im_end|>"


def test_turns_are_told_apart_where_only_the_last_one_shows_its_thinking():
    """The empty thinking block that the template writes is not scored."""
    tokenizer = tiny_tokenizer(CHATML_THINKING_LAST)
    row = prepare_row(MULTI_TURN, tokenizer)
    assert scored_text(row, 0, tokenizer) == "Hello.<|im_end|>\nFour.<|im_end|>\n"


def test_turns_that_cannot_be_told_apart_make_a_bad_row():
    """The template begins with the number of messages, so single turns look different than in a conversation."""
    counting = "{{ messages | length }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match=r"row 0: `chosen` is rejected.*it rewrites earlier turns"):
        prepare_row(MULTI_TURN, tiny_tokenizer(counting))


def test_a_template_that_ignores_tool_calls_makes_a_bad_row():
    with pytest.raises(ValueError, match=r"`chosen` has `tool_calls`, which the chat template does not write"):
        prepare_row(ODD_CASES["tool_call_completion"]["data"], tiny_tokenizer(CHATML_WITHOUT_TOOLS))


def test_control_tokens_in_a_users_words_do_not_move_the_boundary():
    """The prompt contains a fake assistant header; the response still begins after the real one."""
    tokenizer = tiny_tokenizer()
    row = prepare_row(ODD_CASES["special_tokens_in_content"]["data"], tokenizer)
    assert tokenizer.decode(row["response_ids"][0]) == "No.<|im_end|>\n"


def test_messages_without_a_chat_template_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"no chat template: use an instruction-tuned model"):
        prepare_row(chat_pair(), tiny_tokenizer(None))


def test_what_a_template_refuses_is_a_bad_row_with_the_templates_words():
    picky = "{{ raise_exception('roles must alternate') if messages | length > 1 else messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"row 0: `chosen` is rejected by the chat template \(roles must alternate\)"):
        prepare_row(chat_pair(), tiny_tokenizer(picky))


def test_chat_template_kwargs_reach_the_template():
    tokenizer = tiny_tokenizer("{{ mood | default('none') }}: {% for m in messages %}{{ m['content'] }} {% endfor %}")
    row = prepare_row({**chat_pair(), "chat_template_kwargs": {"mood": "good"}}, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]).startswith("good: What is")


@pytest.mark.parametrize("options", [{}, {"bos": True}], ids=str)
def test_ordinary_rows_have_the_tokens_that_trl_gives_them(options):
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    tokenizer = tiny_tokenizer(**options)
    chats = [ODD_CASES[name]["data"] for name in ("near_identical_pair", "system_only_prompt", "one_token_completion")]
    texts = [text_pair(), text_pair(chosen="Paris, of course.", rejected="Rome"), ODD_CASES["boundary_merge"]["data"]]
    for rows in (chats, texts):
        trainer = SimpleNamespace(_tokenizer=tokenizer)
        args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
        theirs = dpo_trainer.DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
        ours = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=None)
        assert [row["prompt_ids"] for row in ours] == [row["prompt_ids"] for row in theirs]
        assert [row["response_ids"] for row in ours] == [[row["chosen_ids"], row["rejected_ids"]] for row in theirs]


def test_a_chat_template_is_read_once_for_all_rows_of_a_batch_with_the_same_arguments(monkeypatch):
    """Of four rows, two have equal arguments, one has tools, and one has another template argument: three templates."""
    built = []

    class Counted(render.ChatTemplate):
        def __init__(self, *arguments):
            built.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(render, "ChatTemplate", Counted)
    tools = json.dumps([{"type": "function", "function": {"name": "search", "parameters": {}}}])
    plain = {**chat_pair(), "tools": None, "chat_template_kwargs": None}
    rows = [plain, plain, {**plain, "tools": tools}, {**plain, "chat_template_kwargs": '{"enable_thinking": false}'}]
    prepare_dataset(Dataset.from_list(rows), tiny_tokenizer(), max_length=None)
    assert len(built) == 3


def test_the_tokenizer_is_asked_once_a_batch_whether_it_adds_an_eos(monkeypatch):
    tokenizer, asked = tiny_tokenizer(), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *texts, **k: asked.append(texts[1]) or call(*texts, **k))
    prepare_dataset(Dataset.from_list([text_pair()] * 5), tokenizer, max_length=None)
    assert asked.count("a") == 1


def test_one_bos_and_one_eos_whoever_wrote_them():
    """Texts that a chat template has written are tested, and a tokenizer that adds both tokens itself."""
    tokenizer = tiny_tokenizer(bos=True)
    plain = prepare_row(text_pair("The capital", " is Paris.", " is Rome."), tokenizer)
    written = text_pair("<s>The capital", " is Paris.<|im_end|>", " is Rome.<|im_end|>")
    assert prepare_row(written, tokenizer) == plain
    ids = prepare_row({side: "<s>The capital of it is " + side for side in ("chosen", "rejected")}, tokenizer)
    assert ids["prompt_ids"].count(tokenizer.bos_token_id) == 1
    adds_both = tiny_tokenizer(bos=True)
    adds_both._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>",
        special_tokens=[(token, adds_both.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")],
    )
    assert prepare_row(written, adds_both)["response_ids"] == plain["response_ids"]
    assert (
        prepare_row(text_pair("The capital", " is Paris.", " is Rome."), adds_both)["response_ids"]
        == plain["response_ids"]
    )


def test_a_text_that_a_template_has_ended_gets_no_second_eos():
    tokenizer = tiny_tokenizer()
    row = prepare_row(text_pair("<|im_start|>user", "Hi<|im_end|>\n", "No<|im_end|>\n"), tokenizer)
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == ["Hi<|im_end|>\n", "No<|im_end|>\n"]
    end = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    row = prepare_row(text_pair("<|im_start|>user", "Hi<|im_end|>\n", "No"), tokenizer)
    assert [(ids.count(end), ids[-1]) for ids in row["response_ids"]] == [(1, end), (1, end)]


def test_responses_that_do_not_end_are_counted(caplog):
    """The templates have no end of turn, or generation markers that exclude it."""
    endless = CHATML.replace("'<|im_end|>\n'", "'\n'")
    unscored = CHATML_WITH_MARKERS.replace(
        "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    for template in (endless, unscored):
        caplog.clear()
        prepare_row(chat_pair(), tiny_tokenizer(template))
        assert "1 row with a response that has no scored end-of-turn token" in caplog.text
    caplog.clear()
    prepare_row(chat_pair(), tiny_tokenizer(CHATML_WITH_MARKERS))
    assert not caplog.text


def test_ids_beyond_the_vocabulary_are_refused():
    tokenizer = tiny_tokenizer()
    row = {"prompt_ids": [7, 8], "chosen_ids": [9, len(tokenizer)], "rejected_ids": [11]}
    with pytest.raises(
        ValueError, match=rf"row 0: `chosen_ids` contains token id {len(tokenizer)}, but the tokenizer has"
    ):
        prepare_row(row, tokenizer)
