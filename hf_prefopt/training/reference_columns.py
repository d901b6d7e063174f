"""Export cached reference log-probs as columns of a dataset, and import them to train without the reference model.

The columns are:

    ref_chosen_logps, ref_rejected_logps   for pairs: sums over the scored tokens, in nats (TRL's column names)
    ref_logps                              for single responses: the sum over the scored tokens, in nats
    ref_token_logps, ref_response_keys     for each response: log-probs of its tokens, and its cache key
    ref_model                              fingerprint of the reference

The import takes the log-probs from `ref_token_logps`. It raises an error if `ref_model` differs from the fingerprint of
the current reference. The fingerprint depends on the weights, the configuration, the temperature and the compute dtype
(`hf_prefopt.reference.cache_key`). A cache key is computed from the tokens of a prompt and its response. If these
tokens are different in a later run, the imported log-probs are not used, and the log-probs are computed as usual.
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
# Relative rounding error of sums of float32 numbers that were stored as text or as float32.
_ROUNDING = 1e-5


def export_reference(trainer: Any, dataset: Dataset, prepared: Dataset | None = None) -> Dataset:
    """Add the reference's log-probs to a dataset as columns. Log-probs that are not cached yet are computed first.

    Args:
        trainer: A `PreferenceTrainer` with `precompute_ref_log_probs`.
        dataset: The raw dataset that was passed to the trainer.
        prepared: The dataset after the trainer's preprocessing. Default: `trainer.train_dataset`. Rows that were
            dropped in preprocessing are not exported.

    Raises:
        ValueError: the trainer has no cached reference, or `dataset` and `prepared` do not match.
    """
    reference = _cached(trainer)
    prepared = trainer.train_dataset if prepared is None else prepared
    numbers = prepared["row"]
    if len(numbers) and max(numbers) >= len(dataset):
        raise ValueError(
            f"the prepared rows include row {max(numbers)}, but the dataset has only {len(dataset)} rows: pass the raw "
            "dataset that was passed to the trainer"
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
    """Return the index of the response for each of TRL's columns.

    If the row has pairs, the responses are those of the first pair.
    """
    if row.get("pairs"):
        return dict(zip((CHOSEN, REJECTED), row["pairs"][0], strict=True))
    return {SINGLE: 0} if len(row["response_ids"]) == 1 else {}


def import_reference(trainer: Any, dataset: Dataset) -> int:
    """Copy the log-probs that `export_reference` has added to a dataset into the cache. Call it before training.

    Args:
        trainer: A `PreferenceTrainer` with `precompute_ref_log_probs`.
        dataset: Rows with the columns that the docstring of this module lists.

    Returns:
        The number of responses that were not cached before.

    Raises:
        ValueError: the trainer has no cached reference; columns are missing; the log-probs are from another reference;
            or the columns were changed. In all of these cases nothing is imported.
    """
    reference = _cached(trainer)
    store, dtype = reference.store, _precision(reference)
    if missing := [name for name in (MODEL, TOKENS, KEYS) if name not in dataset.column_names]:
        raise ValueError(
            f"the dataset has no column {', '.join(missing)}, so its log-probs cannot be verified: import a dataset "
            "that export_reference has written, or train without importing (the log-probs are then computed)"
        )
    found: dict[bytes, Tensor] = {}
    for number, row in enumerate(dataset.select_columns([n for n in dataset.column_names if n.startswith("ref_")])):
        if row[MODEL] != store.folder.name:
            raise ValueError(
                f"row {number}: the reference log-probs are from another model, temperature or precision (fingerprint "
                f"{row[MODEL]}; this run: {store.folder.name}): train without importing them (the log-probs are then "
                "computed)"
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
        raise ValueError("the trainer has no cached reference log-probs: set precompute_ref_log_probs=True")
    return trainer.reference


def _check_sums(number: int, row: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a sum in the row is not the sum of any response's log-probs: then a column was changed."""
    sums = [sum(logps) for logps in row[TOKENS]]
    for name in (CHOSEN, REJECTED, SINGLE):
        value = row.get(name)
        if value is not None and not any(abs(value - total) <= _ROUNDING * (1 + abs(total)) for total in sums):
            raise ValueError(
                f"row {number}: {name} is {value}, but the sums of {TOKENS} are {sums}: one of the columns was changed "
                "after the export; export the log-probs again"
            )


def _precision(reference: CachedReference) -> torch.dtype:
    """Return the dtype of cached log-probs: float64 if the reference has float64 weights, otherwise float32."""
    parameters = reference.model.parameters() if reference.model is not None else ()
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
