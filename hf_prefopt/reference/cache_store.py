"""Token log-probs on disk, in shards that are written atomically and checked when they are read.

A folder belongs to one reference. The folder's name is the fingerprint of the reference, and `about.json` describes the
reference in words. The folder contains shards. A shard is a safetensors file with three little-endian tensors:

    keys      uint8 `[R, 16]`        the key of each response (see `cache_key`)
    offsets   int64 `[R + 1]`        the start of each response's scored tokens in `logps`, and the end of the last one
    logps     float32 `[N]`          log-probs (nats) of the scored tokens; float64 if the reference computes in float64

The name of a shard is the XXH3-128 hash of the three tensors' bytes, so damaged files are detected. Any number of
processes and runs may write into a folder, because shards never change, and entries with the same key are equal.
"""

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_prefopt.reference.cache_key import KEY_BYTES

logger = logging.getLogger(__name__)

FORMAT = "hf_prefopt reference log-probs 1"
# A shard is written after this number of tokens or seconds. An interrupted run therefore loses at most this much work.
SHARD_TOKENS = 1 << 20
SHARD_SECONDS = 30.0
# A temporary file older than this belongs to a process that was killed.
_STALE_SECONDS = 3600.0


# The dtype of keys is raw bytes, so NumPy sorts and compares keys by all their bytes.
KEY = np.dtype(f"V{KEY_BYTES}")


class Shard(NamedTuple):
    """The content of a shard; see the module's docstring.

    Attributes:
        keys: `[R]`, with 16 bytes per entry.
        offsets: `[R + 1]` int64.
        logps: `[N]`. The tensor is memory-mapped from the file.
    """

    keys: np.ndarray
    offsets: np.ndarray
    logps: Tensor


class DamagedShard(ValueError):
    """Raised for a shard that cannot be used, for example because its content does not match its name."""


def write_shard(folder: Path, entries: Mapping[bytes, Tensor]) -> Path:
    """Write a shard with log-probs, keyed by response. The file gets its final name only when it is complete."""
    lengths = [0, *(len(logps) for logps in entries.values())]
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8).view(-1, KEY_BYTES),
        "offsets": torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        "logps": torch.cat(list(entries.values())),
    }
    path = folder / f"{_digest(**tensors)}.safetensors"
    temporary = folder / f"{uuid.uuid4().hex}.tmp"
    save_file(tensors, temporary, metadata={"format": FORMAT})
    os.replace(temporary, path)
    return path


def shards_of(folder: Path) -> list[Path]:
    """Return the shards in a folder, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def write_file(path: Path, content: bytes) -> None:
    """Write a file; it gets its final name only when it is complete."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def read_shard(path: Path) -> Shard:
    """Read and check a shard.

    Raises:
        DamagedShard: the file is not a shard, its content does not match its name, or its format is different.
        OSError: the file cannot be read; its content may still be valid.
    """
    try:
        with safe_open(path, "pt") as file:
            form = (file.metadata() or {}).get("format")
            keys, offsets, logps = (file.get_tensor(name) for name in ("keys", "offsets", "logps"))
    except (SafetensorError, ValueError) as error:
        path.read_bytes()  # raises `OSError` for a disk error, which safetensors may report as wrong content
        raise DamagedShard(f"cannot be read ({str(error).splitlines()[0]})") from None
    if form != FORMAT:
        raise DamagedShard(f"is of the format {form!r} and not {FORMAT!r}")
    if _digest(keys, offsets, logps) != path.stem:
        raise DamagedShard("has a checksum that differs from its name")
    return Shard(keys.numpy().reshape(-1).view(KEY), offsets.numpy(), logps)


def _as_array(keys: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), dtype=KEY)


def _digest(keys: Tensor, offsets: Tensor, logps: Tensor) -> str:
    digest = xxhash.xxh3_128()
    for tensor in (keys, offsets, logps):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class LogProbStore:
    """The log-probs of one reference: those in the shards of its folder, and those that are not written yet.

    Args:
        folder: the folder, which is created if it does not exist.
        about: a description of the reference for people, written to `about.json`.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None):
        self.folder = folder
        self._shards: list[Shard] = []
        self._names: set[str] = set()
        self._keys = np.empty(0, dtype=KEY)  # sorted
        self._places = np.empty((0, 2), dtype=np.int64)  # for each key: the indices of its shard and of its response
        self._waiting: dict[bytes, Tensor] = {}
        self._waiting_tokens, self._waiting_since = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        if about is not None and not (folder / "about.json").exists():
            write_file(folder / "about.json", (json.dumps({"format": FORMAT, **about}, indent=2) + "\n").encode())
        self.reload()

    def reload(self) -> None:
        """Load the shards that other processes have written.

        A damaged shard is renamed, with a warning. A shard that cannot be read now is left unchanged.
        """
        new = []
        for path in shards_of(self.folder):
            if path.stem not in self._names:
                try:
                    new.append(read_shard(path))
                    self._names.add(path.stem)
                except OSError as error:
                    logger.warning("%s cannot be read now (%s): its log-probs count as missing", path, error)
                except DamagedShard as damage:
                    # Another process may have renamed it already.
                    with contextlib.suppress(FileNotFoundError):
                        path.rename(path.with_suffix(".damaged"))
                        logger.warning("%s %s: its log-probs are computed again", path, damage)
        self._take_in(new)

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return `[R]` bool. True if the log-probs of the response with this key are missing."""
        unknown = self._find(_as_array(keys)) < 0
        if self._waiting:
            unknown &= [key not in self._waiting for key in keys]
        return unknown

    def get(self, keys: Sequence[bytes]) -> list[Tensor]:
        """Return the log-probs `[tokens]` of each response. Raises `KeyError` for a missing response."""
        found = zip(keys, self._find(_as_array(keys)), strict=True)
        return [self._waiting[key] if at < 0 else self._read(*self._places[at]) for key, at in found]

    def put(self, key: bytes, logps: Tensor) -> None:
        """Store the log-probs `[tokens]` of a response. If many are waiting to be written, write them to a shard."""
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._waiting[key] = logps
        self._waiting_tokens += len(logps)
        if self._waiting_tokens >= SHARD_TOKENS or time.monotonic() - self._waiting_since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the log-probs that are not written yet."""
        if self._waiting:
            path = write_shard(self.folder, self._waiting)
            self._waiting, self._waiting_tokens = {}, 0
            if path.stem not in self._names:
                self._names.add(path.stem)
                self._take_in([read_shard(path)])

    def _take_in(self, shards: list[Shard]) -> None:
        """Add the keys of these shards to the sorted index of all keys."""
        if not shards:
            return
        keys = np.concatenate([shard.keys for shard in shards])
        numbers = np.repeat(np.arange(len(shards)) + len(self._shards), [len(shard.keys) for shard in shards])
        places = np.stack([numbers, np.concatenate([np.arange(len(shard.keys)) for shard in shards])], axis=1)
        self._shards += shards
        keys, first = np.unique(keys, return_index=True)
        new = self._find(keys) < 0
        at = np.searchsorted(self._keys, keys[new])
        self._keys = np.insert(self._keys, at, keys[new])
        self._places = np.insert(self._places, at, places[first][new], axis=0)

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Return `[R]`: the index of each key among the sorted keys, or −1 if it is missing."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, at, -1)

    def _read(self, number: int, response: int) -> Tensor:
        shard = self._shards[number]
        return shard.logps[shard.offsets[response] : shard.offsets[response + 1]]

    def _remove_stale(self) -> None:
        for path in self.folder.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
