"""Columns of prepared rows as NumPy arrays: all tokens of a batch of rows, and where each list of them begins."""

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
        values: `[N]`, the entries of all lists, one list after the other.
        lengths: `[L]`, the number of entries of each list.
    """

    values: np.ndarray
    lengths: np.ndarray

    @cached_property
    def bounds(self) -> np.ndarray:
        """`[L + 1]`: list i has the entries `bounds[i]` to `bounds[i + 1] - 1`."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def sums(self) -> np.ndarray:
        """`[L]`, the sum of each list."""
        return np.diff(np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])[self.bounds])

    def as_bytes(self) -> Iterator[memoryview]:
        """The bytes of each list."""
        view = np.ascontiguousarray(self.values).view(np.uint8).data
        bounds = (self.bounds * self.values.itemsize).tolist()
        return (view[bounds[at] : bounds[at + 1]] for at in range(len(self.lengths)))

    def are_equal(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """`[P]` bool: whether the lists of each pair are the same. `left`, `right`: `[P]`, numbers of lists."""
        equal = self.lengths[left] == self.lengths[right]
        for at in np.flatnonzero(equal):
            one, other = (slice(self.bounds[side[at]], self.bounds[side[at] + 1]) for side in (left, right))
            equal[at] = np.array_equal(self.values[one], self.values[other])
        return equal


def ragged(column: pa.ChunkedArray, depth: int = 1) -> Ragged:
    """The innermost lists of a column of lists, or of lists of lists (`depth=2`)."""
    for _ in range(depth - 1):
        column = pc.list_flatten(column)
    values = pc.list_flatten(column)
    return Ragged(_numpy(values), _numpy(pc.list_value_length(column)).astype(np.int64))


def pair_places(table: pa.Table) -> np.ndarray:
    """`[N, 2]`: the numbers of the two responses of each pair, among all responses of these rows."""
    counts = ragged(table["response_ids"]).lengths
    first = np.repeat(np.cumsum(counts) - counts, ragged(table["pairs"]).lengths)
    return ragged(table["pairs"], 2).values.reshape(-1, 2) + first[:, None]


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
