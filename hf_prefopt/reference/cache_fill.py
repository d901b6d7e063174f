"""Compute the reference log-probs of a dataset that are not cached yet, in large batches.

Each rank computes and writes a share of the responses. Then all ranks read all shards, even if each rank has its own
folder (see `cache_exchange`). An interrupted pass resumes after the last shard that was written.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.cache_exchange import exchange, say_whether_shared
from hf_prefopt.reference.cache_key import response_keys
from hf_prefopt.reference.engine import any_rank

# Tokens per forward pass. Without gradients, no activations are kept, so this number can be far above the limit in
# training.
TOKENS = {"cpu": 4096, "cuda": 16384}
_ROWS_AT_ONCE = 1000


class Inventory(NamedTuple):
    """The distinct responses of a dataset. Each field has one entry per response.

    Attributes:
        keys: Cache key of the response.
        rows, which: Place where the response first occurs: index of the row, and index of the response in the row.
        prompts: Number that identifies the prompt. It is derived from a hash and used only to group responses, so hash
            collisions are harmless.
        lengths: Number of tokens of prompt and response together.
    """

    keys: list[bytes]
    rows: np.ndarray
    which: np.ndarray
    prompts: np.ndarray
    lengths: np.ndarray


def responses_of(row: Mapping[str, Any]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return the token ids and the mask of each response of a row.

    This includes the mismatched responses, which belong to other prompts but are also scored after this one.
    """
    ids = [*row["response_ids"], *row.get("mismatched_ids", ())]
    masks = [*row["scored_masks"], *row.get("mismatched_masks", ())]
    return list(zip(ids, masks, strict=True))


def take_inventory(dataset: Any) -> Inventory:
    """Return the distinct responses of a dataset of known length."""
    seen: dict[bytes, None] = {}
    columns = array("q")  # only four integers per response, because a dataset may have millions of responses
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        indices = range(start, min(start + _ROWS_AT_ONCE, len(dataset)))
        for index, row in zip(indices, dataset.__getitems__(list(indices)), strict=True):
            prompt_ids, responses = row["prompt_ids"], responses_of(row)
            prompt = hash(tuple(prompt_ids))
            for which, key in enumerate(response_keys(prompt_ids, responses)):
                if key not in seen:
                    seen[key] = None
                    columns.extend((index, which, prompt, len(prompt_ids) + len(responses[which][0])))
    table = np.frombuffer(columns, dtype=np.int64).reshape(-1, 4)
    prompts = np.unique(table[:, 2], return_inverse=True)[1]
    return Inventory(list(seen), table[:, 0], table[:, 1], prompts, table[:, 3])


