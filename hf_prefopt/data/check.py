"""Check, before the first step, whether the losses of a run can be computed on the examples of a dataset.

If a loss cannot compare an example, an error names the row of the example. If a loss has advice about the data, the
advice is logged once. So are the names of the optional columns that the losses read. If all examples have the same
label and the losses have no gradient for it, training raises an error (see `without_gradient`).
"""

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from hf_prefopt.batch import join_examples
from hf_prefopt.data.notes import plural
from hf_prefopt.data.ragged import pair_places, ragged
from hf_prefopt.kinds import UNPAIRED, ExampleKind
from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.base import UnsuitableExamples
from hf_prefopt.objective.objective import Objective
from hf_prefopt.objective.term import Term

logger = logging.getLogger(__name__)


def check_embeddings(dataset: Dataset | IterableDataset, embeddings: int, name: str) -> Dataset | IterableDataset:
    """Check that the model has an embedding for every token id. Without this check, a training step would fail.

    Args:
        dataset: Prepared rows.
        embeddings: Number of embeddings of the model.
        name: Name of the dataset in errors.

    Returns:
        The dataset. If it is a stream, each row is checked when it is read.

    Raises:
        ValueError: If a token id has no embedding. For a stream, the error is raised when the row is read.
    """
    if isinstance(dataset, IterableDataset):
        arguments = {"embeddings": embeddings, "name": name}
        return dataset.map(_check_ids, batched=True, features=dataset.features, fn_kwargs=arguments)
    columns = dataset.select_columns(["prompt_ids", "response_ids", "row"]).with_format("arrow")
    for batch in columns.iter(batch_size=10_000):
        highest = pc.max(pc.list_flatten(pc.list_flatten(batch["response_ids"]))).as_py() or 0
        highest = max(highest, pc.max(pc.list_flatten(batch["prompt_ids"])).as_py() or 0)
        if highest >= embeddings:
            _check_ids(batch.to_pydict(), embeddings, name)
    return dataset


def _check_ids(columns: Mapping[str, list[Any]], embeddings: int, name: str) -> dict[str, list[Any]]:
    """Check the token ids of a batch of rows. Return no columns, so that `map` does not change the rows."""
    for row in _as_rows({column: columns[column] for column in ("prompt_ids", "response_ids", "row")}):
        found = max(token for ids in (row["prompt_ids"], *row["response_ids"]) for token in ids)
        if found >= embeddings:
            raise ValueError(
                f"{name}: row {row['row']:,} has token id {found:,}, but the model has {embeddings:,} embeddings: "
                "use the model's tokenizer, or model.resize_token_embeddings(len(tokenizer)) for new tokens; a "
                "ref_model must have as many"
            )
    return {}


def check_lengths(dataset: Dataset | IterableDataset, positions: int, name: str) -> Dataset | IterableDataset:
    """Check that the model has enough positions for every sequence. Without this check, a training step would fail.

    Args:
        dataset: Prepared rows.
        positions: Number of positions of the model: the maximum number of tokens in a prompt and one response together.
        name: Name of the dataset in errors.

    Returns:
        The dataset. If it is a stream, each row is checked when it is read.

    Raises:
        ValueError: If a sequence is too long. For a stream, the error is raised when the row is read.
    """
    if isinstance(dataset, IterableDataset):
        arguments = {"positions": positions, "name": name}
        return dataset.map(_check_lengths, batched=True, features=dataset.features, fn_kwargs=arguments)
    columns = dataset.select_columns(["prompt_ids", "response_ids", "row"]).with_format("arrow")
    for batch in columns.iter(batch_size=10_000):
        longest = pc.max(pc.list_value_length(pc.list_flatten(batch["response_ids"]))).as_py() or 0
        longest += pc.max(pc.list_value_length(batch["prompt_ids"])).as_py() or 0
        if longest > positions:  # the longest prompt and the longest response may be in different rows
            _check_lengths(batch.to_pydict(), positions, name)
    return dataset


def _check_lengths(columns: Mapping[str, list[Any]], positions: int, name: str) -> dict[str, list[Any]]:
    """Check the lengths of a batch of rows. Return no columns, so that `map` does not change the rows."""
    for row in _as_rows({column: columns[column] for column in ("prompt_ids", "response_ids", "row")}):
        prompt, response = len(row["prompt_ids"]), max(map(len, row["response_ids"]))
        if prompt + response > positions:
            raise ValueError(
                f"{name}: row {row['row']:,} has {prompt:,} prompt tokens and {response:,} response tokens, but the "
                f"model has {positions:,} positions: set max_length={positions} (or less) to cut such rows"
            )
    return {}


