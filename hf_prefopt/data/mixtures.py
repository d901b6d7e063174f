"""Several data sets as one: a mixture, whose sources may have different columns.

Each source is prepared by itself, in its own column layout, and its prepared rows are then drawn and joined. Prepared
rows are cached by source, so that another weight tokenizes nothing again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """One data set of a mixture.

    Attributes:
        rows: whatever `train_dataset` may be.
        name: what messages call it.
        weight: how often each row is in the mixture: 2 takes every row twice, 0.5 half of the rows, drawn at random.
            Of a stream, whose length is unknown, a whole number.
        fraction: the share of the mixture that this source makes up, as TRL has it: shares are divided by their sum,
            and the mixture is as large as it can be without repeating a row. Given for all sources or for none.
        column_mapping, remove_columns, text_as: as in `PreferenceConfig`, for this source; None: as set there.
    """

    rows: Any
    name: str
    weight: float = 1.0
    fraction: float | None = None
    column_mapping: dict[str, str] | None = None
    remove_columns: list[str] | None = None
    text_as: str | None = None


class Mixture:
    """Data sets to be trained on, or evaluated, as one: `PreferenceTrainer(train_dataset=Mixture([...]))`.

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
        sources: the data sets. All are streams, or none.
        seed: which rows are drawn, and in which order streams take turns. The same seed gives the same rows.

    Raises:
        ValueError: no sources, a weight that is not above 0, fractions for some sources only, weights beside fractions,
            streams beside data sets, or a stream with a weight that is no whole number.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 42):
        self.seed = seed
        self.sources = [replace(source, rows=as_dataset(source.rows, "train")) for source in sources]
        self._check()

    @property
    def is_stream(self) -> bool:
        """Whether the rows come from streams."""
        return isinstance(self.sources[0].rows, IterableDataset)

    def hold_out(self, share: float) -> tuple["Mixture", "Mixture"]:
        """The mixture without a share of the rows, and these rows, each once. No prompt is in both.

        Args:
            share: above 0 and below 1, of all rows of the sources before weights.

        Raises:
            ValueError: streams, another share, or rows that cannot be split by their prompts.
        """
        if self.is_stream:
            raise ValueError(
                "a stream has no length to hold a share out of: give its rows to evaluate, or load it whole"
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
        """The prepared rows of each source, all with the same columns.

        An optional column that only some sources have gets its default in the others; without one it is left out.

        Args:
            prepared: the prepared rows of each source.
            name: what messages call the data set.

        Raises:
            ValueError: sources hold different kinds of examples, or only some have weights of tokens.
        """
        names = [source.name for source in self.sources]
        kinds = [cast(ExampleKind, kind_of_columns(rows.column_names)) for rows in prepared]
        if len(set(kinds)) > 1:
            found = ", ".join(f"{source} holds {kind.name}" for source, kind in zip(names, kinds, strict=True))
            raise ValueError(
                f"{name}: {found}, and a mixture has one kind of examples: leave out those of the other kind"
            )
        return _with_the_same_columns(prepared, names, name)

    def join(self, aligned: Sequence[Any], name: str) -> Dataset | IterableDataset:
        """The rows of all sources, in their order and numbered anew; a line says how many are of each.

        Args:
            aligned: what `align` has returned.
            name: what messages call the data set.

        Raises:
            ValueError: no rows of a source are drawn.
        """
        if self.is_stream:
            return self._in_turns(aligned)
        counts = self.counts([len(rows) for rows in aligned])
        empty = [source.name for source, count in zip(self.sources, counts, strict=True) if not count]
        if empty:
            raise ValueError(f"{name}: no row of {empty[0]} is drawn: raise its weight, or leave it out")
        drawn = [rows.select(self._draw(at, len(rows), counts[at])) for at, rows in enumerate(aligned)]
        joined = concatenate_datasets(drawn).remove_columns("row")
        parts = [
            f"{source.name} {count:,}" + (f" (of {len(rows):,})" if count != len(rows) else "")
            for source, count, rows in zip(self.sources, counts, aligned, strict=True)
        ]
        logger.warning("%s: a mixture of %s: %s", name, plural(len(joined), "row"), ", ".join(parts))
        return joined.add_column("row", list(range(len(joined))))

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """How many rows of each source are in the mixture. `sizes`: how many each source has."""
        if self.sources[0].fraction is None:
            return [round(source.weight * size) for source, size in zip(self.sources, sizes, strict=True)]
        shares = self._shares()
        total = min(size / share for size, share in zip(sizes, shares, strict=True))
        return [round(share * total) for share in shares]

    def _draw(self, at: int, size: int, count: int) -> np.ndarray:
        """The rows of one source: all of them as often as they fit, and the rest at random, none twice."""
        rest = np.random.default_rng([self.seed, at]).choice(size, count % size, replace=False)
        return np.concatenate([np.tile(np.arange(size), count // size), np.sort(rest)])

    def _in_turns(self, streams: Sequence[Any]) -> IterableDataset:
        """By fractions drawn at random until one stream ends; otherwise in turns until all have ended."""
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
                f"{', '.join(streams)} of the mixture are streams and the others are not: stream all or none"
            )
        if any(source.fraction is not None for source in self.sources):
            self._check_fractions()
        for source in self.sources:
            if not 0 < source.weight < np.inf or (streams and source.weight != int(source.weight)):
                wanted = "a whole number above 0, for a stream has no length" if streams else "above 0"
                raise ValueError(f"{source.name}: weight={source.weight!r} must be {wanted}")

    def _check_fractions(self) -> None:
        for source in self.sources:
            if source.fraction is None or not 0 < source.fraction < np.inf:
                raise ValueError(f"{source.name}: fraction={source.fraction!r}: give all sources one above 0, or none")
            if source.weight != 1:
                raise ValueError(f"{source.name}: weight={source.weight} beside fraction={source.fraction}: give one")


def _numbered(columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
    return {"row": indices}


def _with_the_same_columns(prepared: Sequence[Any], names: Sequence[str], name: str) -> list[Any]:
    """See `Mixture.align`."""
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
            raise ValueError(f"{name}: {without} has no `{column}`, and the other sources have")
        default = kind.optional_columns[column].default
        if default is None:
            out = [rows.remove_columns(column) if column in rows.column_names else rows for rows in out]
            logger.warning("%s: `%s` are left out, because %s has none", name, column, without)
        else:
            out = [rows if column in rows.column_names else _filled(rows, column, default) for rows in out]
            logger.warning("%s: `%s` of %s are %g, because it has none", name, column, without, default)
    order = out[0].column_names
    return [rows.select_columns(order) for rows in out]


def _filled(rows: Any, column: str, value: float) -> Any:
    """The prepared rows, of one example each, with this value in a new column."""
    features = Features({**rows.features, column: List(Value("float64"))})
    return rows.map(_fill, batched=True, features=features, fn_kwargs={"column": column, "value": value})


def _fill(columns: dict[str, list[Any]], column: str, value: float) -> dict[str, list[Any]]:
    return {column: [[value]] * len(columns["row"])}
