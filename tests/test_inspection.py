"""`inspect_dataset`: how training would read a dataset, and its problems, without a model."""

import json
import logging
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_prefopt import Mixture, Source, inspect_dataset
from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.reporting.inspected import events, facts
from tests.data.helpers import chat_pair, reply, text_pair
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_trainer

TOKENIZER = tiny_tokenizer()
LAYOUTS = [json.loads(line) for line in Path(__file__).parent.joinpath("data/layouts.jsonl").open(encoding="utf-8")]


def chats(count: int = 4) -> list[dict]:
    return [chat_pair(f"Paris, {n}.", "Rome.") for n in range(count)]


def test_columns_used_not_used_and_about_the_row():
    rows = [{**row, "margin": 1.0, "verdict_b": [1], "source": "x", "question_id": "7"} for row in chats()]
    found = inspect_dataset(rows, TOKENIZER)
    assert (found.layout, found.content) == ("pairs, question", "messages")
    assert found.columns == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    assert found.numbers == {"margins": "margin"}
    assert (found.unused, found.about_the_row) == (("verdict_b",), ("source", "question_id"))
    assert found.summary.examples == 4 and found.errors == ()
    assert not any("columns not used" in remark for remark in found.remarks)


def test_a_mixture_is_looked_at_source_by_source():
    mixture = Mixture([Source(chats(), "a"), Source(chats(2), "b")])
    with pytest.raises(ValueError, match=r"is a Mixture, not a datasets\.Dataset: pass each of its `sources`"):
        inspect_dataset(mixture, TOKENIZER)
    assert [inspect_dataset(source.rows, TOKENIZER).summary.rows for source in mixture.sources] == [4, 2]


def test_responses_with_a_quantile():
    rows = [{"prompt": "The capital of France is", "completion": f" Paris, {n}.", "quantile": n / 4} for n in range(4)]
    found = inspect_dataset(rows, TOKENIZER)
    assert (found.layout, found.summary.examples, found.summary.comparisons) == (
        "responses with a quantile, question",
        4,
        0,
    )


def test_mapped_columns_have_the_names_of_the_data_set():
    rows = [{"q_text": "Who?", "good_one": "I.", "bad_one": "You."}] * 2
    mapping = {"prompt": "q_text", "chosen": "good_one", "rejected": "bad_one"}
    found = inspect_dataset(rows, TOKENIZER, column_mapping=json.dumps(mapping))
    assert found.columns == mapping and found.settings["column_mapping"] == json.dumps(mapping)


def test_text_is_said_to_stay_text_and_becomes_messages_on_request():
    found = inspect_dataset([text_pair()] * 2, TOKENIZER)
    assert found.content == "text" and any(
        "text_as='messages' converts it to messages" in line for line in found.remarks
    )
    assert inspect_dataset([text_pair()] * 2, TOKENIZER, text_as="messages").content == "messages"


def test_rows_that_cannot_be_used_are_counted_and_stop_training_alone():
    rows = [*chats(3), {**chat_pair(), "rejected": []}]
    found = inspect_dataset(rows, TOKENIZER)
    assert found.counts["bad"] == 1 and found.rows_given == 4 and found.summary.rows == 3
    (error,) = found.errors
    assert error.startswith("1 of 4 rows cannot be used\n  row 3: ")
    assert events(found) == [("rows that cannot be used", 1)]
    assert inspect_dataset(rows, TOKENIZER, on_bad_rows="drop").errors == ()


def test_what_a_loss_asks_is_checked_where_one_is_named():
    assert inspect_dataset(chats(), TOKENIZER, loss_type="dpo").errors == ()
    (error,) = inspect_dataset(chats(), TOKENIZER, loss_type="odpo").errors
    assert "does not fit odpo: columns of numbers are missing, `chosen_score`, `rejected_score`: add" in error
    (error,) = inspect_dataset([chat_pair("Paris.", "Paris.")] * 3, TOKENIZER, loss_type="dpo").errors
    assert error.startswith("chosen and rejected have the same tokens in all of 3 pairs")
    labels = [{"prompt": "Q", "completion": " a", "label": n > 0} for n in range(4)]
    assert any(
        "KTO's authors recommend" in line for line in inspect_dataset(labels, TOKENIZER, loss_type="kto").remarks
    )


def test_the_last_row_shown_is_one_that_is_cut():
    rows = [*chats(5), chat_pair("Paris. " * 40, "Rome.")]
    found = inspect_dataset(rows, TOKENIZER, max_length=60, rows=2)
    assert [row.number for row in found.rows] == [0, 5]
    assert found.rows[1].responses[0].cut > 0 and found.rows[0].responses[0].cut == 0
    assert found.counts["responses_cut"] == 1 and ("responses cut to max_length", 1) in events(found)
    assert inspect_dataset(rows, TOKENIZER, max_length=60, rows=0).rows == ()


