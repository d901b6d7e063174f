"""Find the column layout that matches the columns of a dataset, and read the dataset's rows in this layout.

A column layout says which columns a dataset has and what they mean. All layouts are listed in `layout_table.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hf_prefopt.data import converters as to
from hf_prefopt.data import roles
from hf_prefopt.data.formats import FORMATS, Reading, RowFormat
from hf_prefopt.data.layout_table import LABEL_OF_TWO, LAYOUTS, VERDICT, ColumnLayout
from hf_prefopt.data.preferences import VERDICTS, by_name
from hf_prefopt.data.rows import BadRow, CanonicalRow
from hf_prefopt.data.unknown_columns import describe_nearest, quoted
from hf_prefopt.kinds import ExampleKind

# If a dataset is read from these columns only, text is trained on unchanged, as in TRL. If it is read from any other
# column, texts are turns of a conversation.
_TEXT_COLUMNS = {
    *("prompt", "chosen", "rejected", "reference", "completion", "label", "quantile", "responses", "scores", "ranks")
}


@dataclass(frozen=True)
class FoundLayout:
    """The column layout of a dataset, and the column of each of its roles.

    A role is the meaning of a column, such as "prompt" or "chosen" (see `roles.py`).

    Attributes:
        name: Name of the layout.
        columns: Maps each role to the name of its column in the dataset.
        text_as: If "messages", all texts are converted to messages.
    """

    name: str
    columns: dict[str, str]
    text_as: str = "text"

    @cached_property
    def layout(self) -> ColumnLayout:
        return next(layout for layout in LAYOUTS if layout.name == self.name)

    @cached_property
    def format(self) -> RowFormat:
        """The format to which the layout's rows are converted."""
        return FORMATS[self.layout.format]

    @cached_property
    def is_own(self) -> bool:
        """Whether the dataset already has the columns of the format, so that its rows need no conversion."""
        has_its_columns = self.columns == {column: column for column in self.format.columns}
        return has_its_columns and self.layout.convert in (to.plain, to.talks)

    @cached_property
    def how(self) -> Reading:
        """The options with which the format reads the rows."""
        is_talk = self.layout.is_talk or not _TEXT_COLUMNS.issuperset(self.columns.values())
        begins = self.columns.get("prompt", "prompt") == "prompt" or "prefix" in self.columns
        return Reading(self.text_as == "messages" or is_talk, begins)

    def read(self, row: Mapping[str, Any]) -> CanonicalRow:
        """Convert a raw row to a `CanonicalRow`. Raises `BadRow` if the row cannot be used."""
        if self.is_own:
            return self.format.read(row, self.how)
        try:
            beside = {column: row[column] for column in ("tools", "chat_template_kwargs") if column in row}
            converted = self.layout.convert(to.Given(row, self.columns))
            against = converted.pop("against", False)
            return replace(self.format.read({**beside, **converted}, self.how), against=against)
        except BadRow as error:
            raise error.renamed(self.columns) from None

    def unread(self, row: Mapping[str, Any], read: CanonicalRow) -> dict[str, Any]:
        """Return the values of a raw row that its canonical row does not use, keyed by column.

        Args:
            row: The raw row.
            read: Its canonical row, as returned by the method `read`.
        """
        unread = {column: value for column, value in row.items() if column not in self._used}
        return unread | {self.columns.get(part, part): value for part, value in read.unread.items()}

    @cached_property
    def _used(self) -> frozenset[str]:
        return frozenset(self.columns.values())


def fitting_kinds(sample: Mapping[str, Any], mapped: Collection[str] = ()) -> tuple[ExampleKind, ...]:
    """Return the kinds of examples (pairs, lists, …) as which the columns can be read. The first one is the default.

    Args:
        sample: One example value per column.
        mapped: New column names from the user's `column_mapping`. A role prefers columns with these names.
    """
    fitting = (layout for layout in LAYOUTS if layout.find(sample, mapped) is not None)
    return tuple(dict.fromkeys(FORMATS[layout.format].kind for layout in fitting))


def find_layout(
    sample: Mapping[str, Any], kind: ExampleKind | None = None, mapped: Collection[str] = (), text_as: str = "text"
) -> FoundLayout:
    """Return the first layout that matches the columns and has this kind of examples, or else the first that matches.

    Args:
        sample: One example value per column.
        kind: Requested kind of examples. None accepts any kind.
        mapped: New column names from the user's `column_mapping`. A role prefers columns with these names.
        text_as: If "messages", all texts are converted to messages.

    Raises:
        ValueError: If no layout matches, if several columns may name the better response, if the column `prompt` has
            values of a type that no layout reads, or if there are token weights without token ids.
    """
    fitting = [(layout, found) for layout in LAYOUTS if (found := layout.find(sample, mapped)) is not None]
    if not fitting:
        raise ValueError(describe_nearest(sample))
    layout, columns = next(((one, found) for one, found in fitting if FORMATS[one.format].kind is kind), fitting[0])
    verdicts = [name for name in VERDICTS if name in sample and "verdict" in columns and VERDICT.accepts(sample[name])]
    verdicts += ["label"] * (bool(verdicts) and LABEL_OF_TWO.accepts(sample.get("label")))
    # Columns that are read by name come first: the error suggests `winner`, which is read by name, for the first one.
    verdicts.sort(key=lambda name: VERDICTS.get(name, by_name) is not by_name)
    if len(verdicts) > 1 and columns["verdict"] not in mapped:
        raise ValueError(
            f"columns {quoted(verdicts)} may all name the better response: choose one, as in "
            f"column_mapping={{'winner': {verdicts[0]!r}}}, or remove the others, remove_columns={verdicts[1:]}"
        )
    row_format = FORMATS[layout.format]
    _refuse_unread_prompt(sample, columns)
    weights = [name for name in FORMATS["tokenized pairs with weights"].columns[3:] if name in sample]
    if weights and not row_format.has_token_weights:
        raise ValueError(
            f"column {', '.join(weights)} weights tokens, but rows in this format ({row_format.name}) have no token "
            "ids: add prompt_ids, chosen_ids, rejected_ids, chosen_token_weights, rejected_token_weights"
        )
    return FoundLayout(layout.name, columns, text_as)


def _refuse_unread_prompt(sample: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise `ValueError` if the layout does not read the column `prompt` because its values have the wrong type."""
    prompt = sample.get("prompt")
    if "prompt" in columns.values() or prompt is None:
        return
    if roles.is_texts(prompt):
        raise ValueError("`prompt` is a list of texts; make it one text or a list of messages")
    if not isinstance(prompt, str | list | tuple | dict):
        raise ValueError(f"`prompt` is of type {type(prompt).__name__}; make it text or a list of messages")
