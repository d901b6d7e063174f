"""Convert a column of lists to two NumPy arrays: the concatenated entries of all lists, and the length of each list."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths.

    Attributes:
        values: `[N]`, the concatenated entries of all lists.
        lengths: `[L]`, the number of entries of each list.
    """

    values: np.ndarray
    lengths: np.ndarray

    @cached_property
    def bounds(self) -> np.ndarray:
        """`[L + 1]`. List i consists of the entries `bounds[i]` to `bounds[i + 1] - 1` of `values`."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def sums(self) -> np.ndarray:
        """Return `[L]`: the sum of the entries of each list."""
        return np.diff(np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])[self.bounds])

    def as_bytes(self) -> Iterator[memoryview]:
        """Yield the bytes of each list."""
        view = np.ascontiguousarray(self.values).view(np.uint8).data
        bounds = (self.bounds * self.values.itemsize).tolist()
        return (view[bounds[at] : bounds[at + 1]] for at in range(len(self.lengths)))

    def are_equal(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return `[P]` bool: True if the lists `left[i]` and `right[i]` are equal. `left`, `right`: `[P]`, indices."""
        equal = self.lengths[left] == self.lengths[right]
        for at in np.flatnonzero(equal):
            one, other = (slice(self.bounds[side[at]], self.bounds[side[at] + 1]) for side in (left, right))
            equal[at] = np.array_equal(self.values[one], self.values[other])
        return equal


def ragged(column: pa.ChunkedArray, depth: int = 1) -> Ragged:
    """Return the innermost lists of a column. `depth` is 1 for a column of lists, 2 for a column of lists of lists."""
    for _ in range(depth - 1):
        column = pc.list_flatten(column)
    values = pc.list_flatten(column)
    return Ragged(_numpy(values), _numpy(pc.list_value_length(column)).astype(np.int64))


def pair_places(table: pa.Table) -> np.ndarray:
    """Return `[N, 2]`: for each pair, the indices of its two responses among all responses of these rows."""
    counts = ragged(table["response_ids"]).lengths
    first = np.repeat(np.cumsum(counts) - counts, ragged(table["pairs"]).lengths)
    return ragged(table["pairs"], 2).values.reshape(-1, 2) + first[:, None]


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
