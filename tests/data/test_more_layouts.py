"""Layouts of public datasets and annotation tools: the rows that they are converted to, or the error and its fix."""

import json
import logging

import pytest
from datasets import Dataset

from hf_prefopt.data.files import load_splits
from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.data.sources import as_dataset
from hf_prefopt.kinds import LISTS, PAIRS
from tests.data.helpers import ask, chat_pair, reply, say
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WHAT, BLUE, GREEN = "What color is the sky?", "The sky is blue.", "The sky is green, I think."


def prepare(*rows: dict, **options):
    return prepare_dataset(as_dataset([*rows], "train"), TOKENIZER, max_length=None, **options)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="hf_prefopt")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_prefopt")]


def tokens(prepared) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "row" and "score" not in key} for row in prepared]


PAIR = {"prompt": ask(WHAT), "chosen": reply(BLUE), "rejected": reply(GREEN)}
SWAPPED = {**PAIR, "chosen": reply(GREEN), "rejected": reply(BLUE)}
TWO = {"prompt": WHAT, "response_a": BLUE, "response_b": GREEN}
TALKS = {"conversation_a": [*ask(WHAT), *reply(BLUE)], "conversation_b": [*ask(WHAT), *reply(GREEN)]}
BRIEF = {**PAIR, "prompt": [say("system", "Be brief."), *ask(WHAT)]}
LIST = {"prompt": ask(WHAT), "responses": [reply(BLUE), reply(GREEN), reply("Red.")]}
SUBMITTED = {"preference.responses.users": ["x", "y", "z"]}
ARENA = {
    side: [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALKS[side]]
    for side in TALKS
}
TWO_TEXTS = {"prompt": WHAT, "chosen": BLUE, "rejected": GREEN}
READ = {
    "a chosen response and several rejected ones": (
        {"prompt": WHAT, "chosen": BLUE, "rejected": [GREEN, "Red."]},
        {**LIST, "ranks": [1, 2, 2]},
    ),
    "several chosen responses and a rejected one": (
        {"prompt": WHAT, "chosen_responses": [BLUE, GREEN], "rejected_response": "Red."},
        {**LIST, "ranks": [1, 1, 2]},
    ),
    "allenai/reward-bench-2": (
        {"id": "1", "prompt": WHAT, "chosen": [BLUE], "rejected": [GREEN, "Red."], "num_correct": 1, "subset": "Math"},
        {**LIST, "ranks": [1, 2, 2]},
    ),
    "Argilla": (
        {**TWO, "preference.responses": ["response_a", "response_b", "response_a"], **SUBMITTED},
        PAIR,
    ),
    "Argilla, one of three discarded": (
        {
            **TWO,
            "preference.responses": ["response_a", "response_b", "response_a"],
            "preference.responses.status": ["discarded", "submitted", "discarded"],
        },
        SWAPPED,
    ),
    "votes of annotators": ({**TWO, "votes": ["b", "tie", "B", "a"]}, SWAPPED),
    "numbers of votes": ({**TWO, "votes_a": 3, "votes_b": 5}, SWAPPED),
    "text in structs": (
        {"prompt": {"text": WHAT}, "chosen": {"text": BLUE}, "rejected": {"text": GREEN}},
        {"prompt": WHAT, "chosen": BLUE, "rejected": GREEN},
    ),
    "a system prompt beside conversations": ({"system": "Be brief.", **TALKS, "winner": "model_a"}, BRIEF),
    "a system prompt beside lists of turns": (
        {"system": "Be brief.", "prompt": [WHAT], "response_a": [BLUE], "response_b": [GREEN], "winner": "a"},
        BRIEF,
    ),
    "lmarena-ai/arena-human-preference-140k": (
        {
            **ARENA,
            **{"model_a": "x", "model_b": "y", "winner": "model_a", "evaluation_order": 1, "language": "en"},
            "full_conversation": [
                {
                    "user": ARENA["conversation_a"][0],
                    "model_side_a": ARENA["conversation_a"][1],
                    "model_side_b": ARENA["conversation_b"][1],
                }
            ],
        },
        PAIR,
    ),
    "lmarena-ai/PPE-Human-Preference-V1": (
        {"prompt": WHAT, "response_1": GREEN, "response_2": BLUE, "model_a": "x", "model_b": "y", "winner": "model_b"},
        PAIR,
    ),
    "left and right": ({"prompt": WHAT, "left": GREEN, "right": BLUE, "winner": "right"}, PAIR),
    "a left and a right response": (
        {"prompt": WHAT, "left_response": BLUE, "right_response": GREEN, "preference": "left"},
        PAIR,
    ),
    "the first and the second response": (
        {"prompt": WHAT, "first_response": GREEN, "second_response": BLUE, "better": "second"},
        PAIR,
    ),
    "ScalerLab/JudgeBench": ({"question": WHAT, "response_A": GREEN, "response_B": BLUE, "label": "B>A"}, PAIR),
    "a comparison": ({**TWO, "winner": "[[A>>B]]"}, PAIR),
    "a comparison the other way": ({**TWO, "winner": "model_a < model_b"}, SWAPPED),
    "scales as text": ({"prompt": WHAT, "response_1": BLUE, "response_2": GREEN, "overall_preference": "-2"}, PAIR),
    "scores as text": ({"question": WHAT, "answer_0": GREEN, "answer_1": BLUE, "score_0": "8", "score_1": "9.5"}, PAIR),
    "lists as JSON": (
        {"prompt": WHAT, "completions": json.dumps([BLUE, GREEN, "Red."]), "rewards": json.dumps([3, 2, 1])},
        {**LIST, "scores": [3, 2, 1]},
    ),
    "numbers of a list as text": ({**LIST, "scores": ["3", "2.5", "1e-1"]}, {**LIST, "scores": [3, 2.5, 0.1]}),
    "open-r1/OpenR1-Math": (
        {"problem": WHAT, "answer": "blue", "generations": [BLUE, GREEN], "correctness_math_verify": [True, False]},
        {"prompt": ask(WHAT), "responses": [reply(BLUE), reply(GREEN)], "scores": [1, 0]},
    ),
    "code that is right and code that is wrong": (
        {"problem": WHAT, "correct_solution": BLUE, "incorrect_solution": GREEN},
        PAIR,
    ),
    "accept and reject": ({"query": WHAT, "accept": BLUE, "reject": GREEN}, PAIR),
    "a like": (
        {"question": WHAT, "answer": BLUE, "liked": False},
        {"prompt": ask(WHAT), "completion": reply(BLUE), "label": False},
    ),
    "thumbs": (
        {"prompt": WHAT, "completion": BLUE, "label": "👍"},
        {"prompt": WHAT, "completion": BLUE, "label": True},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_row_means_what_it_says(name):
    row, meaning = READ[name]
    assert tokens(prepare(row)) == tokens(prepare(meaning))


def test_the_judges_prompt_is_not_the_prompt():
    """In the datasets of Prometheus, `instruction` is the judge's prompt, and
    `orig_instruction` is the models' prompt.
    """
    row = {"orig_instruction": WHAT, "orig_response_A": BLUE, "orig_response_B": GREEN, "orig_preference": "A"}
    with pytest.raises(ValueError, match=r"`instruction` contains 'Judge these.*remove_columns=\['instruction'\]"):
        prepare({**row, "instruction": "Judge these answers.", "output": "A"})
    asked = {**row, "instruction": "Judge these answers.", "output": "A"}
    assert tokens(prepare(asked, remove_columns=["instruction"])) == tokens(prepare(PAIR))


REFUSED = {
    "as many votes for one as for the other": (
        {**TWO, "votes": ["a", "b"]},
        "none of 1 row is left\n  1 tie dropped",
    ),
    "a vote for nobody": ({**TWO, "votes": ["a", "c"]}, "`votes` is 'c', which names neither"),
    "votes and statuses of different length": (
        {**TWO, "preference.responses": ["a"], "preference.responses.status": ["submitted", "submitted"]},
        "`preference.responses` has 1 verdicts, but there are 2 statuses",
    ),
    "no vote that is submitted": (
        {**TWO, "preference.responses": ["a"], "preference.responses.status": ["draft"]},
        "`preference.responses` is not a list of verdicts",
    ),
    "a label beside a winner": (
        {**TWO, "winner": "a", "label": "B"},
        "columns `winner`, `label` may all name the better response",
    ),
    "a number for a label": (
        {"input": WHAT, "output_1": BLUE, "output_2": GREEN, "label": 1},
        "`label` is of type int and should be text .*column_mapping={'winner': 'label'}",
    ),
    "a flag for a winner": ({**TWO, "preferred": True}, "names no response; write 'response_a' or 'response_b'"),
    "a comparison of one with itself": ({**TWO, "winner": "A>A"}, "`winner` is 'A>A', which names neither"),
    "three responses with scores": (
        {"prompt": WHAT, "response_0": BLUE, "response_1": GREEN, "response_2": "Red.", "score_0": 3},
        "three or more responses, one of them `response_2`: convert the rows to lists",
    ),
    "a struct of text and more": (
        {**PAIR, "chosen": {"text": BLUE, "style": "brief"}},
        r"`chosen` is a struct of 'text', 'style' .*lambda row: {'chosen': row\['chosen'\]\['text'\]}",
    ),
    "messages in JSON in JSON": (
        {"prompt": json.dumps(json.dumps(ask(WHAT))), "chosen": BLUE, "rejected": GREEN},
        "`prompt` contains messages written as text",
    ),
    "thinking beside an answer": (
        {"prompt": WHAT, "completion": BLUE, "label": True, "reasoning_content": "It scatters."},
        "`reasoning_content` contains 'It scatters.*join it into the response",
    ),
    "reasoning beside a pair": (
        {**PAIR, "reasoning": "Light scatters in the air above us."},
        "`reasoning` contains .*join it into the response; if it should not be trained on: remove_columns",
    ),
    "thinking of each side": (
        {**PAIR, "think_chosen": "It scatters.", "think_rejected": "Grass."},
        r"remove_columns=\['think_chosen', 'think_rejected'\]",
    ),
    "steps of a response": (
        {"prompt": WHAT, "completions": ["It is", "blue."], "labels": [True, False]},
        "columns `completions`, `labels`: these seem to be the steps of one response",
    ),
    "a label of nothing": ({"question": WHAT, "label": "blue"}, "column `completion` is missing"),
    "a number for a flag": (
        {"prompt": WHAT, "response": BLUE, "label": 1},
        "`label` is of type int and should be true or false",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_fix(name):
    row, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        prepare(row)


def test_a_judges_words_are_no_thinking_of_the_model():
    row = {
        **PAIR,
        "judge_reasoning": "It is right about the sky.",
        "votes": [{"reasoning": "It is right.", "score": 1}],
    }
    assert len(prepare(row)) == 1


def test_scores_against_a_verdict_are_counted(said):
    scored = {**TWO, "score_a": 1, "score_b": 5}
    prepare({**scored, "winner": "a"}, {**scored, "winner": "b"}, {**scored, "winner": "a", "score_a": None})
    assert said()[-1] == "train: 1 pair kept although the chosen response has the lower score"
    prepare({"history": WHAT, "human_ref_A": BLUE, "human_ref_B": GREEN, "labels": 1, "score_A": 2, "score_B": 9})
    assert said()[-1] == "train: 1 pair kept although the chosen response has the lower score"


def test_a_scale_that_is_never_below_zero_is_said(said):
    rows = [{"prompt": WHAT, "response_1": BLUE, "response_2": GREEN, "overall_preference": n} for n in (1, 3)]
    prepare(*rows)
    line = "is 1, 3 in the first 2 rows: positive numbers prefer `response_2`, and only negative"
    assert line in said()[-1]
    prepare(*rows, {**rows[0], "overall_preference": -1})
    assert "in the first" not in said()[-1]


def test_lists_of_one_response_are_pairs_for_losses_of_pairs():
    row = {"prompt": WHAT, "chosen": [BLUE], "rejected": [GREEN]}
    assert tokens(prepare(row, kind=PAIRS)) == tokens(prepare(PAIR))
    assert prepare(row, kind=LISTS)["ranks"][:] == prepare(row)["ranks"][:] == [[1.0, 2.0]]
    with pytest.raises(ValueError, match="`rejected` holds 2 responses, but a loss of pairs compares two"):
        prepare(row, {**row, "rejected": [GREEN, "Red."]}, kind=PAIRS)


def test_arguments_in_json_are_written_once():
    """OpenAI's format has the arguments of a call as JSON text, which `tojson` would encode a second time."""

    def called(arguments):
        function = {"name": "f", "arguments": arguments}
        return {**PAIR, "chosen": [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]}

    (row,) = prepare(called(json.dumps({"city": "Rome"})))
    assert '"arguments": {"city": "Rome"}' in TOKENIZER.decode(row["response_ids"][0])
    assert tokens([row]) == tokens(prepare(called({"city": "Rome"})))
    (row,) = prepare(called("no JSON"))
    assert '"arguments": "no JSON"' in TOKENIZER.decode(row["response_ids"][0])


def test_text_beside_conversations_is_counted(said):
    """The template writes the messages of the first row, and drops the text of the second row."""
    rows = [{**TWO_TEXTS, "prompt": json.dumps(ask(WHAT))}, TWO_TEXTS]
    prepare(*rows)
    assert "1 row is text, trained on unchanged, and the others are conversations" in said()[-1]
    assert tokens(prepare(*rows, text_as="messages")) == tokens(prepare(PAIR, PAIR))
    assert len(said()) == 1


def test_numbers_as_text_are_numbers():
    assert prepare({**chat_pair(), "margin": "2.5"}, {**chat_pair(), "margin": "x"})["margins"][0] == [2.5]


WRAPPED = {"version": 1, "data": [{"prompt": WHAT, "chosen": BLUE, "rejected": GREEN}] * 2}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_within_a_json_object(streaming, tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(WRAPPED, indent=1), encoding="utf-8")
    assert len(list(load_splits(str(tmp_path / "a.json"), streaming=streaming)["train"])) == 2
    rows = list(load_splits(str(tmp_path / "*.json"), streaming=streaming)["train"])
    assert rows == WRAPPED["data"] * 2


def test_one_row_with_a_list_is_a_row(tmp_path):
    row = {"instruction": WHAT, "items": [{"a": 1}], "completions": [{"response": BLUE, "overall_score": 1.0}]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert load_splits(str(tmp_path / "one.jsonl"))["train"][0] == row


def test_a_csv_with_a_mark_at_its_beginning_and_windows_lines(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(f'\ufeffprompt,chosen,rejected\r\n{WHAT},{BLUE},"{GREEN}"\r\n'.encode())
    rows = load_splits(str(file))["train"]
    own = Dataset.from_list([{"prompt": WHAT, "chosen": BLUE, "rejected": GREEN}])
    assert tokens(prepare_dataset(rows, TOKENIZER)) == tokens(prepare_dataset(own, TOKENIZER))