def plan_batches(inventory: Inventory, missing: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Divide the missing responses into batches. A batch is an array of indices into the inventory.

    Responses to the same prompt are adjacent, and prompts with the longest responses come first. A batch that is padded
    to its longest response has at most `tokens` tokens, unless it consists of a single response.
    """
    chosen = np.flatnonzero(missing)
    longest = np.zeros(inventory.prompts.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(longest, inventory.prompts[chosen], inventory.lengths[chosen])
    of_prompt = longest[inventory.prompts[chosen]]
    order = chosen[np.lexsort((inventory.prompts[chosen], -of_prompt))]
    batches, start, widest = [], 0, 0
    for end, place in enumerate(order):
        widest = max(widest, inventory.lengths[place])
        if end > start and (end + 1 - start) * widest > tokens:
            batches.append(order[start:end])
            start, widest = end, inventory.lengths[place]
    return [*batches, order[start:]] if len(order) else []


def single_responses(dataset: Any, inventory: Inventory, places: np.ndarray) -> list[dict[str, Any]]:
    """Return rows that contain only the responses at the given indices of the inventory.

    The dataset may contain any kind of examples.
    """
    wanted: dict[int, list[int]] = {}
    for place in places:
        wanted.setdefault(int(inventory.rows[place]), []).append(int(inventory.which[place]))
    rows = []
    for (index, which), row in zip(wanted.items(), dataset.__getitems__(list(wanted)), strict=True):
        ids, masks = zip(*(responses_of(row)[i] for i in which), strict=True)
        labels = [True] * len(which)
        rows.append(
            {
                "prompt_ids": row["prompt_ids"],
                "response_ids": ids,
                "scored_masks": masks,
                "labels": labels,
                "row": index,
            }
        )
    return rows


def fill(
    reference: CachedReference,
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], PreferenceBatch],
    accelerator: Accelerator,
    tokens: int | None = None,
    name: str = "train",
    silent: bool = False,
) -> None:
    """Compute and store the missing log-probs of a dataset; call it on every rank.

    Args:
        reference: Cache that wraps the live reference model.
        dataset: Prepared rows, of known length.
        collate: Function that collates rows into a batch with cache keys, on the device.
        accelerator: Accelerator used for communication between ranks.
        tokens: Maximum number of tokens per forward pass. Default: chosen for the device.
        name: Name of the dataset in the progress bar. silent: If True, show no progress bar.

    Raises:
        MissingLogProbs: log-probs are missing and the reference model was already released.
        LookupError: log-probs are missing after the pass, because a folder could not be written or read.
    """
    inventory = take_inventory(dataset)
    exchange(reference.store.folder, accelerator)
    reference.store.reload()
    missing = _missing_anywhere(accelerator, reference.store.missing(inventory.keys))
    if not missing.any():
        return
    if reference.live is None:
        raise reference.missing_error(int(missing.sum()), len(missing), f"the dataset {name!r}")
    batches = plan_batches(inventory, missing, tokens or TOKENS.get(accelerator.device.type, TOKENS["cuda"]))
    total, title = int(inventory.lengths[missing].sum()), f"Reference log-probs of {name}"
    bar = tqdm(total=total, desc=title, unit="tok", unit_scale=True, disable=silent)
    with bar as progress, accelerator.autocast():
        for number, places in _shares(batches, accelerator):
            batch = collate(single_responses(dataset, inventory, places))
            if number is None:
                reference.live.score(batch)
            else:
                reference.compute(batch)
                of_round = batches[number : number + accelerator.num_processes]
                progress.update(int(sum(inventory.lengths[part].sum() for part in of_round)))
    reference.store.flush()
    exchange(reference.store.folder, accelerator)
    reference.store.reload()
    left = _missing_anywhere(accelerator, reference.store.missing(inventory.keys)).sum()
    if left:
        raise LookupError(
            f"after computing reference log-probs, {left:,} of {len(missing):,} responses of the dataset {name!r} are "
            f"still missing from {reference.store.folder} on some process: see the warnings about its files, or set "
            "another reference_cache_dir"
        )


def _missing_anywhere(accelerator: Accelerator, missing: np.ndarray) -> np.ndarray:
    """Return True for each response that is missing on any rank.

    Ranks may see different files if another run writes to the folder at the same time.
    """
    if accelerator.num_processes == 1:
        return missing
    return np.logical_or.reduce(gather_object([missing]))


def _shares(batches: list[np.ndarray], accelerator: Accelerator) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yield (index, batch) for each batch of this rank.

    All ranks yield the same number of batches. A rank that has no batch left yields (None, last batch).
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    for first in range(0, len(batches), ranks):
        number = first + rank
        yield (number, batches[number]) if number < len(batches) else (None, batches[-1])


class CacheFiller:
    """Computes the reference log-probs of datasets that the cache does not have. Each dataset is processed only once.

    Args:
        reference: Cache that wraps the live reference model.
        collate: Function that collates rows into a batch with cache keys, on the device.
        accelerator: Accelerator used for communication between ranks.
        tokens: Maximum number of tokens per forward pass. Default: chosen for the device.
        silent: If True, show no progress bars.
    """

    def __init__(
        self,
        reference: CachedReference,
        collate: Callable[[list[dict[str, Any]]], PreferenceBatch],
        accelerator: Accelerator,
        tokens: int | None = None,
        silent: bool = False,
    ):
        self._reference, self._collate, self._accelerator = reference, collate, accelerator
        self._tokens, self._silent = tokens, silent
        self._filled: set[str | None] = set()

    def fill(self, dataset: Any, name: str) -> bool:
        """Compute the missing log-probs of a dataset.

        Return True. For a stream, do nothing and return False: its log-probs are computed when it is read.
        """
        if not hasattr(dataset, "__getitems__"):
            self._reference.any_rank = partial(any_rank, self._accelerator)
            return False
        if not self._filled:
            say_whether_shared(self._reference.store.folder, self._accelerator)
        fingerprint = getattr(dataset, "_fingerprint", None)
        if fingerprint is None or fingerprint not in self._filled:
            fill(self._reference, dataset, self._collate, self._accelerator, self._tokens, name, self._silent)
            self._filled.add(fingerprint)
        return True
