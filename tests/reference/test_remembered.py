"""The reference runs once on an evaluation set, for any number of evaluations of the policy."""

import pytest
from datasets import Dataset

from hf_prefopt.reference.live import LiveReference
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.trainers import make_trainer


@pytest.fixture
def runs(monkeypatch):
    """Record the rows of every batch of rows that the reference runs on."""
    seen, score = [], LiveReference.score

    def counted(self, batch, token_stats=()):
        if "rows" in batch:
            seen.append(batch["rows"].tolist())
        return score(self, batch, token_stats)

    monkeypatch.setattr(LiveReference, "score", counted)
    return seen


def trainer_with(folder, rows, **settings):
    data = Dataset.from_list(rows)
    model = perturbed(with_lora(tiny_model()))
    settings = {"per_device_eval_batch_size": 2, "reference": "adapter_off", **settings}
    return make_trainer(folder, model, train_dataset=data, eval_dataset=data, **settings)


def test_a_second_evaluation_asks_nothing_of_it(tmp_path, runs):
    """Five rows, two per batch: three runs in the first evaluation, none in the second, and the same metrics."""
    trainer = trainer_with(tmp_path, random_rows(5))
    first, runs_of_first = trainer.evaluate(), len(runs)
    second = trainer.evaluate()
    assert (runs_of_first, len(runs)) == (3, 3)
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_rewards/margins"] == second["eval_rewards/margins"]


def test_another_data_set_is_not_taken_for_this_one(tmp_path, runs):
    """Another dataset has its own rows 0 to 4: its three batches are run, with the figures of a new trainer."""
    trainer = trainer_with(tmp_path, random_rows(5))
    trainer.evaluate()
    other = Dataset.from_list(random_rows(5, seed=9))
    fresh = trainer_with(tmp_path, random_rows(5, seed=9)).evaluate()
    runs.clear()
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(fresh["eval_loss"], rel=1e-6)
    assert len(runs) == 3


@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_one_number_in_concatenated_sets_are_told_apart(tmp_path, size):
    """The rows have equal lengths, so only the tokens differ. The evaluation equals one without stored log-probs."""
    rows = random_rows(3, longest=5)
    others = [
        {
            **row,
            "prompt_ids": [id + 1 for id in row["prompt_ids"]],
            "response_ids": [[3 + (id + 7) % 200 for id in ids] for ids in row["response_ids"]],
        }
        for row in rows
    ]
    trainer = trainer_with(tmp_path, rows + others, per_device_eval_batch_size=size)
    found = [trainer.evaluate()["eval_rewards/margins"] for _ in range(2)]
    trainer.scorer.reference_scores = lambda batch, dataset: trainer.scorer._run_reference(batch)
    expected = trainer.evaluate()["eval_rewards/margins"]
    assert found == pytest.approx([expected] * 2, rel=1e-6)


def test_training_never_reads_the_memory(tmp_path, runs):
    """After an evaluation, two steps of two of the same rows run the reference twice."""
    trainer = trainer_with(tmp_path, random_rows(4), per_device_train_batch_size=2, max_steps=2)
    trainer.evaluate()
    before = len(runs)
    trainer.train()
    assert len(runs) == before + 2
