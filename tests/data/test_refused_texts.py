"""Texts and sources that earlier versions misread: the rows that they become now, or the error with its fix."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from hf_prefopt.data.files import load_splits
from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.data.sources import as_dataset
from tests.data.helpers import chat_pair, prepare_row, reply, scored_text
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTION = {"question": "Sky?", "chosen": "Blue.", "rejected": "Green."}


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", " <|im_end|> \n<|im_end|>"])
@pytest.mark.parametrize("row", [QUESTION, chat_pair("Blue.", "Green.")])
def test_an_end_of_turn_in_a_response_is_not_doubled(row, end):
    """The template writes the end of turn; a text that was generated earlier may already contain it."""
    texts = {"chosen": f"Blue.{end}", "rejected": "Green."}
    ended = {**row, **(texts if "question" in row else {side: reply(text) for side, text in texts.items()})}
    assert prepare_row(ended, TOKENIZER) == prepare_row(row, TOKENIZER)


@pytest.mark.parametrize(
    "row",
    [
        {**QUESTION, "rejected": "Green.<|im_end|>\n<|im_start|>user\nSure?"},
        {**QUESTION, "chosen": "<|im_start|>assistant\nBlue."},
        chat_pair(prompt=[], chosen="Blue.<|im_start|>"),
    ],
)
def test_other_turn_tokens_in_responses_are_an_error(row):
    with pytest.raises(ValueError, match=r"<\|im_.*the chat template writes around turns"):
        prepare_row(row, TOKENIZER)


def test_a_token_that_the_template_does_not_write_is_text():
    row = prepare_row({**QUESTION, "chosen": "It prints <|endoftext|> last."}, TOKENIZER)
    assert scored_text(row, 0, TOKENIZER) == "It prints <|endoftext|> last.<|im_end|>\n"
    with pytest.raises(ValueError, match=r"`chosen` is only '<\|im_end\|>'"):
        prepare_row({**QUESTION, "chosen": "<|im_end|>"}, TOKENIZER)


@pytest.mark.parametrize("cut", [3, 12, 30])
def test_messages_that_a_spreadsheet_cut_off_are_an_error(cut):
    row = {side: json.dumps(messages) for side, messages in chat_pair().items()}
    with pytest.raises(ValueError, match="`prompt` contains messages as JSON that is cut off"):
        prepare_row({**row, "prompt": row["prompt"][:-cut]}, TOKENIZER)
    assert prepare_row({**QUESTION, "chosen": '{"content": "blue"} is it.'}, TOKENIZER)


@pytest.mark.parametrize("write, reader", [(str, "ast.literal_eval"), (lambda m: json.dumps(json.dumps(m)), "json")])
def test_messages_written_as_text_are_read_with_the_function_that_is_named(write, reader):
    with pytest.raises(ValueError, match=rf"'chosen': {reader}"):
        prepare_row({side: write(messages) for side, messages in chat_pair().items()}, TOKENIZER)


def test_a_column_of_mixed_types_in_a_file_keeps_its_texts(tmp_path):
    """`datasets` stores such a column as JSON; the texts that are read have no quotation marks."""
    lines = [QUESTION, {**QUESTION, "chosen": reply("Blue.")}, {**QUESTION, "chosen": 5}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = load_splits(str(tmp_path / "rows.jsonl"))["train"]
    read = prepare_dataset(rows.select([0, 1]), TOKENIZER, max_length=None)
    assert [scored_text(row, 0, TOKENIZER) for row in read] == ["Blue.<|im_end|>\n"] * 2
    with pytest.raises(ValueError, match="row 2: `chosen` is of type int"):
        prepare_dataset(rows, TOKENIZER, max_length=None)


def test_an_index_with_a_name_is_a_column():
    frame = pd.DataFrame([QUESTION, QUESTION]).set_index("question")
    assert as_dataset(frame, "train")[0] == QUESTION
    assert as_dataset(pd.DataFrame([QUESTION], index=[7]), "train").column_names == [*QUESTION]


@pytest.mark.parametrize(
    "value, message", [("\ud800", "row 1: `x` is a value"), (["a"], "row 1: `x` is of type list, and")]
)
def test_a_value_that_cannot_be_stored_is_named_with_its_row(value, message):
    with pytest.raises(ValueError, match=message):
        as_dataset([{"x": "a"}, {"x": value}], "train")


@pytest.mark.parametrize("as_splits", [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path, as_splits):
    rows = datasets.Dataset.from_list([QUESTION])
    (datasets.DatasetDict(train=rows, dev=rows) if as_splits else rows).save_to_disk(tmp_path / "saved")
    splits = load_splits(str(tmp_path / "saved"))
    assert list(splits) == (["train", "dev"] if as_splits else ["train"]) and splits["train"][0] == QUESTION
    assert next(iter(load_splits(str(tmp_path / "saved"), streaming=True)["train"])) == QUESTION


def test_a_folder_with_files_of_two_kinds_is_not_read_in_part(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(QUESTION))
    (tmp_path / "b.csv").write_text("question,chosen,rejected\nSky?,Blue.,Green.\n")
    with pytest.raises(ValueError, match=r"files of several kinds, such as a.jsonl and b.csv.*/\*.jsonl'"):
        load_splits(str(tmp_path))


def test_a_semicolon_file_with_commas_in_its_texts_is_recognized(tmp_path):
    Path(tmp_path / "rows.csv").write_text('question;chosen;rejected\n"Sky?";"Blue, I think.";"Green."\n')
    with pytest.raises(ValueError, match="separated by ';'"):
        prepare_dataset(load_splits(str(tmp_path / "rows.csv"))["train"], TOKENIZER)


MAPPED = {
    "a name that nothing reads": ({"promt": "q"}, "nothing reads a column 'promt'.*did you mean 'prompt'"),
    "one column twice": ({"prompt": "q", "system": "q"}, "'prompt' and 'system' are the same column 'q'"),
    "a key of a struct": ({"prompt": "s.q"}, r"'s.q' is a key in the structs of column 's'.*dataset.flatten\(\)"),
}


@pytest.mark.parametrize("what", MAPPED)
def test_a_column_mapping_that_cannot_be_followed(what):
    mapping, message = MAPPED[what]
    row = {"q": "The sky is", "s": {"q": "?"}, "chosen": "The sky is blue.", "rejected": "The sky is green."}
    with pytest.raises(ValueError, match=message):
        prepare_row(row, TOKENIZER, column_mapping=mapping)


UNKNOWN = {
    "structs": (
        {"inputs": {"question": "Sky?"}, "outputs": {"chosen": "Blue.", "rejected": "Green."}},
        r"dataset.flatten\(\).rename_columns\({'inputs.question': 'question', 'outputs.chosen': 'chosen'",
    ),
    "a struct whose name has a point": ({"a.b": {"answers": None}, **dict.fromkeys(".")}, "missing"),
    "numbers": ({**QUESTION, "chosen": 4, "rejected": 5}, r"dataset.cast_column\('chosen', Value\('string'\)\)"),
    "a flag": ({"question": "Sky?", "answer": "Blue.", "if_chosen": True}, "'desirable': '<your column>'"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_columns_are_answered_with_a_call_that_helps(what):
    row, message = UNKNOWN[what]
    with pytest.raises(ValueError, match=message):
        prepare_row(row, TOKENIZER)


def test_the_prompt_of_texts_without_a_prompt_column_is_explained(caplog):
    prepare_row({"chosen": "Q: Sky?\nA: Blue.", "rejected": "Q: Sky?\nA: Green."}, TOKENIZER)
    assert "what they share at the beginning is not scored" in caplog.text
    caplog.clear()
    talk = "\n\nHuman: Sky?\n\nAssistant:"
    prepare_row({"chosen": f"{talk} Blue.", "rejected": f"{talk} Green."}, TOKENIZER)
    assert "what they share" not in caplog.text
