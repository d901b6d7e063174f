"""`PreferenceData` alone: settings and a tokenizer, without a trainer."""

import logging

import pytest
from datasets import Dataset, concatenate_datasets
from torch.utils.data import IterableDataset

from hf_prefopt.training.preference_data import PreferenceData
from tests.data.helpers import text_pair
from tests.tokenizers import tiny_tokenizer
from tests.trainers import lists, make_config, make_trainer, pairs, unpaired


def data(folder, **settings):
    return PreferenceData(make_config(folder, **settings), tiny_tokenizer())


def test_the_first_data_set_settles_the_objective(tmp_path):
    """`sft` compares pairs or lists; `dpo` uses the column `margin` if there is one."""
    of_lists = data(tmp_path, loss_type="sft_lists")
    of_lists.prepare(lists(4), "train")
    assert of_lists.objective.kind.name == "lists"
    with_margins = data(tmp_path)
    assert "margins" not in with_margins.objective.inputs
    with_margins.prepare(Dataset.from_list([text_pair() | {"margin": 0.5}] * 2), "train")
    assert "margins" in with_margins.objective.inputs


def test_raw_rows_are_tokenized_and_prepared_ones_stay(tmp_path):
    made = data(tmp_path)
    prepared = made.prepare(Dataset.from_list([text_pair()] * 2), "train")
    assert {"prompt_ids", "response_ids", "scored_masks"} <= set(prepared.column_names) <= set(made.columns) | {"pairs"}
    assert made.prepare(prepared, "eval")._fingerprint == prepared._fingerprint
    assert made.prepare(None, "eval") is None


def test_examples_that_the_losses_cannot_compare_are_named(tmp_path):
    with pytest.raises(ValueError, match="the train dataset holds unpaired examples, but dpo needs pairs"):
        data(tmp_path).prepare(unpaired(3), "train")
    with pytest.raises(ValueError, match="the b dataset holds lists, but dpo needs pairs"):
        data(tmp_path).prepare({"a": pairs(2), "b": lists(2)}, "eval")


def test_pairs_that_are_all_identical_are_an_error_where_only_differences_count(tmp_path):
    """A set is usable if only the last of 1,001 rows differs; the NLL also trains on equal responses."""
    same = Dataset.from_list([text_pair(chosen=" Paris.", rejected=" Paris.")] * 1000)
    with pytest.raises(ValueError, match="train: chosen and rejected have the same tokens in all of 1,000 pairs, so "):
        data(tmp_path).prepare(same, "train")
    assert len(data(tmp_path, sft_weight=0.1).prepare(same, "train")) == 1000
    assert len(data(tmp_path).prepare(concatenate_datasets([same, Dataset.from_list([text_pair()])]), "train")) == 1001


def test_changed_settings_are_checked_against_the_data(tmp_path):
    made = data(tmp_path)
    train = made.prepare(pairs(3), "train")
    made.args.loss_type = ["ipo"]
    made.settle_again(train, {"a": train})
    assert [term.spec.name for term in made.objective.terms] == ["ipo"]
    made.args.loss_type = ["kto"]
    with pytest.raises(ValueError, match="the train dataset holds pairs, but kto needs"):
        made.settle_again(train, None)


def test_an_evaluation_set_named_train_does_not_hide_the_training_set(tmp_path):
    """The training set determines the objective, here with its margins."""
    made = data(tmp_path)
    train = made.prepare(Dataset.from_list([text_pair() | {"margin": 0.5}] * 2), "train")
    made.settle_again(train, {"train": pairs(2)})
    assert "margins" in made.objective.inputs


def test_prompts_are_drawn_only_where_they_are_asked_for(tmp_path):
    rows = pairs(6)
    assert data(tmp_path).sampler(rows, lambda: "shared", 1) is None
    made = data(tmp_path, group_by_prompt=True)
    assert sorted(made.sampler(rows, lambda: "shared", 1)) == list(range(6))
    assert made.sampler(rows.to_iterable_dataset(), lambda: "shared", 1) is None


def test_rows_get_a_mismatched_response_where_a_loss_needs_one(tmp_path):
    rows = unpaired(4)
    plain, with_others = data(tmp_path, loss_type="dpo"), data(tmp_path, loss_type="kto")
    assert plain.to_read(rows, 2) is rows
    assert "mismatched_ids" in with_others.to_read(rows, 2)[0]
    assert "mismatched_ids" in with_others.columns


def test_a_stream_is_filled_up_for_several_ranks(tmp_path):
    """Three rows for two ranks with two rows at a time: the first row is repeated, and marked."""
    made, stream = data(tmp_path), pairs(3).to_iterable_dataset()
    assert made.to_read(stream, 4) is stream
    made.args.__class__ = type("TwoRanks", (type(made.args),), {"world_size": 2})
    read = made.to_read(stream, 4)
    assert isinstance(read, IterableDataset)
    assert [row.get("repeated", False) for row in read] == [False, False, False, True]
    made.args.dataloader_drop_last = True
    assert [row["row"] for row in made.to_read(stream, 2)] == [0, 1]


def test_a_token_without_embedding_is_named_with_its_row(tmp_path):
    """Ids of prompts and responses are checked; the highest valid id is the number of embeddings minus 1."""
    rows = pairs(3)
    highest = max(token for row in rows for ids in (row["prompt_ids"], *row["response_ids"]) for token in ids)
    exact = PreferenceData(make_config(tmp_path), tiny_tokenizer(), embeddings=highest + 1)
    assert len(exact.prepare(rows, "train")) == 3
    fewer = PreferenceData(make_config(tmp_path), tiny_tokenizer(), embeddings=highest)
    with pytest.raises(
        ValueError, match=rf"train: row \d has token id {highest:,}, but the model has {highest:,} embedd"
    ):
        fewer.prepare(rows, "train")
    prompt = rows.map(lambda row: {"prompt_ids": [5000]})
    with pytest.raises(ValueError, match=r"eval: row 0 .*has token id 5,000"):
        exact.prepare(prompt, "eval")


def test_what_was_prepared_is_not_checked_again(tmp_path, caplog):
    """An evaluation can pass the dataset that the trainer has prepared; with other losses, it is checked again."""
    args = make_config(tmp_path)
    data = PreferenceData(args, tiny_tokenizer())
    rows = pairs(3).add_column("margins", [[0.5]] * 3)
    with caplog.at_level(logging.WARNING, "hf_prefopt"):
        prepared = data.prepare(rows, "eval")
        said = len(caplog.records)
        assert said and data.prepare(prepared, "eval") is prepared
        assert len(caplog.records) == said
        data.settle_again(None, prepared)
    assert len(caplog.records) == 2 * said


def test_an_empty_dict_of_evaluation_sets_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"eval_dataset is an empty dict.*leave it out"):
        make_trainer(tmp_path, eval_dataset={}, eval_strategy="epoch")


def test_raw_rows_given_after_construction_are_an_error_that_says_where_to_give_them(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="prompt, chosen, rejected are not those of prepared rows: pass the dataset"):
        trainer.train()
