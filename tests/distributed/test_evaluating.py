"""Under engines that shard, an evaluation with a token budget equals that of one process, however ranks split batches.

In fp32, a loss of log-probs of about 50 nats (unit in the last place: 4e-6) times β
= 0.1 differs by at most 1e-5: see `test_engines`.
"""

import pytest
from datasets import Dataset

from tests.distributed.engines import ENGINES, Engine
from tests.distributed.scenes import play
from tests.tiny_models import perturbed, random_rows, tiny_model
from tests.trainers import make_trainer, pairs

ONE_PROCESS = Engine()
# Two rows per rank: short | long, long | short, long | short, and a last batch that is filled with repeated rows.
LONG = [False] * 2 + [True] * 4 + [False] * 2 + [True] * 2 + [False] * 2 + [True]


def uneven_rows():
    rows = zip(random_rows(len(LONG), 1, longest=4), random_rows(len(LONG), 2, longest=14), strict=True)
    return Dataset.from_list([pair[is_long] for pair, is_long in zip(rows, LONG, strict=True)])


def evaluations(engine, folder, **settings):
    """Return the metrics of two evaluations (the second one reuses reference log-probs), and the pieces per batch."""
    settings = {"loss_type": "dpo", "max_tokens_per_batch": 30, "eval_dataset": uneven_rows(), **settings}
    data = {"train_dataset": pairs(2), "ref_model": perturbed(tiny_model(), 0.1, seed=3)}
    trainer = make_trainer(
        folder, per_device_train_batch_size=1, learning_rate=0.0, **data, **settings, **engine.settings
    )
    engine.adapt(trainer)
    trainer.train()
    counts, idle = [], trainer.global_batch.idle
    trainer.global_batch.idle = lambda batches: (counts.extend(len(b["pieces"]) for b in batches), idle(batches))[1]
    timing = ("runtime", "per_second", "epoch")
    found = [{n: v for n, v in trainer.evaluate().items() if not n.endswith(timing)} for _ in range(2)]
    return found, counts


def scene(engine, **settings):
    return lambda folder: evaluations(ENGINES[engine], folder, **settings)


SETTINGS = {
    "dpo": {},
    "dpo_padded": {"layout": "padded", "max_tokens_per_batch": 50},
    "tdpo2": {"loss_type": "tdpo2"},
    "cached": {"precompute_ref_log_probs": True},
}


def _named(engine):
    for name, settings in SETTINGS.items():
        function = scene(engine, **settings)
        function.__name__, function.__module__ = f"{engine}_{name}", __name__
        globals()[function.__name__] = function
        yield function


# DeepSpeed leaves settings that exclude FSDP, so FSDP2 comes first.
SCENES = {engine: list(_named(engine)) for engine in ("fsdp2", "zero3")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return play([scene for scenes in SCENES.values() for scene in scenes], tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("engine", SCENES)
def test_an_evaluation_is_that_of_one_process(outcomes, engine, name, tmp_path):
    ranks = outcomes[f"{engine}_{name}"]
    assert all(isinstance(outcome, tuple) for outcome in ranks), ranks[0]
    cuts = [counts for _, counts in ranks]
    assert len(cuts[0]) == len(cuts[1])
    assert {a < b for a, b in zip(*cuts, strict=True) if a != b} == {True, False}
    settings = {**SETTINGS[name], "max_tokens_per_batch": None}
    if name == "cached":
        settings["reference_cache_dir"] = str(tmp_path / "cache")
    (expected, _), _ = evaluations(ONE_PROCESS, tmp_path, **settings)
    for found, _ in ranks:
        for metrics in found:
            assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)
