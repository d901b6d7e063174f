"""Summarize a prepared dataset in numbers: examples, tokens, and how response length relates to preference.

The dataset is read once, in batches, with Arrow and NumPy. Python loops handle only whole prompts and responses (to
hash or compare them), never single tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from datasets import Dataset
from xxhash import xxh3_128

from hf_prefopt.data.ragged import Ragged, pair_places, ragged
from hf_prefopt.kinds import kind_of_columns
from hf_prefopt.losses.kto import kto_weights

_BATCH_ROWS = 10_000


@dataclass(frozen=True)
class Lengths:
    """The median, the 95th percentile and the maximum of the lengths of texts, in tokens."""

    median: int = 0
    p95: int = 0
    longest: int = 0


@dataclass(frozen=True)
class DataSummary:
    """Counts of a prepared dataset.

    Attributes:
        kind: Name of the kind of its examples, such as "pairs" or "lists".
        rows, examples, responses: Numbers of rows, examples and responses.
        prompts: Number of distinct prompts.
        repeated_rows: Number of rows with the same prompt, responses and labels as an earlier row.
        identical_pairs: Number of pairs whose two responses have the same tokens.
        tokens: Tokens of prompt + response, summed over the responses.
        tokens_by_row: Number of tokens if the prompt of each row is counted once.
        tokens_by_prompt: Number of tokens if each distinct prompt, and each distinct response to it, is counted once.
            This is the number computed if all rows with the same prompt are in one batch (`group_by_prompt`).
        scored_tokens: Tokens whose log-prob counts, summed over the responses.
        lengths: Lengths of prompts and responses in tokens, keyed by a name such as "prompt" or "chosen".
        comparisons: Number of comparisons of a better response with a worse one. For pairs, this is the
            number of pairs. In a list, all pairs of responses with different ranks are compared. With labels, each
            desirable response is compared with each undesirable response of the dataset.
        longer, as_long: Shares of comparisons in which the better response has more scored tokens than the worse one
            (`longer`), or equally many (`as_long`); NaN without comparisons.
        desirable, undesirable: Numbers of responses with each label.
    """

    kind: str
    rows: int = 0
    examples: int = 0
    responses: int = 0
    prompts: int = 0
    repeated_rows: int = 0
    identical_pairs: int = 0
    tokens: int = 0
    tokens_by_row: int = 0
    tokens_by_prompt: int = 0
    scored_tokens: int = 0
    lengths: Mapping[str, Lengths] = field(default_factory=dict)
    comparisons: int = 0
    longer: float = float("nan")
    as_long: float = float("nan")
    desirable: int = 0
    undesirable: int = 0

    @property
    def longer_accuracy(self) -> float:
        """Accuracy of the rule "the longer response is the better one"; equal lengths count half."""
        return self.longer + self.as_long / 2

    @property
    def saved_by_row(self) -> float:
        """Share of tokens saved by computing each row's prompt once."""
        return 1 - self.tokens_by_row / self.tokens if self.tokens else 0.0

    @property
    def saved_by_prompt(self) -> float:
        """Share of tokens saved if all rows with the same prompt are in one batch."""
        return 1 - self.tokens_by_prompt / self.tokens if self.tokens else 0.0

    @property
    def kto_weights(self) -> tuple[float, float] | None:
        """(`desirable_weight`, `undesirable_weight`) recommended by the authors of KTO; None if a label is missing."""
        has_both = self.desirable > 0 and self.undesirable > 0
        return kto_weights(self.desirable, self.undesirable) if has_both else None


def summarize(dataset: Dataset) -> DataSummary:
    """Count the examples and tokens of prepared rows.

    Raises:
        ValueError: If the rows are not prepared.
    """
    kind = kind_of_columns(dataset.column_names)
    if kind is None:
        raise ValueError(
            f"columns {', '.join(dataset.column_names)} are not those of prepared rows: pass the dataset when you "
            "create the trainer, which prepares the rows"
        )
    if not len(dataset):
        return DataSummary(kind.name)
    needed = ["prompt_ids", "response_ids", "scored_masks", *kind.columns]
    tables = dataset.select_columns(needed).with_format("arrow").iter(batch_size=_BATCH_ROWS)
    total, compare = _Total(), _COMPARE[kind.columns[0]]
    for table in tables:
        rows = _Rows(table)
        total.add(rows, compare(rows))
    return total.summary(kind.name)