def test_an_unpaired_pair_is_shown_as_two_rows_with_their_cut_tokens():
    rows = [chat_pair("Paris.", "Rome. " * 60)] * 2
    found = inspect_dataset(rows, TOKENIZER, loss_type="kto", unpair=True, max_length=60, rows=2)
    assert found.summary.desirable == found.summary.undesirable == 2
    assert [(row.number, row.responses[0].name, row.responses[0].cut > 0) for row in found.rows] == [
        (0, "desirable", False),
        (1, "undesirable", True),
    ]


def test_a_stream_is_looked_at_from_its_beginning():
    """A stream with class labels is inspected, too; the names of the classes define what the labels mean."""
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=["bad", "good"])}
    )
    rows = Dataset.from_list([{"prompt": "Q", "completion": " a", "label": n % 2} for n in range(9)], features=features)
    found = inspect_dataset(rows.to_iterable_dataset(), TOKENIZER, stream_rows=6)
    assert found.is_beginning and found.rows_given == 6 and found.summary.desirable == 3
    assert dict(facts(found))["Rows"].endswith("(the first 6 rows of a stream)")
    in_torch = inspect_dataset(rows.to_iterable_dataset().with_format("torch"), TOKENIZER, stream_rows=6)
    assert in_torch.summary == found.summary


def test_it_says_which_losses_can_use_the_rows():
    """Triples are pairs, too; the third response is shown."""
    triples = [{**row, "reference": reply("In Paris.")} for row in chats()]
    found = inspect_dataset(triples, TOKENIZER)
    assert (found.layout, found.kinds, found.summary.kind) == ("triples, question", ("pairs", "triples"), "triples")
    line = "pairs, triples (with unpair=True also of unpaired examples)"
    assert dict(facts(found))["For losses of"] == line and len(found.rows[0].responses) == 3
    lists = [{"prompt": "Q", "responses": [" a", " b"], "scores": [n, 1]} for n in range(3)]
    assert inspect_dataset(lists, TOKENIZER).kinds == ("lists",)
    assert inspect_dataset(prepare_dataset(Dataset.from_list(lists), TOKENIZER), TOKENIZER).kinds == ("lists",)
    assert inspect_dataset(triples, TOKENIZER, loss_type="dpo").kinds == ()


def test_of_several_splits_the_training_split_is_looked_at():
    splits = DatasetDict({"test": Dataset.from_list(chats(2)), "train": Dataset.from_list(chats(3))})
    assert inspect_dataset(splits, TOKENIZER, name="eval").summary.rows == 3


def test_prepared_rows_are_shown_as_they_are():
    prepared = prepare_dataset(Dataset.from_list(chats()), TOKENIZER)
    found = inspect_dataset(prepared, TOKENIZER)
    assert found.layout == "prepared rows" and len(found.rows) == 3 and found.counts == {}


def test_columns_and_settings_that_cannot_be_read_are_one_error():
    with pytest.raises(ValueError, match=r"^train: columns? .* missing"):
        inspect_dataset([{"chosen": "a"}], TOKENIZER)
    with pytest.raises(ValueError, match="max_length=1 leaves no room"):
        inspect_dataset(chats(), TOKENIZER, max_length=1)
    with pytest.raises(TypeError, match="max_lenght"):
        inspect_dataset(chats(), TOKENIZER, max_lenght=8)
    with pytest.raises(ValueError, match="has no rows"):
        inspect_dataset([], TOKENIZER)


def test_what_training_logs_is_in_the_remarks_and_not_logged(caplog):
    with caplog.at_level(logging.WARNING):
        found = inspect_dataset([text_pair()] * 2, TOKENIZER)
        assert found.remarks and not caplog.records
        prepare_dataset(Dataset.from_list([text_pair()] * 2), TOKENIZER)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout["layout"])
def test_every_layout_is_shown_or_refused_in_words(layout):
    try:
        found = inspect_dataset(layout["rows"], TOKENIZER, max_length=None, on_bad_rows="drop")
    except ValueError as error:
        assert str(error).startswith("train: ")
        return
    assert found.summary.examples and facts(found) and found.rows
    assert set(found.columns.values()) <= {column for row in layout["rows"] for column in row}


def test_the_counts_are_those_of_the_start_of_training(tmp_path, caplog):
    rows = [*chats(6), chat_pair("Paris. " * 40, "Rome.")]
    model = tiny_model(vocab_size=len(TOKENIZER))
    trainer = make_trainer(tmp_path, model, train_dataset=Dataset.from_list(rows), max_steps=1, max_length=60)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    logged = [record.getMessage() for record in caplog.records]
    said = dict(facts(inspect_dataset(rows, TOKENIZER, loss_type="dpo", max_length=60)))
    assert f"data: train {said['Rows']}" in logged
    assert f"data: {said['Tokens']}" in logged and f"data: {said['Length bias']}" in logged
