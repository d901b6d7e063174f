"""Prepared pairs as unpaired examples: the chosen response a desirable one, the rejected an undesirable one.

They become rows of their own, so that whatever shuffles the rows shuffles the two apart.
"""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset

from hf_prefopt.data.extras import present_extras
from hf_prefopt.kinds import UNPAIRED

# Streams are shuffled where they are read, so the two rows of a pair are moved apart here, within so many rows.
STREAM_BUFFER = 1000


def unpair(dataset: Dataset | IterableDataset, features: Features, seed: int = 0) -> Dataset | IterableDataset:
    """Two rows of the unpaired kind for each prepared row, which holds one pair; rows 2n and 2n + 1 were row n.

    Args:
        dataset: prepared pairs.
        features: those of prepared unpaired rows.
        seed: of the order of a stream.

    Raises:
        ValueError: a row holds several pairs, whose responses would count more than once.
    """
    how = {"batched": True, "features": features, "remove_columns": dataset.column_names}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_unpair_batch, **how).shuffle(seed=seed, buffer_size=STREAM_BUFFER)
    return dataset.map(_unpair_batch, desc="Unpairing", **how)


def _unpair_batch(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    extras = present_extras(UNPAIRED, columns)
    names = ("prompt_ids", "response_ids", "scored_masks", "labels", "row", *extras)
    out: dict[str, list[Any]] = {name: [] for name in names}
    for at, row in enumerate(columns["row"]):
        if len(columns["pairs"][at]) != 1:
            raise ValueError(f"row {row:,} holds {len(columns['pairs'][at])} pairs: unpair=True takes one pair a row")
        for side, response in enumerate(columns["pairs"][at][0]):
            out["prompt_ids"].append(columns["prompt_ids"][at])
            out["response_ids"].append([columns["response_ids"][at][response]])
            out["scored_masks"].append([columns["scored_masks"][at][response]])
            out["labels"].append([side == 0])
            out["row"].append(2 * row + side)
            for extra in extras:
                out[extra].append(columns[extra][at])
    return out
