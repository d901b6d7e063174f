"""Wrong arguments raise an error that says what to pass instead; an empty dataset is named."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig

from hf_prefopt import PreferenceTrainer
from tests.data.helpers import text_pair
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_config, make_trainer, pairs

ROWS = [text_pair(), text_pair()]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, at):
        return ROWS[at]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def generate():
    yield from ROWS


def splits(**named):
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in named.items()})


def model():
    return tiny_model(vocab_size=600)


SOURCES = {
    "list": ROWS,
    "rows with other keys": [ROWS[0], {**ROWS[1], "id": 1}],
    "frame": pd.DataFrame(ROWS),
    "columns": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "generating function": generate,
    "torch": Rows(),
    "splits": splits(test=ROWS[:1], train=ROWS),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_holds_rows_is_a_data_set_to_train_on(name, tmp_path):
    given = {"processing_class": tiny_tokenizer(), "max_steps": 1}
    trainer = make_trainer(tmp_path, model(), train_dataset=SOURCES[name], **given)
    expected = make_trainer(tmp_path, model(), train_dataset=Dataset.from_list(ROWS), **given)
    assert [row["response_ids"] for row in trainer.train_dataset] == [
        row["response_ids"] for row in expected.train_dataset
    ]


def test_a_key_of_a_later_row_is_a_column(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "persona": "You are a pirate."}]
    with pytest.raises(ValueError, match="row 1: `persona` contains"):
        make_trainer(tmp_path, model(), train_dataset=rows, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ("columns", "splits")])
def test_what_holds_rows_is_a_data_set_to_evaluate(name, tmp_path):
    """A dataset is accepted at construction, as one of several datasets, and in a later call."""
    trainer = make_trainer(tmp_path, model(), eval_dataset=SOURCES[name], processing_class=tiny_tokenizer())
    assert len(trainer.eval_dataset) == len(trainer._prepared(SOURCES[name], "test")) == 2
    several = {"easy": pairs(2), "hard": SOURCES[name]}
    assert (
        len(
            make_trainer(tmp_path, model(), eval_dataset=several, processing_class=tiny_tokenizer()).eval_dataset[
                "hard"
            ]
        )
        == 2
    )


def test_a_generator_is_read_once_and_the_split_that_is_used_is_named(tmp_path, caplog):
    given = {"processing_class": tiny_tokenizer()}
    assert len(make_trainer(tmp_path, model(), train_dataset=generate(), **given).train_dataset) == 2
    make_trainer(tmp_path, model(), train_dataset=SOURCES["splits"], **given)
    assert "train: the split 'train' is used, but not 'test'" in caplog.text


MISTAKES = {
    "texts": (["a", "b"], "row 0 is a str: make each row a dict"),
    "mixed": ([ROWS[0], {**ROWS[1], "chosen": 4}], "row 1: `chosen` is of type int, and of type str in the rows"),
    "torch stream": (Stream(), r"is a Stream, .* IterableDataset\.from_generator"),
    "name": ("trl-lib/ultrafeedback_binarized", r"is a str, .* load_dataset\(name, split='train'\)"),
    "path": (Path("rows.jsonl"), r"is a PosixPath, .* load_dataset\('json'"),
    "number": (3, "is a int, .* convert it to a Dataset or an IterableDataset"),
    "splits of other names": (
        splits(easy=ROWS, hard=ROWS),
        r"'train' is a DatasetDict of easy, hard: pass one of them, as in train_dataset=splits\['easy'\]",
    ),
    "splits of a stream": (
        IterableDatasetDict(train_prefs=Dataset.from_list(ROWS).to_iterable_dataset()),
        r"is a IterableDatasetDict of train_prefs: .*splits\['train_prefs'\]",
    ),
    "a dict of other things": ({"prompt": "a", "chosen": "b"}, "is a dict of prompt, chosen: pass a dataset"),
}


@pytest.mark.parametrize("given", MISTAKES)
def test_what_is_no_data_set_to_train_on(given, tmp_path):
    data, message = MISTAKES[given]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, train_dataset=data)


@pytest.mark.parametrize("given", ["texts", "mixed", "torch stream", "name", "path", "number"])
def test_what_is_no_data_set_to_evaluate(given, tmp_path):
    """The error is raised at construction, for one of several datasets, and in a later call."""
    data, message = MISTAKES[given]
    trainer = make_trainer(tmp_path)
    for call in (
        lambda: make_trainer(tmp_path, eval_dataset=data),
        lambda: make_trainer(tmp_path, eval_dataset={"easy": pairs(2), "hard": data}),
        lambda: trainer.predict(data),
        lambda: trainer.get_eval_dataloader(data) if given != "name" else make_trainer(tmp_path, eval_dataset=data),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_several_sets_are_evaluated(tmp_path):
    splits = DatasetDict(easy=pairs(2), hard=pairs(4))
    metrics = make_trainer(tmp_path, eval_dataset=splits).evaluate()
    assert {"eval_easy_loss", "eval_hard_loss"} <= metrics.keys()


@pytest.mark.parametrize("kind", [DPOConfig, TrainingArguments])
def test_another_librarys_arguments(kind, tmp_path):
    args = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match=f"args is a {kind.__name__}: PreferenceTrainer takes a PreferenceConfig"):
        PreferenceTrainer(tiny_model(), args=args, train_dataset=pairs(2), processing_class=tiny_tokenizer())
    with pytest.raises(TypeError, match=f"ref_model is a {kind.__name__}.*args="):
        PreferenceTrainer(tiny_model(), args, train_dataset=pairs(2))
    with pytest.raises(TypeError, match="ref_model is a PreferenceConfig"):
        PreferenceTrainer(tiny_model(), make_config(tmp_path), train_dataset=pairs(2))
    with pytest.raises(TypeError, match="args is a dict"):
        PreferenceTrainer(tiny_model(), args={"output_dir": "x"}, train_dataset=pairs(2))


EMPTY = {
    "raw": Dataset.from_list(ROWS).select([]),
    "prepared": pairs(2).select([]),
    "without columns": Dataset.from_dict({}),
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
def test_a_set_without_rows_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="the dataset 'train' has no rows"):
        make_trainer(tmp_path, train_dataset=data)
    with pytest.raises(ValueError, match="the dataset 'eval' has no rows"):
        make_trainer(tmp_path, eval_dataset=data)
    with pytest.raises(ValueError, match="the dataset 'hard' has no rows"):
        make_trainer(tmp_path, eval_dataset={"easy": pairs(2), "hard": data})
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="the dataset 'eval' has no rows"):
        trainer.evaluate(data)
    with pytest.raises(ValueError, match="the dataset 'test' has no rows"):
        trainer.predict(data)


def test_a_set_all_of_which_is_dropped_is_named(tmp_path):
    bad = Dataset.from_list([text_pair(chosen="")] * 3)
    for split in ("train", "eval"):
        with pytest.raises(ValueError, match=rf"{split}: none of 3 rows is left\n  3 unusable rows dropped"):
            make_trainer(tmp_path, processing_class=tiny_tokenizer(), on_bad_rows="drop", **{f"{split}_dataset": bad})


def test_a_stream_without_rows_is_refused_when_it_is_read(tmp_path):
    """The stream is empty from the start, or all of its rows were dropped: there is
    nothing to train on or to evaluate.
    """
    empty = IterableDataset.from_generator(lambda: iter([]), features=pairs(2).features)
    bad = Dataset.from_list([text_pair(chosen="")] * 3).to_iterable_dataset()
    for data in (empty, bad):
        given = {"processing_class": tiny_tokenizer(), "on_bad_rows": "drop", "max_steps": 1}
        with pytest.raises(ValueError, match="nothing was trained: the training stream"):
            make_trainer(tmp_path, train_dataset=data, **given).train()
        with pytest.raises(ValueError, match="evaluation dataset is empty"):
            make_trainer(tmp_path, eval_dataset=data, **given).evaluate()


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        ({"peft_config": {"r": 4}}, r"peft_config is a dict: pass one PEFT configuration"),
        ({"peft_config": [LoraConfig()]}, r"peft_config is a list"),
        ({"processing_class": "a folder"}, r"AutoTokenizer\.from_pretrained"),
    ],
)
def test_arguments_of_another_type(given, cure, tmp_path):
    with pytest.raises(TypeError, match=cure):
        make_trainer(tmp_path, **given)


def test_models_are_named_by_paths_too(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    trainer = make_trainer(tmp_path / "run", folder, ref_model=folder, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_an_optimizer_set_by_hand_holds_what_trains(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.optimizer = torch.optim.SGD(tiny_model().parameters(), 1.0)
    with pytest.raises(ValueError, match="lacks 21 of the 21 trained parameters"):
        trainer.train()


def test_a_policy_frozen_by_hand_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the policy"):
        trainer.train()


def test_a_batch_of_another_shape_is_an_error_that_says_what_to_do(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match=r"expects one piece of a batch: call it for each piece in batch\['pieces'\]"):
        trainer.compute_loss(trainer.model, batch)
    for call in (
        lambda flat: trainer.get_batch_samples(iter([flat]), 1, "cpu"),
        lambda flat: trainer.prediction_step(trainer.model, flat, True),
    ):
        with pytest.raises(ValueError, match=r"collate_fn=trainer\.data_collator"):
            call(batch["pieces"][0])


def test_several_gpus_of_one_process_are_refused_before_anything_is_loaded(tmp_path):
    args = make_config(tmp_path)
    args._n_gpu = 2  # the number of rows that transformers counts
    with pytest.raises(ValueError, match="2 GPUs"):
        PreferenceTrainer("no/such/model", args=args, train_dataset=pairs(2))


def test_a_removed_callback_that_training_needs_is_an_error(tmp_path):
    """Without this callback, a moving reference would not be updated."""
    trainer = make_trainer(tmp_path, sync_ref_model=True, max_steps=1)
    trainer.callback_handler.callbacks = []
    with pytest.raises(ValueError, match=r"ScorerEvents, RanksAgree were removed.*trainer\.remove_callback"):
        trainer.train()
