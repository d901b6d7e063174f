"""Mix several datasets into one. Their columns may differ.

Each of these datasets, or sources, is prepared separately, in its own column layout. Prepared rows are then drawn from
the sources and concatenated. The prepared rows of each source are cached, so they are not tokenized again if only the
weights of the sources change.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, cast

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets

from hf_prefopt.data.held_out import held_out_rows, prompt_keys_of
from hf_prefopt.data.notes import plural
from hf_prefopt.data.sources import as_dataset
from hf_prefopt.kinds import ExampleKind, kind_of_columns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    Attributes:
        rows: Any dataset that `train_dataset` accepts.
        name: Name of the source in log messages and errors.
        weight: How often each row is used. With 2, every row is used twice. With 0.5, half of the rows are used, drawn
            at random. The weight of a stream must be a whole number, because the length of a stream is unknown.
        fraction: Share of the mixture's rows that come from this source, as in TRL. The fractions of all sources are
            divided by their sum. The mixture is as large as possible without repeating a row. Set `fraction` for all
            sources or for none.
        column_mapping: As in `PreferenceConfig`, but for this source only. If None, the value in the config is used.
        remove_columns: As in `PreferenceConfig`, but for this source only. If None, the value in the config is used.
        text_as: As in `PreferenceConfig`, but for this source only. If None, the value in the config is used.
    """

    rows: Any
    name: str
    weight: float = 1.0
    fraction: float | None = None
    column_mapping: dict[str, str] | None = None
    remove_columns: list[str] | None = None
    text_as: str | None = None


