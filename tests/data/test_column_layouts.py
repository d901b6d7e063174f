"""Rows with the columns of public datasets and of other trainers become the right prompt, responses and preference.

Each row is compared with the same row in the columns of its format: tokens, masks and example columns are equal.
"""

import ast
import json
from pathlib import Path

import pytest
from datasets import Dataset

from hf_prefopt.data.column_layouts import find_layout
from hf_prefopt.data.layout_table import LAYOUTS
from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.kinds import LISTS, PAIRS, TRIPLES
from tests.data.helpers import ask, reply, say
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
KNOWN = [json.loads(line) for line in Path(__file__).with_name("layouts.jsonl").open(encoding="utf-8")]
WHAT, BLUE, GREEN = "What color is the sky?", "The sky is blue.", "The sky is green, I think."
SIDES = ("chosen", "rejected", "reference", "completion")


def prepare(*rows: dict, **options):
    return prepare_dataset(Dataset.from_list([*rows]), TOKENIZER, max_length=None, **options)


def own_row(means: dict) -> dict:
    """Return the row in the columns of its format that has this meaning."""
    prompt = means["prompt"]
    if "prefix" in means:
        prompt = [*prompt, say("assistant", means["prefix"])]
    if "list" in means:
        numbers = {name: means[name] for name in ("scores", "ranks") if name in means}
        return {"prompt": prompt, "responses": [reply(text) for text in means["list"]], **numbers}
    sides = {side: means[side] if isinstance(prompt, str) else reply(means[side]) for side in SIDES if side in means}
    return {"prompt": prompt, **sides, **({"label": means["label"]} if "label" in means else {})}


def tokens(prepared) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "row" and "score" not in key} for row in prepared]


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case["layout"])
def test_a_known_layout_is_read_as_it_is_meant(case):
    """The rows of one layout are read together. Ties are dropped, and invalid rows raise errors."""
    rows, means = case["rows"], case["means"]
    if all("refuse" in meaning for meaning in means):
        with pytest.raises(ValueError, match=r"(?s)train: .*(merge|convert|do not begin)"):
            prepare(*rows)
        return
    prepared = prepare(*rows, text_as="messages" if means[0].get("either") else "text")
    meant = [meaning for meaning in means if "drop" not in meaning]
    assert len(prepared) == len(meant)
    if "texts" in means[0]:
        texts = [[TOKENIZER.decode(row["prompt_ids"] + ids) for ids in row["response_ids"]] for row in prepared]
        assert texts == [[text + "<|im_end|>" for text in meaning["texts"]] for meaning in meant]
        return
    assert tokens(prepared) == tokens(prepare(*map(own_row, meant)))


