"""Preparing a whole dataset: its columns, its cache, and the message about truncated, dropped and rejected rows."""

import logging

import pytest
from datasets import Dataset, disable_caching, enable_caching
from datasets.fingerprint import Hasher

from hf_prefopt.data.prepare import prepare_dataset, prepared_features
from hf_prefopt.kinds import PAIRS
from tests.data.helpers import ask, chat_pair, reply, text_pair
from tests.tokenizers import tiny_tokenizer

BAD = {**text_pair(), "rejected": ""}


@pytest.fixture
def said(caplog):
    """Collect the messages that preparing a dataset logs."""
    caplog.set_level(logging.WARNING, logger="hf_prefopt")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_prefopt")]


def letters(prompt: int, chosen: int, rejected: int) -> dict:
    """Return a row of ids with these lengths; the responses differ and end with EOS."""
    eos = tiny_tokenizer().eos_token_id
    return {
        "prompt_ids": [10] * prompt,
        "chosen_ids": [11] * (chosen - 1) + [eos],
        "rejected_ids": [12] * (rejected - 1) + [eos],
    }


def test_a_prepared_data_set_has_these_columns_and_no_other():
    prepared = prepare_dataset(Dataset.from_list([{**chat_pair(), "problem_id": 3}]), tiny_tokenizer())
    assert prepared.features == prepared_features(PAIRS.columns)
    assert prepared[0]["pairs"] == [[0, 1]] and prepared[0]["row"] == 0


def test_preparing_twice_changes_nothing():
    tokenizer = tiny_tokenizer()
    prepared = prepare_dataset(Dataset.from_list([chat_pair()]), tokenizer)
    assert prepare_dataset(prepared, tokenizer) is prepared


def test_no_rows_stay_no_rows():
    empty = prepare_dataset(Dataset.from_list([chat_pair()]).select([]), tiny_tokenizer())
    assert len(empty) == 0 and empty.features == prepared_features(PAIRS.columns)


def test_a_data_set_with_a_torch_format_is_prepared_all_the_same():
    rows = Dataset.from_list([letters(1, 2, 2)])
    prepared = [prepare_dataset(dataset, tiny_tokenizer())[:] for dataset in (rows, rows.with_format("torch"))]
    assert prepared[0] == prepared[1]


def test_what_fits_is_not_talked_about(said):
    prepare_dataset(Dataset.from_list([chat_pair()] * 3), tiny_tokenizer())
    assert said() == []


def test_one_line_counts_what_was_cut_and_dropped(said):
    """max_length 8. Row 0 fits (8); row 1: one response is cut (2 + 9 = 11); row 2:
    both; row 3: its prompt has 8 tokens.
    """
    rows = Dataset.from_list([letters(2, 6, 3), letters(2, 9, 3), letters(2, 7, 8), letters(8, 2, 2)])
    prepared = prepare_dataset(rows, tiny_tokenizer(), max_length=8, name="eval")
    assert said() == [
        "eval: 3 of 6 responses cut to max_length=8 (longest 11 tokens), 1 row dropped because the prompt alone fills "
        "it; raise max_length or set truncation_mode='keep_end'"
    ]
    assert prepared["row"][:] == [0, 1, 2]


def test_keep_end_counts_the_prompts_that_it_cuts(said):
    """max_length 8: a row with 7 + 3 = 10 tokens loses 2 prompt tokens, and the other row fits."""
    rows = Dataset.from_list([letters(7, 3, 2), letters(2, 2, 2)])
    prepared = prepare_dataset(rows, tiny_tokenizer(), max_length=8, truncation_mode="keep_end")
    assert said() == ["train: 1 prompt cut at the start to max_length=8 (longest 10 tokens); raise max_length"]
    assert [len(ids) for ids in prepared["prompt_ids"]] == [5, 2]


