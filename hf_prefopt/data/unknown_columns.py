"""Describe columns that match no known layout: the nearest layout, and how to change the columns."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from hf_prefopt.data import roles
from hf_prefopt.data.layout_table import LAYOUTS, ColumnLayout
from hf_prefopt.data.roles import Role

# Known columns that cannot be read row by row, mapped to a description of the fix.
_ALONE = (
    "these rows are single responses with a rating, not preferences: merge the rows of each prompt into one row with "
    "`prompt`, `responses` and `scores`, or convert the rating to a `label` or a `quantile`"
)
_PLACE = (
    "`{1}` may be the index of the better response in `{0}`: make two columns, as in dataset.map(lambda row: "
    "{{'chosen': row[{0!r}][row[{1!r}]], 'rejected': row[{0!r}][1 - row[{1!r}]]}}) if the index counts from 0"
)
UNREADABLE: dict[tuple[str, ...], str] = {
    ("data", "annotations"): "these are tasks exported by Label Studio: convert each task to a row with `prompt`, "
    "`chosen` and `rejected`, according to its annotations",
    **{
        (listed, place): _PLACE.format(listed, place)
        for listed in (*roles.LISTED, "summaries")
        for place in roles.PLACES_IN_LISTS
    },
    (
        "completions",
        "labels",
    ): "these seem to be the steps of one response, each right or wrong: make rows with `prompt`, `completion` and "
    "`label`. If they are whole responses, rename the columns to `responses` and `correctness`",
    ("message_id", "parent_id", "text", "role"): "each row is one message of a conversation tree: convert the trees to "
    "rows with `prompt` (messages), `responses` and `ranks` first",
    **{
        (answer, rating): _ALONE
        for answer in ("response", "completion", "answer", "output")
        for rating in ("helpfulness", "score", "rating", "reward")
    },
}


def describe_nearest(sample: Mapping[str, Any]) -> str:
    """Describe why the columns have no known layout, and how to change them to the nearest layout."""
    for columns, problem in UNREADABLE.items():
        if set(columns).issubset(sample):
            return f"columns {quoted(columns)}: {problem}"
    third = next((third for two, third in roles.THIRD.items() if {*two, third}.issubset(sample)), None)
    if third is not None:
        return (
            f"there are three or more responses, one of them {quoted([third])}: convert the rows to lists, with "
            "`prompt`, `responses`, and `scores` or `ranks`"
        )
    misspelled = _describe_spelling(sample) if sample else None
    if misspelled is not None:
        return misspelled
    layouts = [_Lack(layout, [needed for needed in layout.needs if needed.find(sample) is None]) for layout in LAYOUTS]
    # If several layouts lack equally many columns, the first one in the table is used.
    nearest = min(layouts, key=lambda lack: lack.distance(sample))
    missing, found = nearest.missing(sample), ", ".join(sample) or "none"
    structs = [name for name, value in sample.items() if isinstance(value, Mapping)]
    flattened = _flattened(sample) if missing and structs else None
    if flattened:
        return f"the columns are in the structs {quoted(structs)}: make columns of the keys first, {flattened}"
    if not missing:
        return nearest.why(sample) or "the names of the columns are known, but the first rows have no values in them"
    mapping = {column: _meant(column, sample) for column in missing}
    guessed = ", ".join(name for name in mapping.values() if name != _UNKNOWN)
    offer = f"Did you mean {guessed}? Then" if guessed else "If the data have this under another name,"
    return (
        f"{_columns(missing)} missing (columns found: {found}). {offer} pass column_mapping={mapping}; otherwise add "
        "what is missing to the data"
    )


def _flattened(sample: Mapping[str, Any]) -> str | None:
    """Return the code that converts the keys of structs to columns.

    Return None if no layout matches with these columns either.
    """
    structs = {name: value for name, value in sample.items() if isinstance(value, Mapping)}
    keys = {f"{name}.{key}": key for name, value in structs.items() for key in value}
    flat = {key: item for value in structs.values() for key, item in value.items()}
    found = next((columns for layout in LAYOUTS if (columns := layout.find({**sample, **flat})) is not None), None)
    if found is None:
        return None
    named = {name: key for name, key in keys.items() if key in found.values()}
    return f"dataset.flatten().rename_columns({named})"


# Beginnings of unknown column names, keyed by the known column that they probably mean.
_MEANINGS = {"chosen": ("good", "better", "pos", "win"), "rejected": ("bad", "worse", "neg", "los")}


_UNKNOWN = "<your column>"


def _meant(column: str, sample: Mapping[str, Any]) -> str:
    """Return the column of the dataset that is probably meant by the known name `column`.

    It has a similar spelling or meaning. If there is no such column, return a placeholder.
    """
    named = [name for name, value in sample.items() if not isinstance(value, bool)]
    near = get_close_matches(column, named, 1, cutoff=0.75)
    alike = [name for name in named if name.lower().startswith(_MEANINGS.get(column, ("\0",)))]
    return near[0] if near else alike[0] if len(alike) == 1 else _UNKNOWN


def _describe_spelling(sample: Mapping[str, Any]) -> str | None:
    """Describe the fix if only the spelling of the columns, or the separator of a CSV file, is wrong.

    Return None in all other cases.
    """
    first, *others = sample
    # If a file with another separator is read with commas, each comma in a text adds a column without a name.
    is_alone = all(name.startswith(("Unnamed: ", "__index_level_")) for name in others)
    separator = next((mark for mark in ";\t|" if mark in first and is_alone), None)
    if separator:
        return (
            f"the first column is {first!r}: the file seems to be separated by {separator!r}. Read it with "
            f"load_dataset('csv', data_files=…, sep={separator!r})"
        )
    spelled = {_spelled(name): name for name in sample}
    plain = {name: sample[column] for name, column in spelled.items()}
    found = next((columns for layout in LAYOUTS if (columns := layout.find(plain)) is not None), None)
    if found is None:
        return None
    mapping = {name: spelled[name] for name in found.values() if name != spelled[name]}
    return f"columns {quoted(list(mapping.values()))} are known under other spellings: column_mapping={mapping}"


def _spelled(name: str) -> str:
    """Return the name in snake case: `Chosen Response` and `chosenResponse` become `chosen_response`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip(" \ufeff"))
    return re.sub(r"[\s-]+", "_", name).lower()