def check_examples(dataset: Dataset | IterableDataset, objective: Objective, name: str) -> Dataset | IterableDataset:
    """Check that the losses can compare the examples.

    Args:
        dataset: Prepared rows, whose examples are of the kind that the objective compares (such as pairs or lists).
        objective: The losses.
        name: Name of the dataset in errors.

    Returns:
        The dataset. If it is a stream, each row is checked when it is read.

    Raises:
        ValueError: If a loss cannot compare an example, or if an optional column that the losses read lacks a number or
            has one that is out of range. The error names the row. For a stream, it is raised when the row is read. Also
            if the two responses of every pair are equal and the losses depend only on the difference between the two
            responses. This is not checked for a stream.
    """
    kind = objective.kind
    optional = [column for column in objective.inputs if column in kind.optional_columns]
    unread = {column for term in objective.terms for column in term.absent if column in (dataset.column_names or ())}
    if "chosen_win_rates" in unread:
        logger.warning("%s: win_rate is not read: use_win_rates=True converts it to soft labels", name)
    has_checks = bool(optional) or any(term.spec.check_data for term in objective.terms)
    if isinstance(dataset, IterableDataset):
        # If the kind accepts even a row without any columns, it accepts every row, and nothing needs to be checked.
        if not has_checks and kind.refusal({}, objective.inputs) is None:
            return dataset
        if objective.use_weights:
            logger.warning(_describe_weights(name))
        _say_what_is_read(optional, dataset.column_names or (), kind, name)
        arguments = {"objective": objective, "name": name}
        return dataset.map(_check_batch, batched=True, features=dataset.features, fn_kwargs=arguments)
    if len(dataset):
        _refuse_identical_pairs(dataset, objective, name)
    if has_checks and len(dataset):
        examples = _all_examples(dataset, objective)
        _check(examples, objective, name)
        _say_what_is_read(optional, dataset.column_names, kind, name)
        if "weights" in optional and "weights" in examples:
            logger.warning(_describe_weights(name, examples["weights"].numpy()))
    return dataset


def advise(dataset: Dataset | IterableDataset, objective: Objective, name: str) -> None:
    """Log the advice of the losses about a dataset that `check_examples` has accepted. For a stream, log nothing."""
    if isinstance(dataset, IterableDataset) or not len(dataset):
        return
    if any(term.spec.check_data for term in objective.terms):
        for advice in _check(_all_examples(dataset, objective), objective, name):
            logger.warning("%s: %s", name, advice)
    elif reason := without_gradient(dataset, objective):
        logger.warning("%s: %s", name, reason)


def without_gradient(dataset: Dataset, objective: Objective) -> str | None:
    """Return a message if all examples have the same label and the losses have no gradient for it; otherwise None.

    The message describes the problem and says what to do. Whether there is a gradient is found by computing the losses
    on synthetic examples.
    """
    label = only_label(dataset)
    if objective.kind is not UNPAIRED or label is None or _has_gradient(objective, label):
        return None
    one, other = ("", "un") if label else ("un", "")
    losses = ", ".join(term.spec.form_of or term.spec.name for term in objective.terms)
    return (
        f"all examples ({plural(len(dataset), 'row')}) are {one}desirable, for which {losses} has no gradient, so "
        f"training on them changes nothing: check the labels, or add {other}desirable examples"
    )