PAIR = {"prompt": ask(WHAT), "chosen": reply(BLUE), "rejected": reply(GREEN)}
SWAPPED = {"prompt": ask(WHAT), "chosen": reply(GREEN), "rejected": reply(BLUE)}
TALK = {"chosen": [*ask(WHAT), *reply(BLUE)], "rejected": [*ask(WHAT), *reply(GREEN)]}
SHAREGPT = [{"from": "human", "value": WHAT}]
OTHERS = {
    "nvidia/HelpSteer3": (
        {"context": ask(WHAT), "response1": GREEN, "response2": BLUE, "overall_preference": 3, "domain": "general"},
        PAIR,
    ),
    "stanfordnlp/SHP": (
        {"history": WHAT, "human_ref_A": GREEN, "human_ref_B": BLUE, "labels": 0, "score_A": 3, "score_B": 9},
        PAIR,
    ),
    "lmsys/lmsys-arena-human-preference-55k": (
        {
            "id": 1,
            "model_a": "x",
            "model_b": "y",
            "prompt": json.dumps(["Hi", WHAT]),
            "response_a": json.dumps(["Hello", GREEN]),
            "response_b": json.dumps(["Hello", BLUE]),
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        {**PAIR, "prompt": [*ask("Hi"), *reply("Hello"), *ask(WHAT)]},
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"dataset": "eli5", "id": "x", "full_text": WHAT},
            "answer_0": GREEN,
            "answer_1": BLUE,
            "score_0": -1.0,
            "score_1": 1.0,
        },
        PAIR,
    ),
    "lvwerra/stack-exchange-paired": (
        {"qid": 1, "question": WHAT, "date": "2016/03/31", "response_j": BLUE, "response_k": GREEN},
        PAIR,
    ),
    "prometheus-eval/Preference-Collection": (
        {"orig_instruction": WHAT, "orig_response_A": GREEN, "orig_response_B": BLUE, "orig_preference": "B"},
        PAIR,
    ),
    "tatsu-lab/alpaca_farm": (
        {"instruction": "Answer.", "input": WHAT, "output_1": BLUE, "output_2": GREEN, "preference": 1},
        {**PAIR, "prompt": ask(f"Answer.\n{WHAT}")},
    ),
    "openbmb/UltraInteract_pair": (
        {"trajectory": SHAREGPT, "chosen": BLUE, "rejected": GREEN, "dataset": "x", "id": "1", "parent_id": "0"},
        PAIR,
    ),
    "LLaMA-Factory alpaca ranking": (
        {"system": "Be brief.", "history": [["Hi", "Hello"]], "instruction": WHAT, "input": "", "chosen": BLUE}
        | {"rejected": GREEN},
        {**PAIR, "prompt": [say("system", "Be brief."), *ask("Hi"), *reply("Hello"), *ask(WHAT)]},
    ),
    "LLaMA-Factory alpaca KTO": (
        {"instruction": WHAT, "input": "", "output": BLUE, "kto_tag": True},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "label": True},
    ),
    "ms-swift KTO": (
        {"messages": [*ask(WHAT), *reply(BLUE)], "label": False},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "label": False},
    ),
    "conversations with a quantile": (
        {"messages": [*ask(WHAT), *reply(BLUE)], "quantile": 0.25},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "quantile": 0.25},
    ),
    "responses with a quantile, instruction and input": (
        {"instruction": WHAT, "input": "", "output": BLUE, "quantile": 1},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "quantile": 1.0},
    ),
    "responses with a quantile, question": (
        {"question": WHAT, "response": BLUE, "quantile_reward": 0},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "quantile": 0.0},
    ),
    "ms-swift rejected_messages": ({"messages": TALK["chosen"], "rejected_messages": TALK["rejected"]}, PAIR),
    "axolotl chatml.icr": ({"input": WHAT, "chosen": BLUE, "rejected": GREEN}, PAIR),
    "axolotl chatml.ultra": (
        {"system": "Be brief.", "prompt": WHAT, **TALK},
        {**PAIR, "prompt": [say("system", "Be brief."), *ask(WHAT)]},
    ),
    "conversations and a system prompt": (
        {"system": "Be brief.", **TALK},
        {**PAIR, "prompt": [say("system", "Be brief."), *ask(WHAT)]},
    ),
    "NeMo-RL": (
        {
            "context": ask(WHAT),
            "completions": [{"rank": 1, "completion": reply(GREEN)}, {"rank": 0, "completion": reply(BLUE)}],
        },
        {"prompt": ask(WHAT), "responses": [reply(GREEN), reply(BLUE)], "ranks": [1, 0]},
    ),
    "NeMo-Aligner": ({"prompt": WHAT, "chosen_response": BLUE, "rejected_response": GREEN, "chosen_reward": 4}, PAIR),
    "Gemini": (
        {
            "contents": [{"role": "user", "parts": [{"text": WHAT}]}],
            "completions": [
                {"score": 1.0, "completion": {"role": "model", "parts": [{"text": BLUE}]}},
                {"score": 0.0, "completion": {"role": "model", "parts": [{"text": GREEN}]}},
            ],
        },
        {"prompt": ask(WHAT), "responses": [reply(BLUE), reply(GREEN)], "scores": [1, 0]},
    ),
    "a model that has won": (
        {"question": WHAT, "response_a": GREEN, "response_b": BLUE, "model_a": "llama-2", "model_b": "x-1"}
        | {"winner": "x-1"},
        PAIR,
    ),
    "the text of a winner": ({"prompt": WHAT, "answer1": BLUE, "answer2": GREEN, "winner": "answer1"}, PAIR),
    "the better text": ({"prompt": WHAT, "response_a": GREEN, "response_b": BLUE, "better_response": f"{BLUE} "}, PAIR),
    "a winner by its letter": ({"prompt": WHAT, "answer_a": GREEN, "answer_b": BLUE, "winner": "B"}, PAIR),
    "a number that is a text": ({"prompt": WHAT, "response_1": GREEN, "response_2": BLUE, "preferred": "2"}, PAIR),
    "messages as a struct of lists": (
        {
            "prompt": {"role": ["user"], "content": [WHAT]},
            "chosen": {"role": ["assistant"], "content": [BLUE]},
            "rejected": {"role": ["assistant"], "content": [GREEN]},
        },
        PAIR,
    ),
    "transcripts beside other columns": (
        {
            "question": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {WHAT}\n\nAssistant:",
            "chosen": BLUE,
            "rejected": GREEN,
        },
        {**PAIR, "prompt": [*ask("Hi"), *reply("Hello"), *ask(WHAT)]},
    ),
    "turns of HelpSteer2": (
        {
            "prompt": f"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n{WHAT}",
            "response_1": BLUE,
            "response_2": GREEN,
        }
        | {"preference_strength": -1},
        {**PAIR, "prompt": [*ask("Hi"), *reply("Hello"), *ask(WHAT)]},
    ),
    "a question that its answers repeat": (
        {"question": WHAT, "chosen": f"{WHAT}\n{BLUE}", "rejected": f"{WHAT}\n{GREEN}"},
        PAIR,
    ),
    "lmsys/mt_bench_human_judgments, the first turn": (
        {
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "conversation_a": [*ask(WHAT), *reply(GREEN), *ask("Why?"), *reply("Grass.")],
            "conversation_b": [*ask(WHAT), *reply(BLUE), *ask("Why?"), *reply("Air.")],
            "turn": 1,
        },
        PAIR,
    ),
    "HuggingFaceH4/stack-exchange-preferences": (
        {"qid": 1, "question": WHAT, "answers": [{"pm_score": 0, "text": GREEN}, {"pm_score": 3, "text": BLUE}]},
        {"prompt": ask(WHAT), "responses": [reply(GREEN), reply(BLUE)], "scores": [0, 3]},
    ),
    "a reject": ({"question": WHAT, "chosen": BLUE, "reject": GREEN}, PAIR),
    "a question with an answer that is not to be trained on": (
        {
            "prompt": [*ask("Hi"), {"role": "assistant", "content": "Hello", "weight": 0}, *ask(WHAT)],
            "chosen": [{"role": "assistant", "content": BLUE, "weight": 1}],
            "rejected": GREEN,
        },
        {**PAIR, "prompt": [*ask("Hi"), *reply("Hello"), *ask(WHAT)]},
    ),
    "structs of messages": ({side: {"messages": talk} for side, talk in TALK.items()}, PAIR),
    "the best of two by its column": (
        {"prompt": WHAT, "response_a": GREEN, "response_b": BLUE, "preferred": "response_b"},
        PAIR,
    ),
    "a flag for a label": (
        {"question": WHAT, "response": BLUE, "label": False},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "label": False},
    ),
    "a solution that a test has judged": (
        {"problem": WHAT, "answer": "blue", "generation": BLUE, "is_correct": True},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "label": True},
    ),
    "a row without a prompt": ({"prompt": None, **TALK}, PAIR),
    "one conversation and one answer": ({"prompt": WHAT, "chosen": TALK["chosen"], "rejected": GREEN}, PAIR),
    "roles of other names": (
        {
            "prompt": [say("Human", WHAT)],
            "chosen": [say("model", BLUE)],
            "rejected": [{"speaker": "bot", "text": GREEN}],
        },
        PAIR,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts(name):
    row, meaning = OTHERS[name]
    assert tokens(prepare(row)) == tokens(prepare(meaning))


VERDICTS = {
    "winner": [
        *(("a", 0), ("model_b", 1), ("Response A", 0), ("[[B]]", 1), ("tie", None), ("tie (bothbad)", None)),
        *(("neither", None), ("both_good", None), ("No preference", None), ("Both are bad.", None)),
    ],
    "overall_preference": [(-3, 0), (1, 1), (0, None)],
    "preference": [("response_a", 0), ("B", 1), ("first", 0)],
}


@pytest.mark.parametrize("column", VERDICTS)
def test_what_verdicts_say(column):
    """0: the first response is better. 1: the second response is better. None: a tie, which is not a pair."""
    for value, better in VERDICTS[column]:
        row = {"prompt": WHAT, "response_a": BLUE, "response_b": GREEN, column: value}
        if better is None:
            other = {**row, column: {"overall_preference": 1}.get(column, "a")}
            assert prepare(row, other)["row"][:] == [1]
        else:
            assert tokens(prepare(row)) == tokens(prepare((PAIR, SWAPPED)[better]))


def test_ties_are_counted(caplog):
    row = {"prompt": WHAT, "response_a": BLUE, "response_b": GREEN}
    prepare(*({**row, "winner": winner} for winner in ("tie", "a", "tie", "b")))
    assert "train: 2 ties dropped, because neither response is better" in caplog.text
    with pytest.raises(ValueError, match="none of 1 row is left"):
        prepare({**row, "winner": "tie"})


TWO = {"prompt": WHAT, "response_a": BLUE, "response_b": GREEN}
REFUSED = {
    "a winner that is none": ({**TWO, "winner": "c"}, "`winner` is 'c', which names neither response_a nor response_b"),
    "a number for letters": ({**TWO, "winner": 1}, "`winner` is 1, which names neither"),
    "no winner": ({**TWO, "winner": None, "id": 1}, "`winner` is missing"),
    "a model's name that ends like a letter": ({**TWO, "winner": "llama-a"}, "`winner` is 'llama-a'"),
    "no verdict": (TWO, r"column `winner` is missing .*column_mapping={'winner': '<your column>'}"),
    "two verdicts": ({**TWO, "winner": "a", "preference": "b"}, r"may all name the better response: choose one"),
    "three responses": ({**TWO, "response_c": GREEN, "winner": "a"}, "three or more responses, one of them"),
    "scores that are none": (
        {"prompt": WHAT, "answer_0": BLUE, "answer_1": GREEN, "score_0": 1.0, "score_1": float("nan")},
        "`score_1` is nan, not a number",
    ),
    "another prompt than in the conversations": (
        {"prompt": "Why is it so blue?", **TALK},
        "`prompt` contains 'Why is it so blue.', which is not in the prompt",
    ),
    "another question in one conversation": (
        {"prompt": ask(WHAT), "chosen": [*ask("Why?"), *reply(BLUE)], "rejected": reply(GREEN)},
        "`prompt` contains 'What color",
    ),
    "a conversation with another answer": (
        {"messages": [*ask(WHAT), *reply("Red.")], "chosen": BLUE, "rejected": GREEN},
        "`messages` ends with an answer that is none of the responses",
    ),
    "a rendered prompt in a conversation": (
        {"question": "<|im_start|>user\nHi", "chosen": BLUE, "rejected": GREEN},
        "`question` is already rendered by a chat template",
    ),
    "another system prompt": (
        {**PAIR, "prompt": [say("system", "Be kind."), *ask()], "system": "Be brief."},
        "`system` differs from the system prompt",
    ),
    "a label of another kind": (
        {"prompt": WHAT, "completion": BLUE, "label": 2},
        "`label` is 2; make it true",
    ),
    "a quantile above 1": (
        {"prompt": WHAT, "completion": BLUE, "quantile": 1.5},
        "`quantile` is 1.5; set it to the share of the reference's responses",
    ),
    "a label for a winner": (
        {"prompt": WHAT, "response_0": BLUE, "response_1": GREEN, "label": 1},
        "`label` is of type int and should be text such as 'A'",
    ),
    "ranks against scores": (
        {"prompt": WHAT, "responses": [BLUE, GREEN], "ranks": [1, 2], "scores": [0.0, 1.0]},
        "`ranks` order the responses differently than `scores`",
    ),
    "ranks against scores in structs": (
        {
            "prompt": WHAT,
            "answers": [{"text": BLUE, "rank": 1, "score": 0.0}, {"text": GREEN, "rank": 2, "score": 1.0}],
        },
        "order the responses differently",
    ),
    "tools beside text": (
        {"prompt": WHAT, "chosen": BLUE, "rejected": GREEN, "tools": [{"name": "f"}]},
        "`tools` require messages",
    ),
    "a call of a function": (
        {"conversations": [*SHAREGPT, {"from": "function_call", "value": "{}"}], "chosen": BLUE, "rejected": GREEN},
        "`conversations` has an unknown speaker 'function_call' in message 1",
    ),
    "turns for responses": (
        {"prompt": WHAT, "chosen": [WHAT, BLUE], "rejected": [WHAT, GREEN]},
        "`chosen` contains the prompt: these are turns",
    ),
    "other names": (
        {"prompt": WHAT, "pos": BLUE, "neg": GREEN},
        r"Did you mean pos, neg\? Then pass column_mapping={'chosen': 'pos', 'rejected': 'neg'}",
    ),
    "a struct that says more": (
        {"input": {"messages": ask(WHAT), "instructions": "Be brief."}, "preferred_output": reply(BLUE)}
        | {"non_preferred_output": reply(GREEN)},
        "`input` has 'instructions' in addition to its text",
    ),
    "a question within the replies": (
        {"prompt": WHAT, "chosen": [*reply("Hi"), *ask(WHAT), *reply(BLUE)], "rejected": reply(GREEN)},
        "`chosen` repeats the end of `prompt` after other messages",
    ),
    "a speaker that nobody knows": (
        {"chosen": [say("critic", WHAT), *reply(BLUE)], "rejected": [*ask(WHAT), *reply(GREEN)]},
        "`chosen` begins with role 'critic', but another response begins with the assistant",
    ),
    "one more question in a conversation": (
        {"chosen": TALK["chosen"], "rejected": [*ask(WHAT), *ask("Really?"), *reply(GREEN)]},
        "`rejected` begins with role 'user', but another response begins with the assistant",
    ),
    "a tool's result in one reply": (
        {**PAIR, "chosen": [say("tool", "42"), *reply(BLUE)]},
        "`chosen` begins with role 'tool', but another response begins with the assistant",
    ),
    "a struct": ({**PAIR, "chosen": {"words": BLUE}}, "`chosen` is a struct of 'words' and not a message"),
    "a comparison by an index": (
        {"info": {"post": WHAT}, "summaries": [{"text": BLUE}, {"text": GREEN}], "choice": 0},
        "columns `summaries`, `choice`: `choice` may be the index of the better response in `summaries`: make",
    ),
    "an answer that is not to be trained on": (
        {**PAIR, "chosen": [{"role": "assistant", "content": "Hm.", "weight": 0}, *ask("So?"), *reply(BLUE)]},
        "`chosen` has an answer marked as not trained on .weight=0.*move it to the prompt",
    ),
    "an answer without a loss": (
        {**PAIR, "rejected": [{"role": "assistant", "content": GREEN, "train": False}]},
        "`rejected` has an answer marked as not trained on .train=False.",
    ),
    "a place in a list": (
        {"prompt": WHAT, "candidates": [BLUE, GREEN], "best": 1},
        r"columns `candidates`, `best`: .*row\['candidates'\]\[1 - row\['best'\]\]",
    ),
    "an export of Label Studio": ({"data": {"prompt": WHAT}, "annotations": [], "id": 1}, "exported by Label Studio"),
    "another separator": ({"prompt;chosen;rejected": "a;b;c"}, "the file seems to be separated by ';'"),
    "a prompt in a list": ({"prompt": [WHAT], "chosen": BLUE, "rejected": GREEN}, "`prompt` is a list of texts"),
    "a number for a flag": ({"question": WHAT, "response": BLUE, "is_correct": 3}, "column `desirable` is missing"),
    "letters for responses": (
        {**TWO, "chosen": "a", "rejected": "b"},
        "`chosen` is 'a', but `response_a` and `response_b` contain other texts; .*column_mapping={'winner': 'chosen'}",
    ),
    "columns for responses": (
        {**TWO, "better": "response_b", "worse": "response_a"},
        "`better` is 'response_b', .*column_mapping={'winner': 'better'}",
    ),
    "models for responses": (
        {"prompt": WHAT, "chosen": "GPT 4", "rejected": "x-1", "chosen_response": BLUE, "rejected_response": GREEN},
        r"`chosen` is 'GPT 4', .* contain other texts; .*remove_columns=\['chosen', 'rejected'\]",
    ),
    "a turn that was not": (
        {"conversation_a": TALK["chosen"], "conversation_b": TALK["rejected"], "winner": "a", "turn": 2},
        "`turn` is 2, but the conversation has 1 user messages",
    ),
    "two texts in a struct": (
        {"prompt": WHAT, "completions": [{"answer": "blue", "text": BLUE, "score": 1}, {"answer": "no", "score": 0}]},
        "`completions` have 'answer' and 'text', and either may be the text",
    ),
    "two scores in a struct": (
        {
            "prompt": WHAT,
            "answers": [{"text": BLUE, "score": 1, "rating": 1}, {"text": GREEN, "score": 0, "rating": 5}],
        },
        "`answers` have 'score' and 'rating', and either may be the score",
    ),
    "an unknown rating": ({"prompt": WHAT, "response": BLUE, "score": 3}, "single responses with a rating"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_fix(name):
    row, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        prepare(row)


SPELLINGS = [("Prompt", "Chosen", "Rejected"), ("\ufeffprompt", "Chosen Response", "Rejected Response")]
SPELLINGS += [("userPrompt", "chosenResponse", "rejectedResponse"), ("prompt ", "response-chosen", "response-rejected")]


@pytest.mark.parametrize("names", SPELLINGS)
def test_the_mapping_that_is_said_for_other_spellings_works(names):
    row = dict(zip(names, (WHAT, BLUE, GREEN), strict=True))
    with pytest.raises(ValueError, match="under other spellings: column_mapping=") as caught:
        prepare(row)
    mapping = ast.literal_eval(str(caught.value).split("column_mapping=")[1])
    assert tokens(prepare(row, column_mapping=mapping, text_as="messages")) == tokens(prepare(PAIR))


def test_what_fixes_letters_for_responses():
    row = {**TWO, "chosen": "b", "rejected": "a"}
    assert tokens(prepare(row, column_mapping={"winner": "chosen"})) == tokens(prepare(SWAPPED))


def test_short_answers_that_stand_in_other_columns_too():
    row = {"prompt": WHAT, "response_1": "Blue", "response_2": "Green", "chosen": "Blue", "rejected": "Green"}
    assert len(prepare(row)) == 1


SCALES = {
    "a scale without a sign": (
        "overall_preference",
        [1, 7],
        "from 1 to 7, but it is read by sign: below 0,.* row['overall_preference'] - 4",
    ),
    "a short scale without a sign": (
        "preference_strength",
        [1, 2, 3] * 6,
        "from 1 to 3, but it is read by sign: below 0",
    ),
    "places that count from 0": ("preference", [0, 1], "contains 0 and 1, and the responses are `response_1` and"),
}


@pytest.mark.parametrize("name", SCALES)
def test_numbers_that_mean_something_else_are_refused(name):
    """All rows decide together. A short scale is only recognized in 16 rows: fewer
    may prefer the second response by chance.
    """
    column, values, message = SCALES[name]
    rows = [{"prompt": WHAT, "response_1": BLUE, "response_2": GREEN, column: value} for value in values]
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        prepare(*rows, on_bad_rows="drop")


def test_a_scale_of_a_stream_is_refused_once_many_rows_are_read():
    rows = [
        {"prompt": WHAT, "response_1": BLUE, "response_2": GREEN, "overall_preference": 1 + at % 7} for at in range(16)
    ]
    with pytest.raises(ValueError, match="contains numbers from 1 to 7, but it is read by sign: below 0"):
        list(prepare_dataset(Dataset.from_list(rows).to_iterable_dataset(), TOKENIZER))
    rows[3]["overall_preference"] = -1
    assert len(list(prepare_dataset(Dataset.from_list(rows).to_iterable_dataset(), TOKENIZER))) == 16


def test_numbers_that_mean_what_they_say():
    rows = [{"prompt": WHAT, "response_1": BLUE, "response_2": GREEN} for _ in range(16)]
    signed = [{**row, "overall_preference": (3, -1)[at == 7]} for at, row in enumerate(rows)]
    assert len(prepare(*signed)) == 16
    assert len(prepare(*({**row, "preference": 1 + (at > 3)} for at, row in enumerate(rows)))) == 16


def test_the_kind_that_is_wanted_decides_between_two_layouts():
    sample = {**PAIR, "reference": reply(BLUE), "generations": [BLUE, GREEN], "rating": [5.0, 1.0]}
    assert [find_layout(sample, kind).format.kind for kind in (None, PAIRS, TRIPLES, LISTS)] == [
        *(PAIRS, PAIRS, TRIPLES, LISTS)
    ]


def test_names_of_layouts_are_unique():
    """Worker processes identify a layout by its name."""
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


LABELS = [(True, False), (1, 0), (1.0, 0.0), (1, -1), ("true", "false"), ("chosen", "rejected"), ("Good", "bad")]


@pytest.mark.parametrize("values", LABELS, ids=str)
def test_labels_in_every_spelling(values):
    rows = [{"prompt": WHAT, "completion": BLUE, "label": value} for value in values]
    assert prepare(*rows)["labels"][:] == [[True], [False]]