def test_identical_pairs_are_kept_and_counted(said):
    prepared = prepare_dataset(Dataset.from_list([chat_pair("Paris.", "Paris."), chat_pair()]), tiny_tokenizer())
    assert len(prepared) == 2
    assert said() == ["train: 1 pair with chosen = rejected kept (nothing to learn from)"]


def test_counts_are_right_when_the_map_comes_from_the_cache(tmp_path, said, monkeypatch):
    Dataset.from_list([letters(2, 9, 3)] * 5).save_to_disk(tmp_path / "rows")
    for _ in range(2):
        prepare_dataset(Dataset.load_from_disk(tmp_path / "rows"), tiny_tokenizer(), max_length=8)
        # Computing anything from here on would raise an error.
        monkeypatch.setattr("hf_prefopt.data.prepare.tokenize_rows", None)
    assert len(said()) == 2 and said()[0] == said()[1]
    assert said()[0].startswith("train: 5 of 10 responses cut")


def test_using_a_tokenizer_does_not_change_the_key_of_the_cache_and_its_template_does():
    tokenizer = tiny_tokenizer()
    before = Hasher.hash(tokenizer)
    prepare_dataset(Dataset.from_list([chat_pair(), chat_pair()]), tokenizer)
    assert Hasher.hash(tokenizer) == before == Hasher.hash(tiny_tokenizer())
    tokenizer.chat_template += " "
    assert Hasher.hash(tokenizer) != before


def test_bad_rows_are_counted_and_the_first_three_shown():
    rows = [text_pair(), BAD, BAD, {**text_pair(), "prompt": None}, BAD]
    with pytest.raises(ValueError) as caught:
        prepare_dataset(Dataset.from_list(rows), tiny_tokenizer())
    cure = "drop the row or pass on_bad_rows='drop'"
    assert str(caught.value).splitlines() == [
        "train: 4 of 5 rows cannot be used",
        f"  row 1: `rejected` is empty; {cure}",
        f"  row 2: `rejected` is empty; {cure}",
        f"  row 3: `prompt` is missing; {cure}",
        "  … and 1 more row",
        "  (rows are counted from 0)",
    ]


def test_bad_rows_can_be_dropped_and_the_others_keep_their_numbers(said):
    prepared = prepare_dataset(
        Dataset.from_list([BAD, text_pair(), BAD, text_pair()]), tiny_tokenizer(None), on_bad_rows="drop"
    )
    assert prepared["row"][:] == [1, 3]
    assert said() == ["train: 2 unusable rows dropped"]


