"""Two processes under DDP (gloo) fill one cache: each computes its share, and both read the whole cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_prefopt.reference.cache_store import read_shard

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return (folder, results of each rank)."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, str(REPOSITORY / "tests/reference/two_ranks.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_train_as_with_a_live_reference(ranks):
    """The pass splits the rows differently than training, so the last bits differ (see test_cache)."""
    for seen in ranks[1]:
        for name in ("cached", "again", "apart", "one is new"):
            assert seen[name]["loss"] == pytest.approx(seen["live"]["loss"], rel=1e-5)
            assert seen[name]["eval_loss"] == pytest.approx(seen["live"]["eval_loss"], rel=1e-5)


def test_each_rank_computes_its_share_and_then_none(ranks):
    """7 + 3 pairs are 20 responses. Each rank computes some of them, and none in the next run."""
    one, other = (seen["cached"]["responses"] for seen in ranks[1])
    # In the last round of a pass, a rank without a batch repeats a batch of the other rank and discards the result.
    assert 20 <= one + other <= 20 + 2 * 4 and min(one, other) >= 4
    assert [seen["again"]["responses"] for seen in ranks[1]] == [0, 0]


def stored(folder):
    return {key.tobytes() for path in folder.rglob("*.safetensors") for key in read_shard(path).keys}


def test_folders_of_their_own_are_filled_alike(ranks):
    """Each of two folders gets the 20 responses, and each rank computes some of them. In the next run, rank 0 has its
    folder and rank 1 a new one, which gets all responses without computing any.
    """
    folder, seen = ranks
    one, other = (rank["apart"]["responses"] for rank in seen)
    assert 20 <= one + other <= 20 + 2 * 4 and min(one, other) >= 4
    assert [rank["one is new"]["responses"] for rank in seen] == [0, 0]
    assert len(stored(folder / "cache0")) == 20
    assert stored(folder / "cache0") == stored(folder / "cache1") == stored(folder / "cache2")


def test_nothing_is_stored_twice(ranks):
    """No key is in two shards, and there are at least the 20 responses of the pairs and the 16 of the stream."""
    keys = [key.tobytes() for path in (ranks[0] / "cache").rglob("*.safetensors") for key in read_shard(path).keys]
    assert len(keys) == len(set(keys))
    assert len(keys) >= 20 + 16