class _Rows:
    """A batch of prepared rows as arrays: P rows, which have R responses in total."""

    def __init__(self, table: pa.Table):
        self.table = table
        self.prompts = ragged(table["prompt_ids"])
        self.responses, self.masks = ragged(table["response_ids"], 2), ragged(table["scored_masks"], 2)
        self.counts = ragged(table["response_ids"]).lengths
        self.scored = self.masks.sums()


@dataclass(frozen=True)
class _Compared:
    """The comparisons in the examples of a batch of rows.

    Attributes:
        examples: Number of examples.
        lengths: Lengths of the responses in tokens, keyed by a name such as "chosen".
        better, worse: `[C]` each. Numbers of scored tokens of the better and of the worse response of each comparison.
            For labels, instead, those of all desirable and of all undesirable responses.
        identical: Number of pairs with equal responses.
        labels: `[B]` bool. True if the response is desirable. Empty if the examples have no labels.
        keys: The labels, ranks or quantiles of each of the P rows. If these differ, rows with equal responses are not
            counted as repeated. None for pairs.
    """

    examples: int
    lengths: Mapping[str, np.ndarray]
    better: np.ndarray
    worse: np.ndarray
    identical: int = 0
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    keys: Ragged | None = None


def _pairs(rows: _Rows) -> _Compared:
    """Compare the chosen and the rejected response of each pair."""
    chosen, rejected = pair_places(rows.table).T
    return _Compared(
        len(chosen),
        {"chosen": rows.responses.lengths[chosen], "rejected": rows.responses.lengths[rejected]},
        rows.scored[chosen],
        rows.scored[rejected],
        int(rows.responses.are_equal(chosen, rejected).sum()),
    )


def _labels(rows: _Rows) -> _Compared:
    """Collect single responses with labels. They are compared after all batches are read (`_compare_all`)."""
    keys = ragged(rows.table["labels"])
    labels, lengths = keys.values.astype(bool), rows.responses.lengths
    named = {"desirable": lengths[labels], "undesirable": lengths[~labels]}
    return _Compared(len(labels), named, rows.scored[labels], rows.scored[~labels], labels=labels, keys=keys)


def _lists(rows: _Rows) -> _Compared:
    """Compare each two responses of a list that differ in rank. Lists of equal length are processed together."""
    keys, first = ragged(rows.table["ranks"]), np.cumsum(rows.counts) - rows.counts
    better, worse = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for size in np.unique(rows.counts):
        places = first[rows.counts == size][:, None] + np.arange(size)
        ranks, scored = keys.values[places], rows.scored[places]
        is_better = ranks[:, :, None] < ranks[:, None, :]
        row, left, right = np.nonzero(is_better)
        better.append(scored[row, left])
        worse.append(scored[row, right])
    named = {"responses": rows.responses.lengths}
    return _Compared(len(rows.counts), named, np.concatenate(better), np.concatenate(worse), keys=keys)


def _quantiles(rows: _Rows) -> _Compared:
    """Collect single responses with quantiles. They are not compared."""
    none = np.zeros(0, dtype=np.int64)
    named = {"responses": rows.responses.lengths}
    return _Compared(len(rows.counts), named, none, none, keys=ragged(rows.table["quantiles"]))


# Functions that compare the examples of a batch, keyed by the first prepared column of their kind.
_COMPARE: Mapping[str, Callable[[_Rows], _Compared]] = {
    "pairs": _pairs,
    "labels": _labels,
    "quantiles": _quantiles,
    "ranks": _lists,
}


