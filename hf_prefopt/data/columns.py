"""Rename, remove, sample and describe the columns of a dataset before its rows are read."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any, cast

from datasets import ClassLabel, Dataset, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.column_layouts import FoundLayout
from hf_prefopt.data.contents import read_content
from hf_prefopt.data.context import is_about_the_row
from hf_prefopt.data.formats import optional_columns
from hf_prefopt.data.layout_table import LAYOUTS
from hf_prefopt.data.roles import ITEM_RANKS, ITEM_SCORES, ITEM_TEXTS
from hf_prefopt.data.rows import BadRow
from hf_prefopt.data.transcripts import split_transcripts
from hf_prefopt.kinds import KINDS

logger = logging.getLogger(__name__)

# Number of rows at the start of a dataset in which an example value of each column is searched.
_SAMPLE = {Dataset: 64, IterableDataset: 8}


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the column names. If a stream does not know them, return the keys of its first row."""
    return dataset.column_names if dataset.column_names is not None else list(next(iter(dataset), {}))


def as_shown(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the dataset without the columns that `set_format(columns=...)` hides. Its rows are plain Python values.

    Raises:
        ValueError: If the dataset has a function that makes its rows each time they are read (`set_transform`). Without
            the error, the stored rows would be checked and tokenized instead of the rows that the function makes.
    """
    if not isinstance(dataset, Dataset):
        return dataset
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the dataset has a function that makes its rows when they are read (set_transform, with_transform), but "
            "rows are tokenized once: apply the function with dataset.with_format(None).map(function, batched=True)"
        )
    shown = dataset.format["columns"]
    if len(shown) < len(dataset.column_names) and not dataset.format["output_all_columns"]:
        dataset = dataset.select_columns(shown)
    return dataset if dataset.format["type"] is None else dataset.with_format(None)


def choose_columns(
    dataset: Dataset | IterableDataset, mapping: Mapping[str, str] | None, removed: Sequence[str] | None
) -> Dataset | IterableDataset:
    """Return the dataset without the removed columns and with the renamed ones.

    Args:
        dataset: Raw rows.
        mapping: Maps each new name to the present name of the column (see `PreferenceConfig.column_mapping`). An entry
            is ignored if the dataset already has a column with the new name and none with the present name.
        removed: Columns to remove.

    Raises:
        ValueError: If a column to remove or rename does not exist, if a new name is already the name of another column,
            or if two new names are given to one column. Also for the reason that `as_shown` gives.
    """
    dataset = as_shown(dataset)
    columns = column_names(dataset)
    unknown = [column for column in removed or () if column not in columns]
    if unknown:
        raise ValueError(
            f"remove_columns={list(removed or ())}: no column {unknown[0]!r}; found {', '.join(columns)}: "
            "name one of these, or leave it out"
        )
    if removed:
        dataset = dataset.remove_columns(list(removed))
        columns = [column for column in columns if column not in removed]
    renamed: dict[str, str] = {}
    for new, column in (mapping or {}).items():
        if column not in columns and new not in columns:
            raise ValueError(f"column_mapping={dict(mapping or {})}: {_not_found(dataset, column, columns)}")
        if column in renamed:
            raise ValueError(
                f"column_mapping={dict(mapping or {})}: {renamed[column]!r} and {new!r} are the same column {column!r}"
            )
        if column in columns and column != new:
            renamed[column] = new
    taken = [new for new in renamed.values() if new in columns and new not in renamed]
    if taken:
        raise ValueError(
            f"column_mapping={dict(mapping or {})}: there is already a column {taken[0]!r}; remove it with "
            f"remove_columns={taken[:1]}"
        )
    return dataset.rename_columns(renamed) if renamed else dataset


def _not_found(dataset: Dataset | IterableDataset, column: str, columns: Sequence[str]) -> str:
    """Say why a column is not found: it does not exist, or it is a key of a column of structs (`column.key`)."""
    outer, _, key = column.partition(".")
    if key and isinstance((dataset.features or {}).get(outer), Mapping):
        return (
            f"{column!r} is a key in the structs of column {outer!r}: make columns of the keys first, dataset.flatten()"
        )
    return f"no column {column!r}; found {', '.join(columns)}"


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the dataset with rows of plain Python values.

    Images, video and audio are not decoded, because rows that contain them are rejected.
    """
    for column, feature in (dataset.features or {}).items():
        # Columns of mixed types (`Json`) are decoded, because a text in them is stored as a JSON string with quotes.
        if getattr(feature, "decode", False) and type(feature).__name__ != "Json":
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    return dataset.with_format(None)


def without_empty(dataset: Dataset | IterableDataset, names: Collection[str]) -> Dataset | IterableDataset:
    """Return the dataset without those columns in `names` that are empty in all rows (of the Arrow type null)."""
    empty = [name for name, feature in (dataset.features or {}).items() if feature == Value("null") and name in names]
    return dataset.remove_columns(empty) if empty else dataset


def first_rows(dataset: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """Return the first rows of a dataset: 64, or 8 of a stream (`_SAMPLE`)."""
    return list(islice(iter(dataset), next(count for kind, count in _SAMPLE.items() if isinstance(dataset, kind))))


def sample_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return an example value for each column: the first value in these rows that is neither None nor empty.

    If a column has no such value, its value in the last row is returned.

    Args:
        rows: The first rows of the dataset.
        names: Names of columns that the result must contain, in addition to those of the rows.
    """
    columns = dict.fromkeys(names) | dict.fromkeys(column for row in rows for column in row)
    return {column: _first(row.get(column) for row in rows) for column in columns}


def _first(values: Any) -> Any:
    """Return the first value that is not empty, or else the last one."""
    value = None
    for value in values:
        if value not in (None, "", [], {}):
            return value
    return value


def class_names(dataset: Dataset | IterableDataset) -> dict[str, list[str]]:
    """Return the class names of each column that contains class indices (`ClassLabel`), keyed by column."""
    features = dataset.features or {}
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def describe_columns(found: FoundLayout, sample: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return messages that describe a dataset's layout, its unused columns, and texts that do not become messages.

    Args:
        found: The layout of the dataset.
        sample: One example value per column.
        tokenizer: The tokenizer, whose chat template may be unused.
    """
    lines = []
    if not found.is_own:
        lines.append(f"read as {describe_layout(found)}")
    unused = [column for column in unused_columns(found, sample) if not is_about_the_row(column)]
    if unused:
        lines.append(f"columns not used: {', '.join(unused)}")
    if "items" in found.columns:
        keys = [key for key in _keys(sample[found.columns["items"]]) if key not in _ITEM and not is_about_the_row(key)]
        lines += [f"keys of {found.columns['items']} not used: {', '.join(keys)}"] * bool(keys)
    texts = [column for part, column in found.columns.items() if part not in _NUMBERS]
    if not found.how.as_messages and _begin_with_prompt(found, sample):
        lines.append(
            f"{' and '.join(texts)} are read as text that begins with the prompt: what they share at the beginning is "
            "not scored; to mark where the prompt ends, add a column `prompt`"
        )
    if tokenizer.chat_template and not found.how.as_messages and _are_plain_text(sample, texts, tokenizer):
        lines.append(
            f"{', '.join(texts)} are text, which is trained on unchanged, without the chat template; "
            "text_as='messages' converts it to messages"
        )
    return lines


def check_mapped(found: FoundLayout, mapped: Collection[str], sample: Mapping[str, Any]) -> None:
    """Raise `ValueError` if neither the layout nor any loss reads a column that the user's `column_mapping` renames."""
    unused = [name for name in mapped if name in unused_columns(found, sample)]
    if unused:
        known = {name for layout in LAYOUTS for one in (*layout.needs, *layout.may) for name in chain(*one.names)}
        known |= {name for kind in KINDS for column in kind.optional_columns.values() for name in column.columns}
        near = get_close_matches(unused[0], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "the names that are read are listed in docs/data.md"
        raise ValueError(
            f"column_mapping: nothing reads a column {unused[0]!r} in addition to {describe_layout(found)}; {hint}"
        )


def describe_layout(found: FoundLayout) -> str:
    """Describe a layout and its columns, for example `pairs, question (prompt = question, chosen, rejected)`."""
    roles = ", ".join(column if part == column else f"{part} = {column}" for part, column in found.columns.items())
    return f"{found.layout.name} ({roles})"


def unused_columns(found: FoundLayout, columns: Collection[str]) -> list[str]:
    """Return the columns that are read neither by the layout nor by any loss."""
    used = {*found.columns.values(), *optional_columns(found.format.kind, columns).values(), *_BESIDE}
    return [column for column in columns if column not in used]


def _keys(structs: Any) -> list[str]:
    """Return the keys of a list of structs, or of a struct of lists."""
    listed = structs if isinstance(structs, list) else [structs]
    return [*dict.fromkeys(key for item in listed if isinstance(item, Mapping) for key in item)]


_ITEM = (*ITEM_TEXTS, *ITEM_SCORES, *ITEM_RANKS)
_BESIDE = ("tools", "chat_template_kwargs")
_NUMBERS = ("label", "quantile", "scores", "ranks", "prompt_ids", "chosen_ids", "rejected_ids")


def _are_plain_text(sample: Mapping[str, Any], columns: Collection[str], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if these columns contain text without any of the tokenizer's special tokens."""
    values = [value for column in columns for value in _listed(sample[column])]
    try:
        texts = [read_content("text", value) for value in values if value is not None]
    except BadRow:
        return False
    special = [token for token in tokenizer.all_special_tokens if token]
    is_text = bool(texts) and all(isinstance(text, str) for text in texts)
    return is_text and not any(token in text for text in texts for token in special)


def _begin_with_prompt(found: FoundLayout, sample: Mapping[str, Any]) -> bool:
    """Return True if the prompt is the beginning that the two responses share.

    The dataset then has no prompt column, and its responses are texts that are not transcripts.
    """
    values = [sample[column] for part, column in found.columns.items() if part in ("chosen", "rejected")]
    has_no_prompt = "prompt" not in found.format.columns and len(values) == 2
    if not has_no_prompt or not all(isinstance(value, str) for value in values):
        return False
    texts = [read_content("text", value) for value in values]
    return all(isinstance(text, str) for text in texts) and split_transcripts(cast(list[str], texts)) is None


def _listed(value: Any) -> list[Any]:
    """Return a list of responses unchanged, and any other value in a list of one. A list of messages is one value."""
    return value if isinstance(value, list) and value and not isinstance(value[0], dict) else [value]
