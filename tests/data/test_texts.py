"""Texts without a prompt, texts that repeat the prompt, and messages that are written as text."""

import json

import pytest
from datasets import Dataset

from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.data.rows import count_shared_words
from tests.data.helpers import ask, chat_pair, reply, text_pair
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def prepare(*rows: dict, **options):
    return prepare_dataset(Dataset.from_list([*rows]), TOKENIZER, max_length=None, **options)


def sides(chosen: str, rejected: str) -> dict:
    return {"chosen": chosen, "rejected": rejected}


# Answers without prompts; some share their first one to three words.
ANSWERS = [
    sides("The sky is blue.", "The sky is green, I think."),
    sides("I'm sorry, I can't.", "I'm sorry, but no."),
    sides("Of course! I can.", "Of course not."),
    sides("The answer is 4.", "The answer would be 5."),
] * 3
CONTINUED = [sides(f"The capital of country {n} is Paris.", f"The capital of country {n} is Rome.") for n in range(12)]
TRANSCRIPTS = [sides(f"\n\nHuman: {n}?\n\nAssistant: Yes.", f"\n\nHuman: {n}?\n\nAssistant: No.") for n in range(12)]
ASKED = [sides("Why? Because.", "Why? Therefore.")] * 12


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["The sky is blue.", "The sky is green."], 3),
        (["Yes, blue.", "No."], 0),
        (["There", "The"], 0),
        (["The capital", "The capital"], 2),
        (["法国的首都是巴黎", "法国的首都是罗马"], 3),
        (["\nYes", "\nNo"], 0),
        (["Why? A", "Why? B"], float("inf")),
        (["User: A", "User: B"], float("inf")),
        (["a b c d", "a b c e", "a b x"], 2),
    ],
)
def test_the_words_that_texts_begin_with(texts, words):
    """Two Chinese characters count as one word."""
    assert count_shared_words(texts) == words


@pytest.mark.parametrize("rows", [CONTINUED, TRANSCRIPTS, ASKED], ids=["continued", "transcripts", "asked"])
def test_texts_that_begin_with_a_prompt_are_taken(rows):
    assert len(prepare(*rows)) == 12
    assert len(list(prepare_dataset(Dataset.from_list(rows).to_iterable_dataset(), TOKENIZER))) == 12


def test_answers_without_a_prompt_are_refused():
    message = "train: the texts of 12 of 12 rows share fewer than 4 words .* add a column `prompt`"
    with pytest.raises(ValueError, match=message):
        prepare(*ANSWERS)
    with pytest.raises(ValueError, match="9 of 12 rows share"):
        prepare(*ANSWERS[:9], *CONTINUED[:3])
    assert len(prepare(*ANSWERS[:3], *CONTINUED[:9])) == 12
    stream = prepare_dataset(Dataset.from_list(ANSWERS).to_iterable_dataset(), TOKENIZER)
    with pytest.raises(ValueError, match="8 of 8 rows share"):
        list(stream)


def test_answers_that_begin_with_nothing_in_common_are_refused_by_the_row():
    unlike = sides("Yes, blue.", "No.")
    with pytest.raises(ValueError, match="row 12: `rejected` and `chosen` do not begin with the same word"):
        prepare(*CONTINUED, unlike)
    assert len(prepare(*CONTINUED, unlike, on_bad_rows="drop")) == 12
    with pytest.raises(ValueError, match="12 of 12 rows share"):  # the other rows are rejected, too
        prepare(*ANSWERS, *[unlike] * 20, on_bad_rows="drop")
    assert len(prepare({"prompt": "", **unlike})) == 1


def test_messages_that_begin_with_the_answer_have_no_prompt():
    pair = {"chosen": reply("Paris."), "rejected": reply("Rome.")}
    with pytest.raises(ValueError, match=r"begin with the assistant, so there is no prompt; .*\[\] if"):
        prepare(pair)
    assert len(prepare({"prompt": [], **pair})) == 1