def test_a_data_set_of_which_nothing_is_left_is_an_error():
    with pytest.raises(ValueError, match="none of 2 rows is left"):
        prepare_dataset(Dataset.from_list([BAD, BAD]), tiny_tokenizer(), on_bad_rows="drop")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"truncation_mode": "keep_middle"},
            "truncation_mode='keep_middle' is not one of keep_start, keep_end",
        ),
        ({"on_bad_rows": "ignore"}, "on_bad_rows='ignore' is not one of error, drop"),
        ({"max_length": 0}, "max_length=0 must be at least 2, or None"),
    ],
)
def test_an_option_outside_its_values_names_the_valid_ones(option, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(Dataset.from_list([text_pair()]), tiny_tokenizer(), **option)


def test_missing_columns_are_an_error_before_any_row_is_read():
    with pytest.raises(ValueError, match="train: column `rejected` is missing"):
        prepare_dataset(Dataset.from_list([{"prompt": ask(), "chosen": reply("a")}]), tiny_tokenizer())


def test_several_processes_give_the_same_data_set():
    rows = Dataset.from_list([letters(2, 2 + at, 3) for at in range(6)])
    disable_caching()
    try:
        one, two = (prepare_dataset(rows, tiny_tokenizer(), max_length=8, num_proc=n) for n in (None, 2))
    finally:
        enable_caching()
    assert one[:] == two[:]


class TestStreaming:
    def test_a_stream_gives_the_same_rows(self, said):
        rows = Dataset.from_list([letters(2, 6, 3), letters(2, 9, 3), letters(8, 2, 2)])
        stream = prepare_dataset(rows.to_iterable_dataset(), tiny_tokenizer(), max_length=8)
        assert list(stream) == list(prepare_dataset(rows, tiny_tokenizer(), max_length=8))
        assert "row 1, the first of this stream" in said()[0]

    def test_a_bad_row_is_an_error_when_it_is_reached(self):
        rows = Dataset.from_list([text_pair(), text_pair(), BAD]).to_iterable_dataset()
        stream = iter(prepare_dataset(rows, tiny_tokenizer()))
        assert [next(stream)["row"], next(stream)["row"]] == [0, 1]
        with pytest.raises(ValueError, match="train: row 2: `rejected` is empty"):
            next(stream)

    def test_bad_rows_of_a_stream_can_be_dropped(self):
        rows = Dataset.from_list([BAD, text_pair()]).to_iterable_dataset()
        assert [row["row"] for row in prepare_dataset(rows, tiny_tokenizer(), on_bad_rows="drop")] == [1]

    def test_a_prepared_stream_comes_back_as_it_is(self):
        stream = prepare_dataset(Dataset.from_list([text_pair()]).to_iterable_dataset(), tiny_tokenizer())
        assert prepare_dataset(stream, tiny_tokenizer()) is stream


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 8}, "max_length None, but now it is 8"),
        ({"truncation_mode": "keep_end"}, "truncation_mode 'keep_start', but now it is 'keep_end'"),
        ({"tokenizer": tiny_tokenizer(None)}, "chat template"),
    ],
    ids=["length", "mode", "template"],
)
def test_a_set_prepared_with_other_settings_is_refused(options, message, tmp_path):
    """The set is saved, loaded, and filtered. A set made by hand has no note of settings, so its rows are checked."""
    settings = {"tokenizer": tiny_tokenizer(), "max_length": None}
    prepared = prepare_dataset(Dataset.from_list([chat_pair(), chat_pair()]), **settings)
    prepared.select([1]).save_to_disk(tmp_path)
    loaded = Dataset.load_from_disk(tmp_path)
    for given in (prepared, loaded):
        assert prepare_dataset(given, **settings) is given
        with pytest.raises(ValueError, match=f"train: this dataset was prepared with .*{message}"):
            prepare_dataset(given, **{**settings, **options})
    by_hand = Dataset.from_list(list(prepared), features=prepared.features)
    if "max_length" not in options:
        assert prepare_dataset(by_hand, **{**settings, **options}) is by_hand


TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_prepared_rows_without_a_note_are_looked_at(streamed):
    """Rows from a file or a stream are checked: they may exceed `max_length`, or have ids that the tokenizer lacks."""
    done = prepare_dataset(Dataset.from_list([text_pair(), text_pair(chosen=" Paris, of course.")]), TOKENIZER)
    lengths = [len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in done]
    bare = Dataset.from_dict(done[:], features=done.features)
    rows = bare.to_iterable_dataset() if streamed else bare
    assert len(list(prepare_dataset(rows, TOKENIZER, max_length=max(lengths)))) == 2
    longest = lengths.index(max(lengths))
    with pytest.raises(ValueError, match=f"row {longest} of this prepared dataset has {max(lengths)} tokens"):
        list(prepare_dataset(rows, TOKENIZER, max_length=max(lengths) - 1))
    beyond = done[0] | {"response_ids": [[len(TOKENIZER)], [3]], "scored_masks": [[1], [1]]}
    wrong = Dataset.from_list([beyond], features=done.features)
    with pytest.raises(ValueError, match=f"row 0 .* has token id {len(TOKENIZER)}, but the tokenizer has"):
        list(prepare_dataset(wrong.to_iterable_dataset() if streamed else wrong, TOKENIZER))
