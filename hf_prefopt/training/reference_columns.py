"""Cached reference log-probs as columns of a data set, to share, to look at, and to train from without the reference.

    ref_chosen_logps, ref_rejected_logps   of pairs: sums over the scored tokens, nats; TRL's names
    ref_logps                              of single responses: the same
    ref_token_logps, ref_response_keys     of every response: its tokens' log-probs, and what it is known by
    ref_model                              the fingerprint of the reference

Imported are the tokens' log-probs, and only those of the same reference: its fingerprint is made of its weights, its
configuration, the temperature and the dtype that it computes in (`hf_prefopt.reference.cache_key`). A response is found
by its tokens, so other tokens never get its log-probs: they are computed as if nothing had been imported.
"""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.cache_fill import responses_of
from hf_prefopt.reference.cache_key import response_keys

MODEL, TOKENS, KEYS = "ref_model", "ref_token_logps", "ref_response_keys"
CHOSEN, REJECTED, SINGLE = "ref_chosen_logps", "ref_rejected_logps", "ref_logps"
# Sums of float32 numbers that went through a file as text or as float32.
_ROUNDING = 1e-5


def export_reference(trainer: Any, dataset: Dataset, prepared: Dataset | None = None) -> Dataset:
    """The rows of a data set with the reference's log-probs beside them; what is not cached yet is computed.

    Args:
        trainer: a `PreferenceTrainer` with `precompute_ref_log_probs`.
        dataset: the raw rows that the trainer was given.
        prepared: the same as the trainer prepared them; by default `trainer.train_dataset`. Rows that it dropped are
            left out.

    Raises:
        ValueError: the trainer has no cached reference, or the two data sets do not belong together.
    """
    reference = _cached(trainer)
    prepared = trainer.train_dataset if prepared is None else prepared
    numbers = prepared["row"]
    if len(numbers) and max(numbers) >= len(dataset):
        raise ValueError(
            f"the trainer prepared row {max(numbers)}, and the data set has {len(dataset)} rows: pass its own"
        )
    trainer.scorer.settle()
    trainer.scorer.fill_cache(prepared, "export")
    columns: dict[str, list[Any]] = {}
    for row in prepared:
        for name, value in _columns_of(reference, row).items():
            columns.setdefault(name, []).append(value)
    rows = dataset.select(numbers)
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def _columns_of(reference: CachedReference, row: Mapping[str, Any]) -> dict[str, Any]:
    keys = response_keys(row["prompt_ids"], responses_of(row))
    logps = [tokens.tolist() for tokens in reference.store.get(keys)]
    return {
        **{name: sum(logps[place]) for name, place in _places(row).items()},
        TOKENS: logps,
        KEYS: [key.hex() for key in keys],
        MODEL: reference.store.folder.name,
    }


def _places(row: Mapping[str, Any]) -> dict[str, int]:
    """The response that each of TRL's columns is about: of the first pair, or of a single response."""
    if row.get("pairs"):
        return dict(zip((CHOSEN, REJECTED), row["pairs"][0], strict=True))
    return {SINGLE: 0} if len(row["response_ids"]) == 1 else {}


def import_reference(trainer: Any, dataset: Dataset) -> int:
    """Take over log-probs that `export_reference` has written; call it before training.

    Args:
        trainer: a `PreferenceTrainer` with `precompute_ref_log_probs`.
        dataset: rows with the columns above.

    Returns:
        How many responses were not known before.

    Raises:
        ValueError: the trainer has no cached reference; columns are missing; they are of another reference, or were
            changed. Then nothing is imported.
    """
    reference = _cached(trainer)
    store, dtype = reference.store, _precision(reference)
    if missing := [name for name in (MODEL, TOKENS, KEYS) if name not in dataset.column_names]:
        raise ValueError(
            f"the data set has no column {', '.join(missing)}, without which nobody can tell which model its log-probs "
            "are of: import what export_reference has written, or leave the columns out and let them be computed"
        )
    found: dict[bytes, Tensor] = {}
    for number, row in enumerate(dataset.select_columns([n for n in dataset.column_names if n.startswith("ref_")])):
        if row[MODEL] != store.folder.name:
            raise ValueError(
                f"row {number}: its reference log-probs are of another model (fingerprint {row[MODEL]}) than the "
                f"reference of this run ({store.folder.name}), or were computed at another temperature or precision: "
                "leave the columns out and let them be computed"
            )
        _check_sums(number, row)
        keys = map(bytes.fromhex, row[KEYS])
        found |= {key: torch.tensor(logps, dtype=dtype) for key, logps in zip(keys, row[TOKENS], strict=True)}
    new = [key for key, is_new in zip(found, store.missing(list(found)), strict=True) if is_new] if found else []
    for key in new:
        store.put(key, found[key])
    store.flush()
    return len(new)


def _cached(trainer: Any) -> CachedReference:
    if not isinstance(trainer.reference, CachedReference):
        raise ValueError("the trainer keeps no reference log-probs: set precompute_ref_log_probs=True")
    return trainer.reference


def _check_sums(number: int, row: Mapping[str, Any]) -> None:
    """Refuse a row whose sum is of no response in it: one of the two was changed."""
    sums = [sum(logps) for logps in row[TOKENS]]
    for name in (CHOSEN, REJECTED, SINGLE):
        value = row.get(name)
        if value is not None and not any(abs(value - total) <= _ROUNDING * (1 + abs(total)) for total in sums):
            raise ValueError(f"row {number}: {name} is {value}, and the sums of {TOKENS} are {sums}: one was changed")


def _precision(reference: CachedReference) -> torch.dtype:
    """What log-probs are kept in: float32, or float64 where the reference computes in it."""
    parameters = reference.model.parameters() if reference.model is not None else ()
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
