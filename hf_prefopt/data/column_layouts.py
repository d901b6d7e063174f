"""The column layouts of data sets: by which columns each is known, and how its rows become those of a format.

A layout is an entry of `LAYOUTS`: the roles that it needs and those that it may have besides (`roles.py`), the format
that its rows become (`formats.py`), and a function that brings the values to their places (`converters.py`). The first
one that fits the columns is taken, preferably of the wanted kind of examples.

To add one: an entry here, and a row of it with what it means in `tests/data/test_column_layouts.py`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_prefopt.data import converters as to
from hf_prefopt.data import roles
from hf_prefopt.data.formats import FORMATS, Reading, RowFormat
from hf_prefopt.data.preferences import VERDICTS, by_name
from hf_prefopt.data.roles import Role, role
from hf_prefopt.data.rows import BadRow, CanonicalRow
from hf_prefopt.kinds import ExampleKind


@dataclass(frozen=True)
class ColumnLayout:
    """A layout of columns.

    Attributes:
        name: what messages call it.
        format: the name of the format that its rows become.
        needs: the roles that a data set of this layout has.
        may: roles that are read where they are there.
        convert: makes a row of the format of the values of the roles.
        is_talk: whether its texts are turns of a conversation even if its columns have the names of TRL's.
    """

    name: str
    format: str
    needs: tuple[Role, ...]
    may: tuple[Role, ...] = ()
    convert: Callable[[to.Given], dict[str, Any]] = to.plain
    is_talk: bool = False

    def find(self, sample: Mapping[str, Any], mapped: Collection[str] = ()) -> dict[str, str] | None:
        """The column of each role, or None if this is not the layout of these columns.

        Args:
            sample: a value of every column.
            mapped: the columns that users gave their names, which go before others.
        """
        columns: dict[str, str] = {}
        for needed in self.needs:
            found = needed.find(sample, mapped)
            if found is None or set(found.values()).intersection(columns.values()):
                return None
            columns |= found
        for extra in self.may:
            found = extra.find(sample, mapped)
            if found is not None and not set(found.values()).intersection(columns.values()):
                columns |= found
        return columns


# Text in these columns is trained on as it is, as in TRL; in every other layout it is a turn of a conversation.
_TEXT_COLUMNS = {
    *("prompt", "chosen", "rejected", "reference", "completion", "label", "quantile", "responses", "scores", "ranks")
}


@dataclass(frozen=True)
class FoundLayout:
    """A layout and the columns of a data set that have its roles.

    Attributes:
        name: the layout's.
        columns: the column of each role.
        text_as: "messages" makes messages of all texts.
    """

    name: str
    columns: dict[str, str]
    text_as: str = "text"

    @cached_property
    def layout(self) -> ColumnLayout:
        return next(layout for layout in LAYOUTS if layout.name == self.name)

    @cached_property
    def format(self) -> RowFormat:
        """The format that its rows become."""
        return FORMATS[self.layout.format]

    @cached_property
    def is_own(self) -> bool:
        """Whether the columns are the format's, with nothing to convert."""
        return self.columns == {column: column for column in self.format.columns}

    @cached_property
    def how(self) -> Reading:
        """How its rows are read."""
        is_talk = self.layout.is_talk or not _TEXT_COLUMNS.issuperset(self.columns.values())
        begins = self.columns.get("prompt", "prompt") == "prompt" or "prefix" in self.columns
        return Reading(self.text_as == "messages" or is_talk, begins)

    def read(self, row: Mapping[str, Any]) -> CanonicalRow:
        """The canonical row of a raw row. Raises `BadRow` for a row that cannot be used."""
        if self.is_own:
            return self.format.read(row, self.how)
        try:
            beside = {column: row[column] for column in ("tools", "chat_template_kwargs") if column in row}
            return self.format.read({**beside, **self.layout.convert(to.Given(row, self.columns))}, self.how)
        except BadRow as error:
            raise error.renamed(self.columns) from None

    def unread(self, row: Mapping[str, Any], read: CanonicalRow) -> dict[str, Any]:
        """The values of a row that were not used, by column."""
        unread = {column: value for column, value in row.items() if column not in self._used}
        return unread | {self.columns.get(part, part): value for part, value in read.unread.items()}

    @cached_property
    def _used(self) -> frozenset[str]:
        return frozenset(self.columns.values())