def _kind_of(value: Any) -> str:
    return "a list of texts" if roles.is_texts(value) else f"of type {type(value).__name__}"


def _cast(column: str, value: Any, needed: Role) -> str:
    """Describe the fix if a column of numbers should be text, because `datasets` reads "4" in a CSV file as a number.

    Return "" if the value is no number, or if its text would not be accepted either.
    """
    if not isinstance(value, int | float) or not needed.accepts(str(value)):
        return ""
    mapping = {column: _UNKNOWN}
    return (
        f": convert it, dataset.cast_column({column!r}, Value('string')), or name the column of the text, "
        f"column_mapping={mapping}"
    )


def _columns(names: list[str]) -> str:
    return f"columns {quoted(names)} are" if len(names) > 1 else f"column {quoted(names)} is"


@dataclass(frozen=True)
class _Lack:
    """A layout, and the roles of this layout that the columns of a dataset lack."""

    layout: ColumnLayout
    roles: list[Role]

    @property
    def columns(self) -> list[str]:
        return [column for needed in self.roles for column in needed.names[0]]

    @property
    def is_half(self) -> bool:
        """Whether the role "instruction and input" (`roles.ALPACA`) is missing; one of its two columns may exist."""
        return roles.ALPACA in self.roles

    def distance(self, sample: Mapping[str, Any]) -> tuple[int, bool, bool, bool, int]:
        """Return the distance of a dataset from this layout. The nearest layout has the smallest distance."""
        missing = len(self.missing(sample))
        return (-self.present(sample), missing > 2, self.is_half, self.layout.is_talk, missing)

    def missing(self, sample: Mapping[str, Any]) -> list[str]:
        return [column for column in self.columns if column not in sample]

    def why(self, sample: Mapping[str, Any]) -> str:
        """Return the reason why the columns do not have this layout although all columns of the layout exist."""
        unfit = [(column, needed) for needed in self.roles for column in needed.names[0]]
        kinds = [
            f"column `{column}` is {_kind_of(sample[column])} and should be {needed.wanted}"
            + _cast(column, sample[column], needed)
            for column, needed in unfit
            if sample[column] is not None and not needed.accepts(sample[column])
        ]
        return ", ".join(kinds)

    def present(self, sample: Mapping[str, Any]) -> int:
        """Return the number of columns that this layout would use."""
        found = sum(len(needed.parts) for needed in self.layout.needs if needed not in self.roles)
        return found + len(self.columns) - len(self.missing(sample))


def quoted(names: Collection[str]) -> str:
    """Return the names in backquotes."""
    return ", ".join(f"`{name}`" for name in names)
