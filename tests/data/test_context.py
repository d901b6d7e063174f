"""Columns other than prompt and responses: context raises an error, and columns that only describe the row do not."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from hf_prefopt.data.prepare import prepare_dataset
from tests.data.helpers import ask, chat_pair, reply, say, text_pair
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WHAT = "What is the capital of France?"
ANSWERS = {"chosen": "It is Paris.", "rejected": "It is Rome."}
TALK = {"chosen": [*ask(), *reply("Paris.")], "rejected": [*ask(), *reply("Rome.")]}

# Columns of well-known datasets, with prompt and responses already in a known format, and those of the columns that
# raise an error.
HUB = {
    "Intel/orca_dpo_pairs": ({"system": "Be brief.", "question": WHAT, **ANSWERS}, []),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {
            "system": "",
            "input": WHAT,
            **ANSWERS,
            "generations": ["It is Paris.", "It is Rome."],
            "order": ["chosen", "rejected"],
            "labelling_model": "gpt-4-1106-preview",
            "labelling_prompt": [say("user", "Which of these two answers is the better one, and why?")],
            "raw_labeling_response": "9 8.5\n\nThe first answer is right and to the point.",
            "rating": [9.0, 8.5],
            "rationale": "The first answer is right and to the point.",
            "status": "unchanged",
            "original_chosen": "It is Paris, the capital.",
            "chosen_score": 9.0,
            "in_gsm8k_train": False,
        },
        [],
    ),
    "LLaMA-Factory alpaca": ({"instruction": "Name it.", "input": "France", **ANSWERS}, []),
    "LLaMA-Factory alpaca with history": (
        {**text_pair(), "instruction": "The capital of France is", "history": [["Hello?", "Hi."]], "system": ""},
        [],
    ),
    "jondurbin/truthy-dpo": ({**text_pair(), "id": "1", "source": "t", "system": "Speak like a pirate."}, []),
    "jondurbin/py-dpo": ({**text_pair(), "id": "8e5f8bd4"}, []),
    "xinlai/Math-Step-DPO-10K": (
        {
            **text_pair(),
            "dataset": "math_step",
            "initial_reason_steps": "Step 1:",
            "full_chosen": "Step 1: Paris is the capital, so it is Paris.",
            "full_rejected": "Step 1: Rome is the capital, so it is Rome.",
            "answer": "Paris is the capital of it.",
        },
        [],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {**TALK, "prompt_id": "f0e37e9f7800261167ce91143f98f511", "messages": TALK["chosen"], "score_chosen": 8.5},
        [],
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {
            **TALK,
            "source": "Dove",
            "conversation": [{"input": WHAT, "output": "Lyon, I believe, or some other large town."}],
            "original_response": "Lyon, I believe, or some other large town.",
            "generation_prompt": ["<|im_start|>user Answer the question of the user."],
            "raw_generation_responses": ["It is a town that is called Paris."],
            "new_generations": ["It is a town that is called Paris."],
            "rating_chosen": 5,
            "chosen_model": "argilla/notus-7b-v1",
        },
        [],
    ),
    "mlabonne/orpo-dpo-mix-40k": ({**TALK, "source": "Airoboros", "question": WHAT}, []),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {**TALK, "source": "evol_instruct", "chosen-rating": 5.0, "chosen-model": "gpt-4", "rejected-model": "llama"},
        [],
    ),
    "snorkelai/Snorkel-Mistral-PairRM-DPO": (
        {**TALK, "prompt_id": "x", "all_generated_responses": ["It is Paris of course."], "all_rm_scores": [1.0]},
        [],
    ),
    "Skywork/Skywork-Reward-Preference-80K": ({**TALK, "source": "magpie_pro_llama3.1"}, []),
    "allenai/tulu-3-pref-personas": ({**TALK, "id": "p_1", "constraints": ["keywords:frequency"]}, []),
    "Dahoas/full-hh-rlhf": ({**text_pair(), "response": " Paris."}, []),
    "allenai/reward-bench": ({**text_pair(), "chosen_model": "GPT-4 Turbo", "subset": "alpacaeval-easy", "id": 3}, []),
    "stanfordnlp/SHP": (
        {**text_pair(), "history": "The capital of France is", "post_id": "qt3nxl", "domain": "askculinary_train"},
        [],
    ),
    "nvidia/HelpSteer2": (
        {
            **text_pair(),
            "split": "train",
            "preference_statement": "Response 1 is slightly better than Response 2.",
            "preference_elaboration": "Response 1 names the right town, and 2 does not.",
        },
        [],
    ),
    "lvwerra/stack-exchange-paired": (
        {**text_pair(), "qid": 7, "date": "2016/03/31", "metadata": ["https://cooking.stackexchange.com/questions/7"]},
        [],
    ),
    "tasksource/oasst1_pairwise": ({**text_pair(), "lang": "en", "parent_id": "9f1a-22"}, []),
    "a set with passages": ({**text_pair(), "passage": "Be brief.", "hint": "It is large."}, ["passage", "hint"]),
    "a set with a template": ({"instruction": "Name it.", "input": "x", **text_pair()}, ["instruction", "input"]),
    "a set of the recipes": ({**TALK, "annotators": [1, 2], "tie": False, "problem_id": 3}, []),
}
METADATA = {
    "has_system": "yes",
    "is_question": "no",
    "n_shot": "0-shot",
    "num_turns_of_dialogue": "three turns",
    "steps": "120",
    "criteria": "Is the response helpful, honest and free of any harm to others?",
    "orig_rubric": "Score 1: wrong. Score 5: right.",
    "principle": "Choose the response that is less harmful.",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "url": "https://example.org/what is/the capital of/france?",
    "timestamp": "Mon, 3 Jan 2024 10:22:33 GMT",
    "category": "General knowledge, geography and travel",
    "prompt_source": "Anthropic's helpful base data, first part",
    "question_type": "open question with one answer",
    "systemVersion": "2.1",
    "language": "English (United Kingdom)",
    "license": "Creative Commons Attribution 4.0 International, see the page.",
    "annotator_comments": "I liked the first one better. It is right.",
    "judge_prompt": "You are a fair judge of two answers.",
    "generated_text": "It is Paris, of course, what else.",
    "response_1": "It is Paris, of course, what else.",
    "explanation": "Paris is the seat of the government.",
    "tags": ["geography", "easy"],
    "nothing": None,
    "topic": "towns",
    "metadata": {"prompt": "Something else that stood in a template.", "temperature": 0.7},
    "turns": 2,
}
# Names that are not in the module's lists, with prose as values.
CONTEXT = {
    "question": "?",
    "userQuery": "2+2",
    "systemprompt": "You are a pirate.",
    "sys_msg": "You are a pirate.",
    "input_text": "Spain",
    "prompt_2": "And Italy?",
    "context-1": "Rome.",
    "Context": "Paris lies on the Seine.",
    "messages": [say("user", "And Italy?"), say("assistant", "Rome.")],
    "conversations": [{"from": "human", "value": "And Italy?"}, {"from": "gpt", "value": "Rome."}],
    "dialogue": ["Hello?", "Hi."],
    "few_shot_examples": ["Italy: Rome.", "Spain: Madrid."],
    "paragraph": "Paris lies on the Seine. It is large.",
    "knowledge_base_entry": "Paris lies on the Seine",
    "scenario": "in a pub",
    "lead_in": "Two people meet in a pub at night",
    "options": ["Paris", "Rome"],
    "source": "Paris is a city on the Seine. " * 5,
    "问题": "法国的首都是哪里？请用一个词回答。",
    "extra_info": {"question": "And Italy?"},
    "table": [["country", "capital"], ["France", "Paris"]],
    "facts": ["Paris is big", "Rome is old"],
    "concepts": ["dog", "run"],
    "hint": "use recursion",
    "code": "def f(x):\n    return x + 1",
    "schema": "t(a int, b int)",
    "source_text": "Once upon a time there was a king.",
    "topic": "Paris lies there.",
}


def prepare(row: dict, **options):
    return prepare_dataset(Dataset.from_list([row, row]), TOKENIZER, max_length=None, **options)


@pytest.mark.parametrize("name", HUB)
def test_well_known_sets(name):
    row, refused = HUB[name]
    if not refused:
        assert len(prepare(row)) == 2
        return
    with pytest.raises(ValueError, match="train: 2 of 2 rows cannot be used") as caught:
        prepare(row)
    said = str(caught.value)
    assert f"row 0: `{refused[0]}` contains" in said and f"remove_columns={refused}" in said


@pytest.mark.parametrize("column", CONTEXT)
def test_context_that_nobody_reads_is_refused(column):
    with pytest.raises(ValueError, match=rf"row 0: `{column}` contains .*join it into `prompt`"):
        prepare({**text_pair(), column: CONTEXT[column]})


@pytest.mark.parametrize("column", [name for name in CONTEXT if name not in ("question", "messages", "conversations")])
def test_context_is_refused_without_a_prompt_too(column):
    """If there is no prompt, the column `question`, `messages` or `conversations` becomes the prompt."""
    with pytest.raises(ValueError, match=rf"row 0: `{column}` contains .*join it into `prompt`"):
        prepare({**ANSWERS, column: CONTEXT[column]})


@pytest.mark.parametrize("column", METADATA)
def test_what_is_about_the_row_is_left_aside(column):
    assert len(prepare({**text_pair(), column: METADATA[column]})) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The capital of France is", "completion": " Paris.", "label": True},
        {"prompt": "The capital of France is", "responses": [" Paris.", " Rome."], "scores": [1.0, 0.0]},
        {"prompt": "The capital of France is", "responses": [" Paris.", " Rome."], "ranks": [1, 2]},
        chat_pair(),
    ],
    ids=["unpaired", "scored", "ranked", "messages"],
)
def test_rows_of_every_kind_are_looked_at(row):
    with pytest.raises(ValueError, match=r"row 1: `preprompt` contains 'Be brief\.'"):
        prepare_dataset(Dataset.from_list([{**row, "preprompt": None}, {**row, "preprompt": "Be brief."}]), TOKENIZER)
    assert len(prepare({**row, "preprompt": " \n"})) == 2


def test_what_the_row_says_already_may_be_said_twice():
    """A column may repeat a text of the prompt or a response (as text, messages or blocks, with any white space)."""
    talk = [say("system", "Be  brief."), *ask()]
    row = {**chat_pair(prompt=talk), "preprompt": "Be brief.\n", "question": [{"type": "text", "text": WHAT}]}
    row["messages"] = [*talk, *reply("Lyon.")]  # this answer differs
    assert len(prepare(row)) == 2
    assert len(prepare({**text_pair(), "question": "The capital\nof France is"})) == 2
    assert len(prepare({**text_pair(), "whole": "The capital of France is Paris."})) == 2


def test_what_one_response_says_is_no_context_of_the_other():
    with pytest.raises(ValueError, match=r"`options` contains 'Paris'"):
        prepare({**text_pair(), "options": ["Paris", "Rome"]})
    with pytest.raises(ValueError, match="`query` contains"):
        prepare({"prompt": "Say it.", "query": WHAT, "chosen": f"It is Paris. {WHAT}", "rejected": "It is Rome."})


PARTS = {
    "reasoning": "The question is about France.",
    "thinking": "France.",
    "tool_calls": '[{"name": "look_up"}]',
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_one_response_in_a_column_of_its_own_is_refused(part):
    columns = {f"chosen_{part}": PARTS[part], f"rejected_{part}": ""}
    with pytest.raises(ValueError, match=rf"`chosen_{part}` contains .*join it into the response; .*remove_columns"):
        prepare({**text_pair(), **columns})
    assert len(prepare({**text_pair(chosen=f" {PARTS[part]} Paris."), **columns})) == 2
    assert len(prepare({**text_pair(), f"judge_{part}": PARTS[part]})) == 2


def test_an_earlier_answer_of_a_history_is_context():
    earlier = [*ask("Hello?"), *reply("Bonjour."), *ask()]
    with pytest.raises(ValueError, match=r"`dialog` contains 'Hello\?'"):
        prepare({**chat_pair(), "dialog": earlier})
    with pytest.raises(ValueError, match=r"`dialog` contains 'Bonjour\.'"):
        prepare({**chat_pair(prompt=[*ask("Hello?"), *ask()]), "dialog": earlier})


def test_tools_are_read_beside_messages():
    tools = [{"type": "function", "function": {"name": "search", "description": "Looks things up."}}]
    assert len(prepare({**chat_pair(), "tools": tools})) == 2


def test_tokens_are_taken_as_they_are():
    row = {"prompt_ids": [7, 8], "chosen_ids": [9, 10], "rejected_ids": [11], "question": WHAT}
    assert len(prepare(row)) == 2


def test_one_row_of_many_is_found_by_its_number():
    rows = Dataset.from_list([{**text_pair(), "preprompt": ""}] * 3000 + [{**text_pair(), "preprompt": "Be brief."}])
    with pytest.raises(ValueError, match="1 of 3,001 rows cannot be used\n  row 3,000: `preprompt` contains"):
        prepare_dataset(rows, TOKENIZER)
    assert len(prepare_dataset(rows, TOKENIZER, on_bad_rows="drop")) == 3000
    assert len(prepare_dataset(rows.remove_columns("preprompt"), TOKENIZER)) == 3001


def test_a_stream_is_refused_at_the_row():
    rows = Dataset.from_list([{**text_pair(), "preprompt": ""}] * 2 + [{**text_pair(), "preprompt": "Be brief."}])
    stream = iter(prepare_dataset(rows.to_iterable_dataset(), TOKENIZER))
    assert [next(stream)["row"], next(stream)["row"]] == [0, 1]
    with pytest.raises(ValueError, match="train: row 2: `preprompt` contains"):
        next(stream)


def test_a_set_all_of_which_is_dropped_says_why():
    with pytest.raises(ValueError, match=r"train: none of 2 rows is left(.|\n)*row 0: `preprompt` contains"):
        prepare({**text_pair(), "preprompt": "Be brief."}, on_bad_rows="drop")


# Such ids belong to another tokenizer.
RECIPES = [
    file
    for file in sorted((Path(__file__).parents[2] / "recipes/data").glob("*/test.jsonl.gz"))
    if not file.parent.name.endswith("_tokens")
]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.parent.name)
def test_the_sets_of_the_recipes_have_no_unread_context(file):
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()[:50]]
    assert len(prepare_dataset(Dataset.from_list(rows), TOKENIZER, max_length=None)) == len(rows)
