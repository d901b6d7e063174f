"""The examples of a data set as the losses see them, before the first step.

What cannot be compared is refused with its row; what a loss advises is said once, and that examples have weights.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from hf_prefopt.batch import join_examples
from hf_prefopt.data.notes import describe_weights
from hf_prefopt.kinds import ExampleKind
from hf_prefopt.losses.base import UnsuitableExamples
from hf_prefopt.objective.objective import Objective
from hf_prefopt.objective.term import Term

logger = logging.getLogger(__name__)


def check_examples(dataset: Dataset | IterableDataset, objective: Objective, name: str) -> Dataset | IterableDataset:
    """The data set, whose examples have been found fit for the losses; those of a stream are looked at when reached.

    Args:
        dataset: prepared rows of the kind that the objective compares.
        name: what errors call the data set.

    Raises:
        ValueError: examples that a loss cannot compare, or a number that is missing or out of range, with its row.
    """
    kind = objective.kind
    optional_columns = [extra for extra in objective.inputs if extra in kind.optional_columns]
    has_checks = bool(optional_columns) or any(term.spec.check_data for term in objective.terms)
    if isinstance(dataset, IterableDataset):
        # What a row without anything would be refused for, every row is asked for.
        if not has_checks and kind.refusal({}, objective.inputs) is None:
            return dataset
        if objective.use_weights:
            logger.warning(describe_weights(name))
        how = {"objective": objective, "name": name}
        return dataset.map(_look_at_batch, batched=True, features=dataset.features, fn_kwargs=how)
    if not has_checks:
        return dataset
    wanted = [*(column for column in kind.columns), *optional_columns, "row"]
    rows = dataset.select_columns([column for column in wanted if column in dataset.column_names]).with_format(None)
    parts = [_facts(_rows_of(batch), kind) for batch in rows.iter(batch_size=1000)]
    if parts:
        facts = {fact: join_examples([part[fact] for part in parts]) for fact in parts[0]}
        _look_at(facts, objective, name)
        if "weights" in optional_columns and "weights" in facts:
            logger.warning(describe_weights(name, facts["weights"].numpy()))
    return dataset


def _rows_of(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _facts(rows: Sequence[Mapping[str, Any]], kind: ExampleKind) -> dict[str, Tensor]:
    """The facts of the examples, and for each the number of its `row`."""
    facts = {name: torch.from_numpy(values) for name, values in kind.batch_inputs_of(rows).items()}
    numbers = torch.tensor([row["row"] for row in rows])
    return {**facts, "row": numbers.repeat_interleave(torch.tensor([kind.count_examples(row) for row in rows]))}


def _look_at_batch(columns: Mapping[str, list[Any]], objective: Objective, name: str) -> dict[str, list[Any]]:
    rows = _rows_of(columns)
    for row in rows:
        reason = objective.kind.refusal(row, objective.inputs)
        if reason is not None:
            losses = ", ".join(term.spec.name for term in objective.terms)
            raise ValueError(f"{name} does not fit {losses}: row {row['row']:,}: {reason}")
    _look_at(_facts(rows, objective.kind), objective, name, advise=False)
    return {}


def _look_at(facts: dict[str, Tensor], objective: Objective, name: str, advise: bool = True) -> None:
    """Raise for what is unsuitable, and log the advice that the losses have."""
    for extra in objective.inputs:
        if extra in objective.kind.optional_columns and extra in facts:
            _check_numbers(extra, facts, objective.kind, name)
    for term in objective.terms:
        try:
            advice = _ask(term, facts)
        except UnsuitableExamples as error:
            raise ValueError(_refusal(name, term.spec.name, str(error), error.which, facts["row"])) from None
        if advice and advise:
            logger.warning("%s: %s", name, advice)


def _ask(term: Term, facts: Mapping[str, Tensor]) -> str | None:
    """The answer of a loss's `check_data`, if it has one."""
    check = term.spec.check_data
    if check is None:
        return None
    known = {**term.spec.defaults, **term.params, **facts}
    return check(**{name: known[name] for name in inspect.signature(check).parameters})


def _check_numbers(extra: str, facts: Mapping[str, Tensor], kind: ExampleKind, name: str) -> None:
    """Every example has a number, within the bounds of its column."""
    values, about = facts[extra], kind.optional_columns[extra]
    wrong = ~values.isfinite() | (values < about.low) | (values > about.high)
    if wrong.any():
        bounds = {(0.0, float("inf")): "of 0 or more ", (0.0, 1.0): "from 0 to 1 "}.get((about.low, about.high), "")
        first = values[wrong][0].item()
        found = "has no number" if first != first else f"is {first:g}"
        reason = f"`{about.columns[0]}` {found}; give every row a number {bounds}or remove the column"
        raise ValueError(_refusal(name, "", reason, wrong, facts["row"]))


def _refusal(name: str, loss: str, reason: str, which: Tensor, rows: Tensor) -> str:
    found: Iterable[int] = rows[which].tolist()
    first, *others = dict.fromkeys(found)
    more = f" (and {len(others):,} more rows)" if others else ""
    return f"{name} does not fit{f' {loss}' if loss else ''}: row {first:,}{more}: {reason}"
