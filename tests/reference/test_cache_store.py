"""The files of the cache can be read from their documentation, and are complete after a kill at any moment."""

import errno
import hashlib
import json
import os
import random
import signal
import struct
import threading
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm.auto import tqdm

from hf_prefopt.data.layouts import PaddedCollator
from hf_prefopt.reference import cache_fill, cache_store
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.cache_fill import fill, plan_batches, single_responses, take_inventory
from hf_prefopt.reference.cache_key import KeyedCollator, fingerprint, response_keys
from hf_prefopt.reference.cache_store import LogProbStore
from hf_prefopt.reference.live import adapter_off, frozen_copy, separate_model
from hf_prefopt.scoring.forward import install_scoring, score
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import pairs


def scored_model():
    model = tiny_model()
    install_scoring(model)
    return model


def plain_key(prompt, response, mask):
    """Return a key as documented: BLAKE2b-128 of three lists, each preceded by its length as eight bytes."""
    parts = [np.array(prompt, "<i4"), np.array(response, "<i4"), np.array(mask, "u1")]
    data = b"".join(struct.pack("<Q", len(part)) + part.tobytes() for part in parts)
    return hashlib.blake2b(data, digest_size=16).digest()


def plain_read(path):
    """Read a shard with NumPy by safetensors' specification: eight bytes with the length, JSON, then the tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    dtypes = {"U8": "u1", "I64": "<i8", "F32": "<f4"}

    def tensor(name):
        about = header[name]
        start, end = (8 + length + offset for offset in about["data_offsets"])
        return np.frombuffer(data[start:end], dtypes[about["dtype"]]).reshape(about["shape"])

    return header["__metadata__"], *(tensor(name) for name in ("keys", "offsets", "logps"))


def test_another_program_can_read_the_files(tmp_path):
    """The log-probs of a response, found by a key that is computed from its ids, are
    those of the model, token by token.
    """
    model, data = scored_model(), pairs(3)
    reference = CachedReference(separate_model(model), tmp_path)
    fill(reference, data, KeyedCollator(PaddedCollator(0)), Accelerator(cpu=True), silent=True)
    (path,) = tmp_path.rglob("*.safetensors")
    metadata, keys, offsets, logps = plain_read(path)
    assert metadata == {"format": "hf_prefopt reference log-probs 1"}
    assert json.loads((path.parent / "about.json").read_text())["temperature"] == 1.0
    places = {key.tobytes(): number for number, key in enumerate(keys)}
    batch = PaddedCollator(0)(list(data))
    with torch.no_grad():
        expected = iter(score(model, batch).token_logps.split(batch["response_lengths"].tolist()))
    for row in data:
        for ids, mask in zip(row["response_ids"], row["scored_masks"], strict=True):
            at = places[plain_key(row["prompt_ids"], ids, mask)]
            np.testing.assert_allclose(logps[offsets[at] : offsets[at + 1]], next(expected), rtol=1e-5, atol=1e-5)


def test_a_key_tells_its_parts_apart():
    """Moving a token across the boundary between prompt and response, or to another list, changes the key."""
    keys = [
        response_keys([1, 2], [([3, 4], [1, 1])])[0],
        response_keys([1, 2, 3], [([4], [1])])[0],
        response_keys([1, 2], [([3, 4], [0, 1])])[0],
        response_keys([], [([1, 2, 3, 4], [1, 1, 1, 1])])[0],
    ]
    assert len({*keys}) == 4
    assert keys[0] == plain_key([1, 2], [3, 4], [1, 1])


FORMS = {
    "plain": {},
    "rank 8": {"r": 8, "seed": 3},
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_adapter_counts_when_it_is_on(form, tied):
    """With the adapter disabled, the fingerprint is that of the base model; with the
    adapter, it depends on its tensors.
    """

    def make():
        return with_lora(tiny_model(tie_word_embeddings=tied), **form)

    model, base = perturbed(make()), fingerprint(tiny_model(tie_word_embeddings=tied), 1.0, None)
    with adapter_off(model).switch():
        assert fingerprint(model, 1.0, None) == base
    on = fingerprint(model, 1.0, None)
    reference = frozen_copy(model)
    perturbed(model, seed=2)
    with reference.switch():
        assert fingerprint(model, 1.0, None) == on
    assert len({base, on, fingerprint(model, 1.0, None)}) == 3


def test_a_model_is_known_after_a_way_over_the_disk(tmp_path):
    """After saving and loading, or after installing the scoring forward, the reference has the same fingerprint."""
    model = tiny_model()
    before = fingerprint(model, 1.0, None)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    install_scoring(loaded)
    assert fingerprint(loaded, 1.0, None) == before


def test_batches_are_full_and_hold_every_missing_response_once():
    """Each batch is within the budget unless it is a single response; the responses of a prompt are consecutive."""
    data = pairs(20, longest=20)
    inventory = take_inventory(data)
    missing = np.arange(len(inventory.keys)) % 5 != 0
    batches = plan_batches(inventory, missing, tokens=120)
    order = np.concatenate(batches)
    assert sorted(order) == np.flatnonzero(missing).tolist()
    widths = [inventory.lengths[batch].max() for batch in batches]
    assert all(len(batch) * width <= 120 for batch, width in zip(batches, widths, strict=True))
    assert widths == sorted(widths, reverse=True)
    assert len(batches) < len(order) / 2
    prompts = inventory.prompts[order]
    assert (np.diff(prompts) != 0).sum() == len(np.unique(prompts)) - 1
    rows = [row for batch in batches for row in single_responses(data, inventory, batch)]
    assert sum(len(row["response_ids"]) for row in rows) == missing.sum()


def test_a_pass_that_is_killed_goes_on(tmp_path, monkeypatch):
    """Twenty processes are killed by SIGKILL at random moments of their pass, and one process finishes the pass.

    A shard is written after every batch of four responses. After every kill, each shard in
    the folder is complete, and no message reports damage. At the end, the 80 responses
    equal those of an uninterrupted pass, and at most one batch per kill was computed twice.
    """
    monkeypatch.setattr(cache_store, "SHARD_TOKENS", 1)
    monkeypatch.setattr(cache_store, "_STALE_SECONDS", 0.0)
    model, data, log = scored_model(), pairs(40), tmp_path / "computed"
    settings = {"collate": KeyedCollator(PaddedCollator(0)), "accelerator": Accelerator(cpu=True), "silent": True}
    inventory = take_inventory(data)

    def one_pass(folder):
        reference = CachedReference(separate_model(model), folder)
        live = reference.live.score

        def noted(batch):
            scores = live(batch)
            with log.open("ab") as file:
                file.write(b"." * len(batch["response_lengths"]))
            return scores

        reference.live.score = noted
        fill(reference, data, tokens=4 * 20, **settings)
        return reference.store

    expected = one_pass(tmp_path / "whole").get(inventory.keys)
    start = time.perf_counter()
    one_pass(tmp_path / "timed")
    duration = time.perf_counter() - start
    log.unlink()
    monkeypatch.setattr(cache_store.logger, "warning", lambda *message: pytest.fail(str(message)))
    moments, killed = random.Random(0), 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # a killed process may hold the parent's lock
            one_pass(tmp_path / "killed")
            os._exit(0)
        time.sleep(moments.uniform(0, duration / 4))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for shard in (tmp_path / "killed").rglob("*.safetensors"):
            cache_store.read_shard(shard)
    assert killed > 0
    store = one_pass(tmp_path / "killed")
    found = store.get(inventory.keys)
    for ours, theirs in zip(found, expected, strict=True):
        # The batches after a kill differ, and so do the last bits.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    widest = max(len(batch) for batch in plan_batches(inventory, np.ones(80, dtype=bool), 4 * 20))
    assert len(inventory.keys) <= log.stat().st_size <= len(inventory.keys) + killed * widest
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_waits_is_found_and_written(tmp_path, monkeypatch):
    """Shards are written after a number of tokens, after a time, and by flush; keys may end in zero bytes."""
    monkeypatch.setattr(cache_store, "SHARD_TOKENS", 10)
    entries = {bytes([n]) * 8 + bytes(8): torch.arange(float(n)) for n in range(1, 8)}
    store = LogProbStore(tmp_path)
    for key, logps in entries.items():
        store.put(key, logps)
        assert torch.equal(store.get([key])[0], logps)
    assert store.missing([*entries, bytes(16)]).tolist() == [False] * 7 + [True]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # 1+2+3+4 and 5+6 tokens; the seventh token waits
    monkeypatch.setattr(cache_store, "SHARD_SECONDS", 0.0)
    store.put(b"\xff" * 16, torch.zeros(1))
    again = LogProbStore(tmp_path)
    assert not again.missing([*entries, b"\xff" * 16]).any()
    assert all(torch.equal(a, b) for a, b in zip(again.get(list(entries)), entries.values(), strict=True))


def test_ranks_share_the_batches():
    """Seven batches on three ranks take three rounds on each rank. Every batch is
    stored once; extra runs are discarded.
    """
    batches = [np.array([n]) for n in range(7)]
    shares = []
    for rank in range(3):
        state = type("State", (), {"num_processes": 3, "process_index": rank})()
        shares.append(list(cache_fill._shares(batches, state)))
    assert [len(share) for share in shares] == [3, 3, 3]
    assert sorted(number for share in shares for number, _ in share if number is not None) == list(range(7))
    assert [number for number, _ in shares[2]] == [2, 5, None]


@pytest.mark.parametrize("says", [OSError(errno.ESTALE, "Stale file handle"), SafetensorError("I/O error")], ids=type)
def test_a_shard_that_cannot_be_read_now_stays(says, tmp_path, monkeypatch, caplog):
    """A disk error, even one that safetensors reports as invalid content, causes a warning, and the keys are missing.
    When the shard can be read again, all its keys are found.
    """
    key = b"k" * 16
    first = LogProbStore(tmp_path)
    first.put(key, torch.tensor([-1.0, -2.0]))
    first.flush()
    (shard,) = tmp_path.glob("*.safetensors")

    def fails(*_):
        raise says

    with monkeypatch.context() as broken:
        broken.setattr(cache_store, "safe_open", fails)
        broken.setattr("pathlib.Path.read_bytes", lambda _: disk_fault())
        store = LogProbStore(tmp_path)
        assert store.missing([key]).all() and "cannot be read now" in caplog.text
    assert shard.exists() and not list(tmp_path.glob("*.damaged"))
    store.reload()
    assert store.get([key])[0].tolist() == [-1.0, -2.0]


def disk_fault():
    raise OSError(errno.EIO, "Input/output error")