class _Total:
    """Counts over all batches of a dataset."""

    def __init__(self) -> None:
        self.parts: list[_Compared] = []
        self.prompt_lengths: list[np.ndarray] = []
        self.rows = self.responses = self.scored = self.tokens = self.by_row = self.by_prompt = self.repeated = 0
        self._prompts: set[bytes] = set()
        self._responses: set[bytes] = set()
        self._seen: set[bytes] = set()

    def add(self, rows: _Rows, compared: _Compared) -> None:
        """Add the counts of a batch of rows."""
        prompts, responses = int(rows.prompts.lengths.sum()), int(rows.responses.lengths.sum())
        self.rows += len(rows.counts)
        self.responses += len(rows.scored)
        self.scored += int(rows.scored.sum())
        self.by_row += prompts + responses
        self.tokens += int((rows.prompts.lengths * rows.counts).sum()) + responses
        self.prompt_lengths.append(rows.prompts.lengths)
        self.parts.append(compared)
        self._count_different(rows, compared.keys)

    def _count_different(self, rows: _Rows, keys: Ragged | None) -> None:
        """Count distinct prompts, distinct responses to the same prompt (see `group.Group`) and repeated rows."""
        responses = zip(rows.responses.as_bytes(), rows.masks.as_bytes(), rows.responses.lengths.tolist(), strict=True)
        others = keys.as_bytes() if keys is not None else iter([memoryview(b"")] * len(rows.counts))
        prompts = zip(rows.prompts.as_bytes(), rows.prompts.lengths.tolist(), rows.counts.tolist(), strict=True)
        for (prompt, length, count), key in zip(prompts, others, strict=True):
            of_prompt = xxh3_128(prompt).digest()
            self.by_prompt += _first_time(of_prompt, self._prompts) * length
            of_row = xxh3_128(key)
            for _ in range(count):
                ids, mask, length = next(responses)
                of_response = xxh3_128(of_prompt)
                of_response.update(ids)
                of_response.update(mask)
                of_row.update(of_response.digest())
                self.by_prompt += _first_time(of_response.digest(), self._responses) * length
            self.repeated += not _first_time(of_row.digest(), self._seen)

    def summary(self, kind: str) -> DataSummary:
        """Return the counts of all batches that were added."""
        labels, better, worse = (
            np.concatenate([getattr(part, name) for part in self.parts]) for name in ("labels", "better", "worse")
        )
        compare = _compare_all if len(labels) else _compare_each
        comparisons, longer, as_long = compare(better, worse)
        lengths = {name: [part.lengths[name] for part in self.parts] for name in self.parts[0].lengths}
        return DataSummary(
            kind,
            self.rows,
            sum(part.examples for part in self.parts),
            self.responses,
            len(self._prompts),
            self.repeated,
            sum(part.identical for part in self.parts),
            self.tokens,
            self.by_row,
            self.by_prompt,
            self.scored,
            {name: _lengths(parts) for name, parts in {"prompt": self.prompt_lengths, **lengths}.items()},
            comparisons,
            longer,
            as_long,
            int(labels.sum()),
            int((~labels).sum()),
        )


def _first_time(key: bytes, seen: set[bytes]) -> bool:
    """Add the key to the set. Return True if it was not in the set before."""
    before = len(seen)
    seen.add(key)
    return len(seen) > before


def _lengths(parts: list[np.ndarray]) -> Lengths:
    lengths = np.concatenate(parts)
    if not len(lengths):
        return Lengths()
    # For an even number of lengths, the median is the lower of the two middle lengths, so that it is an integer.
    median, p95 = np.quantile(lengths, [0.5, 0.95], method="inverted_cdf")
    return Lengths(int(median), int(p95), int(lengths.max()))


def _compare_each(better: np.ndarray, worse: np.ndarray) -> tuple[int, float, float]:
    """Compare `better[i]` with `worse[i]`, the numbers of scored tokens of two responses.

    Returns:
        The number of comparisons; the share in which the better response is longer; and the share with equal lengths.
    """
    if not len(better):
        return 0, float("nan"), float("nan")
    return len(better), float((better > worse).mean()), float((better == worse).mean())


def _compare_all(better: np.ndarray, worse: np.ndarray) -> tuple[int, float, float]:
    """Compare every better response with every worse one, and return the same three numbers as `_compare_each`."""
    count = len(better) * len(worse)
    if not count:
        return 0, float("nan"), float("nan")
    below, up_to = (np.searchsorted(np.sort(worse), better, side=side) for side in ("left", "right"))
    return count, float(below.sum() / count), float((up_to - below).sum() / count)