def find_layout(
    sample: Mapping[str, Any], kind: ExampleKind | None = None, mapped: Collection[str] = (), text_as: str = "text"
) -> FoundLayout:
    """The first layout that fits, preferably one of this kind of examples.

    Args:
        sample: a value of every column.
        kind: the kind of examples that is wanted.
        mapped: the columns that users gave their names.
        text_as: "messages" makes messages of all texts.

    Raises:
        ValueError: no layout fits, several columns say which response is better, or there are weights of tokens
            without tokens.
    """
    fitting = [(layout, found) for layout in LAYOUTS if (found := layout.find(sample, mapped)) is not None]
    if not fitting:
        raise ValueError(_describe_nearest(sample))
    layout, columns = next(((one, found) for one, found in fitting if FORMATS[one.format].kind is kind), fitting[0])
    verdicts = [name for name in VERDICTS if name in sample and "verdict" in columns and _VERDICT.accepts(sample[name])]
    # A column that is mapped to `winner` is read by names.
    verdicts.sort(key=lambda name: VERDICTS[name] is not by_name)
    if len(verdicts) > 1 and columns["verdict"] not in mapped:
        raise ValueError(
            f"columns {_quoted(verdicts)} may all say which response is better: name one, as in "
            f"column_mapping={{'winner': {verdicts[0]!r}}}, or leave the others out, remove_columns={verdicts[1:]}"
        )
    row_format = FORMATS[layout.format]
    if "prompt" in sample and "prompt" not in columns.values() and roles.is_texts(sample["prompt"]):
        raise ValueError("`prompt` is a list of texts; make it text or messages")
    weights = [name for name in FORMATS["tokenized pairs with weights"].columns[3:] if name in sample]
    if weights and not row_format.has_token_weights:
        raise ValueError(
            f"column {', '.join(weights)} weighs tokens, but rows in this format ({row_format.name}) do not say which "
            "tokens there are: give prompt_ids, chosen_ids, rejected_ids, chosen_token_weights, rejected_token_weights"
        )
    return FoundLayout(layout.name, columns, text_as)


def _describe_nearest(sample: Mapping[str, Any]) -> str:
    """What was found, the layout that lacks least, and what is missing from it."""
    for columns, problem in UNREADABLE.items():
        if set(columns).issubset(sample):
            return f"columns {_quoted(columns)}: {problem}"
    misspelled = _describe_spelling(sample) if sample else None
    if misspelled is not None:
        return misspelled
    layouts = [_Lack(layout, [needed for needed in layout.needs if needed.find(sample) is None]) for layout in LAYOUTS]
    # Of those that lack equally little, the first of the table.
    nearest = min(layouts, key=lambda lack: lack.distance(sample))
    missing, found = nearest.missing(sample), ", ".join(sample) or "none"
    if not missing:
        kinds = [f"`{column}` is {_kind_of(sample[column])}" for column in nearest.columns]
        return f"these are the columns of {nearest.layout.name}, but {', '.join(kinds)}; give text or messages"
    mapping = ", ".join(f"{column!r}: '…'" for column in missing)
    return (
        f"{_columns(missing)} missing (columns found: {found}). The nearest layout is {nearest.layout.name}. "
        f"Say which columns these are, column_mapping={{{mapping}}}, or make them: dataset.map(function)"
    )


def _describe_spelling(sample: Mapping[str, Any]) -> str | None:
    """How to map columns that only capitals, blanks or hyphens, or one separator for all, keep from being a layout."""
    first, *others = sample
    separator = next((mark for mark in ";\t|" if mark in first and not others), None)
    if separator:
        return (
            f"there is one column, {first!r}: the file seems to be separated by {separator!r}. Read it so, "
            f"load_dataset('csv', data_files=…, sep={separator!r})"
        )
    spelled = {_spelled(name): name for name in sample}
    plain = {name: sample[column] for name, column in spelled.items()}
    found = next((columns for layout in LAYOUTS if (columns := layout.find(plain)) is not None), None)
    if found is None:
        return None
    mapping = {name: spelled[name] for name in found.values() if name != spelled[name]}
    return f"columns {_quoted(list(mapping.values()))} are known under other spellings: column_mapping={mapping}"