WRITTEN = {
    "Python": str([*ask(), *reply("It's Paris.")]),
    "NumPy": "[{'content': 'Why?', 'role': 'user'}\n {'content': 'Because.', 'role': 'assistant'}]",
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_messages_as_python_writes_them_are_refused(column, text):
    with pytest.raises(
        ValueError, match=rf"row 0: `{column}` contains messages written as text.*(ast\.literal_eval|JSON Lines)"
    ):
        prepare({**text_pair(), column: text})


def test_messages_in_writing_are_refused_in_rows_of_every_kind():
    text = WRITTEN["Python"]
    for row in (
        {"chosen": text, "rejected": text},
        {"prompt": "Why?", "completion": text, "label": False},
        {"prompt": "Why?", "responses": ["Yes", text], "scores": [0, 1]},
    ):
        with pytest.raises(ValueError, match="contains messages written as text"):
            prepare(row)
    with pytest.raises(ValueError, match="`prompt` contains a list written as text"):
        prepare({**text_pair(), "prompt": '["What is the capital of France?"]'})


JSON = {
    "a list": (json.dumps(ask()), json.dumps(reply("Paris."))),
    "one message": (json.dumps(ask()[0]), json.dumps(reply("Paris.")[0])),
    "sharegpt": (
        '[{"from": "human", "value": "What is the capital of France?"}]',
        '{"from": "gpt", "value": "Paris."}',
    ),
    "white space": (
        '\n [ {"role" : "user", "content" : "What is the capital of France?"} ]\n',
        ' [{"role": "assistant", "content": "Paris."}]',
    ),
}


@pytest.mark.parametrize(("question", "answer"), JSON.values(), ids=JSON)
def test_messages_in_json_are_messages(question, answer):
    (expected,) = prepare(chat_pair())
    rejected = json.dumps(reply("Rome."))
    assert prepare({"prompt": question, "chosen": answer, "rejected": rejected})[0] == expected
    with pytest.raises(ValueError, match="`chosen` contains messages written as text, but another response is plain"):
        prepare({"prompt": question, "chosen": answer, "rejected": "Rome."})


@pytest.mark.parametrize(
    "answer",
    ['{"from": "Paris", "to": "Rome", "value": 3}', '["a", "b"]', "[1, 2]", '{"role": "user"}', "The role: [{x}]"],
)
def test_an_answer_in_json_is_an_answer(answer):
    assert len(prepare(text_pair(chosen=answer))) == 1


@pytest.mark.parametrize("end", ["", " ", "\n"], ids=["no blank", "blank", "line"])
def test_a_prompt_that_all_responses_repeat_is_taken_off(end, caplog):
    """The tokens equal those without the repeated prompt, and one message counts the rows."""
    prompt = f"Human: What color is the sky?\nAssistant:{end}"
    joint = "" if end else " "
    whole = {"chosen": f"{prompt}{joint}Blue.", "rejected": f" {prompt}{joint}Green."}
    alone = {"chosen": f"{joint}Blue.", "rejected": f"{joint}Green."}
    assert prepare({"prompt": prompt, **whole})[:] == prepare({"prompt": prompt, **alone})[:]
    assert "the prompt removed from the responses of 1 row, which began with it" in caplog.text
    for label in (True, False):
        texts = [{"prompt": prompt, "completion": sides["chosen"], "label": label} for sides in (whole, alone)]
        assert prepare(texts[0])[:] == prepare(texts[1])[:]
    lists = [{"prompt": prompt, "responses": [*sides.values()], "ranks": [1, 2]} for sides in (whole, alone)]
    assert prepare(lists[0])[:] == prepare(lists[1])[:]


def test_an_echo_is_no_repeated_prompt():
    """Only one response, an undesirable completion, or a greeting begins with the
    prompt: these words are the model's.
    """
    assert len(prepare({**text_pair(), "rejected": "The capital of France is the capital of France is"})) == 1
    assert len(prepare({"prompt": "Why is it so?", "completion": "Why is it so? Why?", "label": False})) == 1
    assert len(prepare({"prompt": "Hello", "chosen": "Hello there!", "rejected": "Hello."})) == 1
    assert len(prepare(chat_pair())) == 1


def test_short_prompts_that_all_responses_begin_with_stay_and_are_counted(caplog):
    """Such prompts have fewer than four words. "Hello" begins with "Hell", but not with the word "Hell"."""
    rows = [
        {"prompt": "Hello", "chosen": "Hello, you!", "rejected": "Hello."},
        {"prompt": "Hell", "chosen": "Hello, you!", "rejected": "Hello."},
        {"prompt": "Hello", "chosen": "Hello, you!", "rejected": "Yes."},
        {"prompt": "", "chosen": "Hello, you!", "rejected": "Hello."},
    ]
    assert len(prepare(*rows)) == 4
    assert "the responses of 1 row begin with their prompt, which is too short to be removed" in caplog.text