class Mixture:
    """Several datasets that are trained on, or evaluated, as one: `PreferenceTrainer(train_dataset=Mixture([...]))`.

    Example:
        ```python
        mixture = Mixture(
            [
                Source(load_dataset("trl-lib/ultrafeedback_binarized", split="train"), "ultrafeedback"),
                Source(load_dataset("Intel/orca_dpo_pairs", split="train"), "orca", weight=0.5),
            ]
        )
        train, held_out = mixture.hold_out(0.05)
        ```

    Args:
        sources: The datasets. Either all or none are streams.
        seed: Seed for drawing rows and held-out prompts. If streams have fractions, it also determines the order in
            which their rows are drawn.

    Raises:
        ValueError: If there are no sources, or if some sources are streams and others are not. If a weight is not above
            0, or the weight of a stream is not a whole number. If some sources have a fraction and others do not, if a
            fraction is not above 0, or if a source has both a fraction and a weight other than 1.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 42):
        self.seed = seed
        self.sources = [replace(source, rows=as_dataset(source.rows, "train")) for source in sources]
        self._check()

    @property
    def is_stream(self) -> bool:
        """Whether the sources are streams."""
        return isinstance(self.sources[0].rows, IterableDataset)

    def hold_out(self, share: float) -> tuple["Mixture", "Mixture"]:
        """Split the mixture into a mixture for training and a mixture of held-out rows for evaluation.

        No prompt is in both mixtures. The mixture of held-out rows has no weights or fractions: it uses each row once.

        Args:
            share: Share of the rows to hold out, between 0 and 1 (exclusive). It refers to all rows of the sources,
                before weights are applied.

        Returns:
            The mixture for training, and the mixture of held-out rows.

        Raises:
            ValueError: If the sources are streams, `share` is out of range, or the rows cannot be split by prompt.
        """
        if self.is_stream:
            raise ValueError(
                "a stream has no known length to hold out a share of: pass separate evaluation rows, or do not stream"
            )
        keys = [
            prompt_keys_of(source.rows, source.column_mapping, source.remove_columns, source.text_as or "text")
            for source in self.sources
        ]
        is_held = held_out_rows(np.concatenate(keys), share, self.seed)
        parts = np.split(is_held, np.cumsum([len(one) for one in keys])[:-1])
        train, held = [], []
        for source, part in zip(self.sources, parts, strict=True):
            train.append(replace(source, rows=source.rows.select(np.flatnonzero(~part))))
            held.append(replace(source, rows=source.rows.select(np.flatnonzero(part)), weight=1.0, fraction=None))
        return self._of(train), self._of(held)

    def _of(self, sources: list[Source]) -> "Mixture":
        return Mixture([source for source in sources if len(source.rows)], self.seed)

    def align(self, prepared: Sequence[Any], name: str) -> list[Any]:
        """Give the prepared rows of all sources the same columns, and return the rows of each source.

        If only some sources have an optional column, the other sources get it with its default value. If it has no
        default, it is removed from all sources.

        Args:
            prepared: The prepared rows of each source.
            name: Name of the dataset in log messages and errors.

        Raises:
            ValueError: If the sources hold different kinds of examples, or if only some of them have token weights.
        """
        names = [source.name for source in self.sources]
        kinds = [cast(ExampleKind, kind_of_columns(rows.column_names)) for rows in prepared]
        if len(set(kinds)) > 1:
            found = ", ".join(f"{source} holds {kind.name}" for source, kind in zip(names, kinds, strict=True))
            raise ValueError(
                f"{name}: {found}, but a mixture has one kind of examples: remove the sources of the other kind"
            )
        return _with_the_same_columns(prepared, names, name)

    def join(self, aligned: Sequence[Any], name: str) -> Dataset | IterableDataset:
        """Draw rows from all sources and concatenate them. Streams are interleaved instead.

        The rows are numbered again in the column `row`. The number of rows from each source is logged. For streams, it
        is not logged.

        Args:
            aligned: The result of `align`.
            name: Name of the dataset in log messages and errors.

        Raises:
            ValueError: If the weight or fraction of a source is so small that none of its rows is drawn.
        """
        if self.is_stream:
            return self._in_turns(aligned)
        counts = self.counts([len(rows) for rows in aligned])
        empty = [source.name for source, count in zip(self.sources, counts, strict=True) if not count]
        if empty:
            raise ValueError(f"{name}: no row of {empty[0]} is drawn: raise its weight, or remove it")
        drawn = [rows.select(self._draw(at, len(rows), counts[at])) for at, rows in enumerate(aligned)]
        joined = concatenate_datasets(drawn).remove_columns("row")
        parts = [
            f"{source.name} {count:,}" + (f" (of {len(rows):,})" if count != len(rows) else "")
            for source, count, rows in zip(self.sources, counts, aligned, strict=True)
        ]
        logger.warning("%s: a mixture of %s: %s", name, plural(len(joined), "row"), ", ".join(parts))
        return joined.add_column("row", list(range(len(joined))))

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """Return how many rows of the mixture come from each source.

        Args:
            sizes: The number of rows of each source.
        """
        if self.sources[0].fraction is None:
            return [round(source.weight * size) for source, size in zip(self.sources, sizes, strict=True)]
        shares = self._shares()
        total = min(size / share for size, share in zip(sizes, shares, strict=True))
        return [round(share * total) for share in shares]

    def _draw(self, at: int, size: int, count: int) -> np.ndarray:
        """Draw rows from a source, and return their indices.

        All rows are drawn as often as possible. For the rest, a random subset of the rows is drawn without replacement.

        Args:
            at: Index of the source.
            size: Number of rows of the source.
            count: Number of rows to draw.
        """
        rest = np.random.default_rng([self.seed, at]).choice(size, count % size, replace=False)
        return np.concatenate([np.tile(np.arange(size), count // size), np.sort(rest)])

    def _in_turns(self, streams: Sequence[Any]) -> IterableDataset:
        """Interleave the rows of streams.

        If the sources have fractions, each row comes from a stream that is drawn with these probabilities, until one
        stream ends. Otherwise, the streams take turns until all of them have ended.
        """
        repeated = [
            stream if source.weight == 1 else stream.repeat(int(source.weight))
            for source, stream in zip(self.sources, streams, strict=True)
        ]
        has_shares = self.sources[0].fraction is not None
        joined = interleave_datasets(
            repeated,
            probabilities=self._shares() if has_shares else None,
            seed=self.seed,
            stopping_strategy="first_exhausted" if has_shares else "all_exhausted_without_replacement",
        )
        return joined.map(_numbered, batched=True, with_indices=True, features=streams[0].features)

    def _shares(self) -> list[float]:
        fractions = [source.fraction or 0.0 for source in self.sources]
        return [fraction / sum(fractions) for fraction in fractions]

    def _check(self) -> None:
        if not self.sources:
            raise ValueError("a mixture needs at least one source")
        streams = [source.name for source in self.sources if isinstance(source.rows, IterableDataset)]
        if streams and len(streams) < len(self.sources):
            raise ValueError(
                f"{', '.join(streams)} of the mixture are streams, but the others are not: stream all or none"
            )
        for source in self.sources:
            for name, value in (("weight", source.weight), ("fraction", source.fraction or 0)):
                if isinstance(value, bool) or not isinstance(value, Real):
                    raise ValueError(f"{source.name}: {name}={value!r} must be a number, without quotes")
        if any(source.fraction is not None for source in self.sources):
            self._check_fractions()
        for source in self.sources:
            if not 0 < source.weight < np.inf or (streams and source.weight != int(source.weight)):
                wanted = "a whole number above 0, because a stream has no known length" if streams else "above 0"
                raise ValueError(f"{source.name}: weight={source.weight!r} must be {wanted}")

    def _check_fractions(self) -> None:
        for source in self.sources:
            if source.fraction is None or not 0 < source.fraction < np.inf:
                raise ValueError(
                    f"{source.name}: fraction={source.fraction!r}: set it above 0 for all sources, or none"
                )
            if source.weight != 1:
                raise ValueError(f"{source.name}: weight={source.weight} and fraction={source.fraction}: set only one")


def _numbered(columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
    return {"row": indices}


def _with_the_same_columns(prepared: Sequence[Any], names: Sequence[str], name: str) -> list[Any]:
    """Give the prepared rows of all sources the same columns, as `Mixture.align` describes.

    Args:
        prepared: The prepared rows of each source.
        names: Names of the sources.
        name: Name of the dataset in log messages and errors.
    """
    kind = cast(ExampleKind, kind_of_columns(prepared[0].column_names))
    every = dict.fromkeys(column for rows in prepared for column in rows.column_names)
    partial = {column: [rows for rows in prepared if column not in rows.column_names] for column in every}
    out = list(prepared)
    for column, lacking in partial.items():
        if not lacking:
            continue
        without = ", ".join(
            source for source, rows in zip(names, prepared, strict=True) if any(rows is one for one in lacking)
        )
        if column not in kind.optional_columns:
            raise ValueError(f"{name}: {without} has no column `{column}`, but the other sources have one")
        default = kind.optional_columns[column].default
        if default is None:
            out = [rows.remove_columns(column) if column in rows.column_names else rows for rows in out]
            logger.warning("%s: the column `%s` is removed, because %s does not have it", name, column, without)
        else:
            out = [rows if column in rows.column_names else _filled(rows, column, default) for rows in out]
            logger.warning("%s: `%s` is set to %g for %s, which does not have it", name, column, default, without)
    order = out[0].column_names
    return [rows.select_columns(order) for rows in out]


def _filled(rows: Any, column: str, value: float) -> Any:
    """Add a column to prepared rows. It holds a list with this value for each example of the row."""
    features = Features({**rows.features, column: List(Value("float64"))})
    return rows.map(_fill, features=features, fn_kwargs={"column": column, "value": value})


def _fill(row: dict[str, Any], column: str, value: float) -> dict[str, Any]:
    return {column: [value] * cast(ExampleKind, kind_of_columns(row)).count_examples(row)}