def _spelled(name: str) -> str:
    """`Chosen Response` and `chosenResponse` as `chosen_response`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip(" \ufeff"))
    return re.sub(r"[\s-]+", "_", name).lower()


def _kind_of(value: Any) -> str:
    return "a list of texts" if roles.is_texts(value) else f"of type {type(value).__name__}"


def _columns(names: list[str]) -> str:
    return f"columns {_quoted(names)} are" if len(names) > 1 else f"column {_quoted(names)} is"


@dataclass(frozen=True)
class _Lack:
    """A layout and the roles that a data set lacks."""

    layout: ColumnLayout
    roles: list[Role]

    @property
    def columns(self) -> list[str]:
        return [column for needed in self.roles for column in needed.names[0]]

    @property
    def is_half(self) -> bool:
        """Whether only an input is missing beside an instruction, which may well do without."""
        return roles.ALPACA in self.roles

    def distance(self, sample: Mapping[str, Any]) -> tuple[int, bool, bool, bool]:
        """How far a data set is from this layout; of several, the smallest is the nearest."""
        return (-self.present(sample), len(self.missing(sample)) > 2, self.is_half, self.layout.is_talk)

    def missing(self, sample: Mapping[str, Any]) -> list[str]:
        return [column for column in self.columns if column not in sample]

    def present(self, sample: Mapping[str, Any]) -> int:
        """The number of columns that it would use."""
        found = sum(len(needed.parts) for needed in self.layout.needs if needed not in self.roles)
        return found + len(self.columns) - len(self.missing(sample))


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _is_anything(_: Any) -> bool:
    return True


_TOKENS = tuple(role(name, name, accepts=_is_anything) for name in FORMATS["tokenized triples"].columns)
_WEIGHTS = tuple(role(name, name, accepts=_is_anything) for name in FORMATS["tokenized pairs with weights"].columns[3:])
_VERDICT = role("verdict", *VERDICTS, accepts=lambda value: isinstance(value, str | int | float))
_AROUND = (roles.SYSTEM, roles.HISTORY, roles.PREFIX)
_WITH_PROMPT = "pairs that begin with their prompt"

# What may say which of two responses is better, and how a pair is made of it.
_TWO_AND = (
    ("a verdict", roles.TWO, (_VERDICT,), to.better_of_two),
    ("flags", roles.FLAGGED, (), to.flagged_two),
    ("the flag of the first", roles.FIRST_FLAGGED, (), to.flagged_first),
    ("scores", roles.SCORED, (), to.scored_two),
)
# What responses are compared by in a list.
_LISTS_OF = (
    ("scored lists", (roles.RESPONSES, roles.SCORES), to.plain, "responses with scores", False),
    ("ranked lists", (roles.RESPONSES, roles.RANKS), to.plain, "responses with ranks", False),
    ("scored lists", (roles.SCORED_ITEMS,), to.items, "structs of a response and its score", True),
    ("ranked lists", (roles.RANKED_ITEMS,), to.items, "structs of a response and its rank", True),
    ("ranked lists", (roles.GOOD_AND_BAD,), to.good_and_bad, "lists of chosen and of rejected responses", True),
)
# What is asked: an instruction with an input (Alpaca's columns), or one column.
_ASKED = (("instruction and input", roles.ALPACA), ("question", roles.QUESTION))

LAYOUTS: tuple[ColumnLayout, ...] = (
    ColumnLayout("tokenized pairs with weights", "tokenized pairs with weights", (*_TOKENS[:3], *_WEIGHTS)),
    ColumnLayout("tokenized pairs", "tokenized pairs", _TOKENS[:3]),
    # Pairs by place: a column for the better response, and one for the other.
    *(ColumnLayout(f"pairs, {asked}", "pairs", (what, roles.BY_PLACE), _AROUND) for asked, what in _ASKED),
    ColumnLayout(_WITH_PROMPT, _WITH_PROMPT, (roles.BY_PLACE,), (roles.SYSTEM,), to.talks),
    ColumnLayout(
        "a conversation and a rejected answer", _WITH_PROMPT, (roles.WHOLE, roles.REJECTED), (roles.SYSTEM,), to.talks
    ),
    ColumnLayout("tokenized triples", "tokenized triples", _TOKENS),
    *(
        ColumnLayout(f"triples, {asked}", "triples", (what, roles.BY_PLACE, roles.GOLD), _AROUND)
        for asked, what in _ASKED
    ),
    ColumnLayout(
        "triples that begin with their prompt", "triples that begin with their prompt", (roles.BY_PLACE, roles.GOLD)
    ),
    # Pairs by a verdict: two responses, and what says which is better.
    ColumnLayout("turns and flags", _WITH_PROMPT, (roles.TURNS, roles.TURNS_FLAGGED), (), to.turns_flagged, True),
    ColumnLayout(
        "turns and a verdict",
        _WITH_PROMPT,
        (roles.TURNS, roles.TURNS_OF_TWO, _VERDICT),
        (roles.MODELS,),
        to.turns,
        True,
    ),
    *(
        ColumnLayout(f"two responses and {by}, {asked}", "pairs", (two, *more, what), (*_AROUND, roles.MODELS), convert)
        for by, two, more, convert in _TWO_AND
        for asked, what in _ASKED
    ),
    *(
        ColumnLayout(
            f"two conversations and {by}", _WITH_PROMPT, (two, *more), (roles.MODELS, roles.JUDGED_TURN), convert
        )
        for by, two, more, convert in _TWO_AND
    ),
    # Single responses with a label.
    ColumnLayout("labeled responses", "labeled responses", (roles.QUESTION, roles.COMPLETION, roles.LABEL), _AROUND),
    *(
        ColumnLayout(f"{by} responses, {asked}", "labeled responses", (what, roles.ANSWER, label), _AROUND)
        for by, label in (("tagged", roles.TAG), ("flagged", roles.FLAG))
        for asked, what in _ASKED
    ),
    *(
        ColumnLayout(
            f"conversations with a {name}",
            "labeled conversations",
            (roles.CONVERSATION, label),
            (roles.SYSTEM,),
            to.talks,
        )
        for name, label in (("label", roles.LABEL), ("tag", roles.TAG), ("flag", roles.FLAG))
    ),
    # Single responses with a quantile.
    *(
        ColumnLayout(
            f"responses with a quantile, {asked}", "scored responses", (what, roles.ANSWER, roles.QUANTILE), _AROUND
        )
        for asked, what in _ASKED
    ),
    ColumnLayout(
        "conversations with a quantile",
        "scored conversations",
        (roles.CONVERSATION, roles.QUANTILE),
        (roles.SYSTEM,),
        to.talks,
    ),
    # Lists.
    *(
        ColumnLayout(f"{name}, {asked}", row_format, (what, *needs), _AROUND, convert, is_talk)
        for row_format, needs, convert, name, is_talk in _LISTS_OF
        for asked, what in _ASKED
    ),
)

# Columns that are known, and cannot be read row by row: what to do instead.
_ALONE = (
    "these rows are single responses with a rating, and no preference: put those of a prompt together, into rows of "
    "`prompt`, `responses` and `scores`, or make a `label` or a `quantile` of the rating"
)
_PLACE = (
    "this may be the place of the better response in a list: make columns of both, as in dataset.map(lambda row: "
    "{{'chosen': row[{0!r}][row[{1!r}]], 'rejected': row[{0!r}][1 - row[{1!r}]]}}) if places count from 0"
)
UNREADABLE: dict[tuple[str, ...], str] = {
    ("data", "annotations"): "these are tasks as Label Studio exports them: make rows of `prompt`, `chosen` and "
    "`rejected` of what the annotations selected",
    **{
        (listed, place): _PLACE.format(listed, place)
        for listed in (*roles.LISTED, "summaries")
        for place in roles.PLACES_IN_LISTS
    },
    ("message_id", "parent_id", "text", "role"): "these rows are the messages of trees, one a row: put the threads "
    "together first, into rows of `prompt` (messages), `responses` and `ranks`",
    **{
        (answer, rating): _ALONE
        for answer in ("response", "completion", "answer", "output")
        for rating in ("helpfulness", "score", "rating", "reward")
    },
}