def only_label(dataset: Any) -> bool | None:
    """Return the label that all examples of prepared rows have. Return None for mixed labels, no labels or a stream."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return None
    tables = dataset.select_columns("labels").with_format("arrow").iter(batch_size=10_000)
    labels = {bool(label) for table in tables for label in pc.unique(pc.list_flatten(table["labels"])).to_pylist()}
    return labels.pop() if len(labels) == 1 else None


def _has_gradient(objective: Objective, label: bool) -> bool:
    """Return True if the losses have a gradient with respect to the policy, on synthetic examples with this label."""
    inputs = made_up_examples(dict.fromkeys((*objective.inputs, "labels")), count=8)
    inputs["labels"] = torch.full((8,), label)
    policy = [inputs[name].requires_grad_() for name in objective.inputs if name.startswith("policy")]
    loss = objective(inputs, training=False).loss
    if not loss.requires_grad:
        return False
    gradients = torch.autograd.grad(loss, policy, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _refuse_identical_pairs(dataset: Dataset, objective: Objective, name: str) -> None:
    """Raise `ValueError` if the two responses of every pair are equal and every gradient is zero for this reason."""
    if not objective.ignores_shared_tokens:
        return
    for table in dataset.select_columns(["response_ids", "pairs"]).with_format("arrow").iter(batch_size=1000):
        if not ragged(table["response_ids"], 2).are_equal(*pair_places(table).T).all():
            return
    raise ValueError(
        f"{name}: chosen and rejected have the same tokens in all of {plural(len(dataset), 'pair')}, so the gradient "
        "is zero: check how the columns were made; if the texts differ only after max_length, raise it"
    )


def _check_batch(columns: Mapping[str, list[Any]], objective: Objective, name: str) -> dict[str, list[Any]]:
    """Check the examples of a batch of rows. Return no columns, so that `map` does not change the rows."""
    rows = _as_rows(columns)
    for row in rows:
        reason = objective.kind.refusal(row, objective.inputs)
        if reason is not None:
            losses = ", ".join(term.spec.name for term in objective.terms)
            raise ValueError(f"the {name} dataset does not fit {losses}: row {row['row']:,}: {reason}")
    _check(_examples(rows, objective.kind), objective, name)
    return {}


def _as_rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _examples(rows: Sequence[Mapping[str, Any]], kind: ExampleKind) -> dict[str, Tensor]:
    """Return the inputs that losses may check, with one value for each example, and the number of its row (`row`)."""
    values = {column: torch.from_numpy(array) for column, array in kind.batch_inputs_of(rows).items()}
    counts = torch.tensor([kind.count_examples(row) for row in rows])
    return {**values, "row": torch.tensor([row["row"] for row in rows]).repeat_interleave(counts)}


def _all_examples(dataset: Dataset, objective: Objective) -> dict[str, Tensor]:
    """Return the result of `_examples` for all rows of a dataset."""
    kind = objective.kind
    optional = [column for column in objective.inputs if column in kind.optional_columns]
    needed = [column for column in (*kind.columns, *optional, "row") if column in dataset.column_names]
    batches = dataset.select_columns(needed).with_format(None).iter(batch_size=1000)
    parts = [_examples(_as_rows(batch), kind) for batch in batches]
    return {column: join_examples([part[column] for part in parts]) for column in parts[0]}


def _check(examples: Mapping[str, Tensor], objective: Objective, name: str) -> list[str]:
    """Return the losses' advice on these examples. Raises `ValueError` if a loss cannot compare an example."""
    for column in objective.inputs:
        if column in objective.kind.optional_columns and column in examples:
            _check_numbers(column, examples, objective.kind, name)
    advice = []
    for term in objective.terms:
        try:
            advice.append(_run_check(term, examples))
        except UnsuitableExamples as error:
            where = _name_rows(error.which, examples["row"])
            raise ValueError(f"the {name} dataset does not fit {term.spec.name}: {where}: {error}") from None
    return [line for line in advice if line]


def _run_check(term: Term, examples: Mapping[str, Tensor]) -> str | None:
    """Return the advice that a loss's `check_data` gives on these examples, or None if there is none."""
    check = term.spec.check_data
    if check is None:
        return None
    known = {**term.spec.defaults, **term.params, **examples}
    return check(**{name: known[name] for name in inspect.signature(check).parameters})


def _check_numbers(column: str, examples: Mapping[str, Tensor], kind: ExampleKind, name: str) -> None:
    """Raise `ValueError` unless every example has a finite number within the bounds of this optional column."""
    values, allowed = examples[column], kind.optional_columns[column]
    wrong = ~values.isfinite() | (values < allowed.low) | (values > allowed.high)
    if wrong.any():
        bounds = {(0.0, np.inf): "of 0 or more ", (0.0, 1.0): "from 0 to 1 "}.get((allowed.low, allowed.high), "")
        first = values[wrong][0]
        found = "has no number" if first.isnan() else f"is {first.item():g}"
        raise ValueError(
            f"the {name} dataset does not fit: {_name_rows(wrong, examples['row'])}: `{allowed.columns[0]}` {found}; "
            f"give every row a number {bounds}or remove the column"
        )


def _name_rows(which: Tensor, rows: Tensor) -> str:
    """Name the first row that contains a selected example, and count the other such rows.

    Args:
        which: `[B]` bool. True for the selected examples.
        rows: `[B]` int64. The row of each example.
    """
    first, *others = dict.fromkeys(rows[which].tolist())
    return f"row {first:,}" + (f" (and {len(others):,} more rows)" if others else "")


def _say_what_is_read(inputs: Sequence[str], columns: Collection[str], kind: ExampleKind, name: str) -> None:
    """Log the names of the optional columns that the losses read, except the column of weights."""
    read = [kind.optional_columns[column].columns[0] for column in inputs if column in columns and column != "weights"]
    if read:
        logger.warning("%s: the losses read %s; use remove_columns to exclude columns", name, ", ".join(read))


def _describe_weights(name: str, weights: np.ndarray | None = None) -> str:
    """Describe the effect of the column `weight`.

    Args:
        name: Name of the dataset.
        weights: `[B]`. The weight of each example; None for a stream, whose weights are not known.
    """
    line = f"{name}: the column `weight` multiplies the losses of its examples"
    if weights is None or not len(weights):
        return line
    low, high, mean = (f"{value:.3g}" for value in (weights.min(), weights.max(), weights.mean()))
    return f"{line}: {plural(len(weights), 'example')}, weights from {low} to {high}, {mean} on average"
