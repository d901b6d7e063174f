"""A stream with a shard for each rank: a rank reads only its own shards, each row counts once, and no rank hangs.

Plain gradient descent in fp32, compared with one process that trains on the same rows in each step: weights of about 1
change by 1e-2 to 1e-1, a unit in the last place is 1.2e-7, and 1e-4 of the largest change is about ten units.
"""

import pytest
import torch.distributed as dist
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_prefopt.training.stream_shards import is_split_by_shards
from tests.distributed.cases import DESCENT
from tests.distributed.launch import largest_difference
from tests.distributed.scenes import play
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_config, make_trainer, pairs, weights

ROWS = 9


def stream(read, *shards):
    """Return a stream with these rows in each shard; the numbers of the rows that are read are added to `read`."""

    rows = pairs(ROWS)

    def generate(shards):
        for shard in shards:
            for number in shard:
                read.append(number)
                yield rows[number]

    return IterableDataset.from_generator(generate, rows.features, gen_kwargs={"shards": list(shards)})


def trainer_of(folder, rows, **settings):
    model = perturbed(with_lora(tiny_model()), 0.1)
    defaults = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "reference": "adapter_off"}
    return make_trainer(folder, model, train_dataset=rows, **{**DESCENT, **defaults, **settings})


def train(folder, *shards, resume=None, **settings):
    """Return the rows that a rank has read and trained on, the losses, and the weights."""
    read, steps = [], []
    trainer = trainer_of(folder, stream(read, *shards), **settings)
    begin = trainer.global_batch.begin

    def watched(pieces, collect):
        steps.append([int(row) for piece in pieces for row in piece["rows"]])
        begin(pieces, collect)

    trainer.global_batch.begin = watched
    read.clear()
    trainer.train(resume_from_checkpoint=resume)
    return {"read": read, "steps": steps, "losses": logged(trainer, "loss"), "weights": weights(trainer.model)}


def uneven(folder):
    return train(folder, [0, 1, 2], [3, 4], max_steps=3)


def one_rank_has_no_rows(folder):
    return train(folder, [0, 1, 2], [], max_steps=3)


def accumulated_over_epochs(folder):
    return train(folder, [0, 1, 2], [3, 4, 5, 6, 7], max_steps=5, gradient_accumulation_steps=2)


def compares_examples(folder):
    return train(folder, [0, 1, 2], [3, 4], max_steps=3, loss_type="aot", layout="padded")


def resumed(folder):
    saved = {"save_strategy": "steps", "save_steps": 2}
    train(folder, [0, 1, 2, 5], [3], max_steps=4, **saved)
    return train(folder, [0, 1, 2, 5], [3], max_steps=4, resume=str(folder / "checkpoint-2"), **saved)


def uninterrupted(folder):
    return train(folder, [0, 1, 2, 5], [3], max_steps=4)


def one_shard(folder):
    return train(folder, [0, 1, 2, 3, 4], max_steps=3)


def drops_last(folder):
    return train(folder, [0, 1, 2], [3, 4], max_steps=2, dataloader_drop_last=True)


def split_by_the_user(folder):
    rows = split_dataset_by_node(stream([], [0, 1], [3, 4]), dist.get_rank(), 2)
    trainer_of(folder, rows, max_steps=1).train()


SCENES = [
    uneven,
    one_rank_has_no_rows,
    accumulated_over_epochs,
    compares_examples,
    resumed,
    uninterrupted,
    one_shard,
    drops_last,
    split_by_the_user,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    found = play(SCENES, tmp_path_factory.mktemp("scenes"))
    return {
        name: [one if isinstance(one, dict) else AssertionError(one) for one in ranks] for name, ranks in found.items()
    }


def numbers(outcomes, scene, key):
    ranks = outcomes[scene.__name__]
    assert all(isinstance(one, dict) for one in ranks), ranks
    return [one[key] for one in ranks]


def test_each_rank_reads_its_own_shards(outcomes):
    """accelerate's loader reads one row ahead; a second epoch begins where the first one is used up."""
    assert numbers(outcomes, uneven, "read") == [[0, 1, 2], [3, 4]]
    whole = numbers(outcomes, one_shard, "read")
    assert whole == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (uneven, [[[0], [1], [2]], [[3], [4], []]]),
        (one_rank_has_no_rows, [[[0], [1], [2]], [[], [], []]]),
        # In each epoch, rank 0 reaches the end first; the last row of rank 1 becomes part of the next epoch's first
        # step.
        (
            accumulated_over_epochs,
            [[[0, 1], [2], [0, 1], [2], []], [[3, 4], [5, 6], [7, 3], [4, 5], [6, 7]]],
        ),
        (drops_last, [[[0], [2]], [[1], [3]]]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_row_is_trained_on_once_per_epoch(outcomes, scene, expected):
    assert numbers(outcomes, scene, "steps") == expected


@pytest.mark.parametrize("scene", [uneven, compares_examples], ids=lambda scene: scene.__name__)
def test_the_loss_is_the_mean_over_the_examples_of_all_ranks(outcomes, scene, tmp_path):
    """The steps with rows (0, 3), (1, 4) and (2) equal those of one process with two
    rows in a batch and one in the last.
    """
    loss = "aot" if scene is compares_examples else "dpo"
    rows = pairs(ROWS).select([0, 3, 1, 4, 2])
    order = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    plain = trainer_of(tmp_path, rows, loss_type=loss, **order)
    before = weights(plain.model)
    plain.train()
    expected = weights(plain.model)
    change = largest_difference(expected, before)
    assert change > 1e-3
    for found in numbers(outcomes, scene, "weights"):
        assert largest_difference(found, expected) <= 1e-4 * change
    for found in numbers(outcomes, scene, "losses"):
        assert found == pytest.approx(logged(plain, "loss"), abs=1e-5)


def test_a_run_resumes_after_the_last_row_of_a_rank(outcomes):
    for found, expected in zip(
        *(numbers(outcomes, scene, "weights") for scene in (resumed, uninterrupted)), strict=True
    ):
        assert largest_difference(found, expected) == 0


def test_a_stream_that_the_user_has_split_is_an_error(outcomes):
    for error in outcomes["split_by_the_user"]:
        assert "already split by split_dataset_by_node" in str(error)


@pytest.mark.parametrize(("shards", "ranks", "drops", "is_split"), [
    (2, 2, False, True), (3, 2, False, True), (1, 2, False, False), (2, 1, False, False), (2, 2, True, False),
])  # fmt: skip
def test_when_a_stream_is_split(tmp_path, shards, ranks, drops, is_split):
    args = make_config(tmp_path, dataloader_drop_last=drops)
    rows = pairs(6)
    assert is_split_by_shards(rows.to_iterable_dataset(num_shards=shards), args, ranks) == is_split
    assert not is_split_by_shards(rows, args, ranks)
