"""The table of column layouts: the columns that identify each layout, and the format to which its rows are converted.

A layout is an entry of `LAYOUTS`. It consists of roles, which are meanings of columns such as "prompt" or "chosen"
(`roles.py`), of the format to which its rows are converted (`formats.py`), and of the function that converts them
(`converters.py`). If several layouts fit the columns of a dataset, `column_layouts.py` selects the first one with the
requested kind of examples, or else the first one.

To add a layout, add an entry here, and example rows with their meaning in `tests/data/test_column_layouts.py`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hf_prefopt.data import converters as to
from hf_prefopt.data import roles
from hf_prefopt.data.formats import FORMATS
from hf_prefopt.data.preferences import VERDICTS, names_a_side
from hf_prefopt.data.roles import Role, role


@dataclass(frozen=True)
class ColumnLayout:
    """A layout of columns.

    Attributes:
        name: Name of the layout in messages.
        format: Name of the format to which its rows are converted.
        needs: Required roles.
        may: Optional roles, which are read if the dataset has columns for them.
        convert: Function that converts the values of the roles to a row of the format.
        is_talk: Whether texts are always turns of a conversation. If False, texts are trained on unchanged if all
            columns have standard names (`_TEXT_COLUMNS` in `column_layouts.py`).
    """

    name: str
    format: str
    needs: tuple[Role, ...]
    may: tuple[Role, ...] = ()
    convert: Callable[[to.Given], dict[str, Any]] = to.plain
    is_talk: bool = False

    def find(self, sample: Mapping[str, Any], mapped: Collection[str] = ()) -> dict[str, str] | None:
        """Return the name of the column of each role, keyed by role, or None if the columns do not have this layout.

        Args:
            sample: One example value per column.
            mapped: New column names from the user's `column_mapping`. A role prefers columns with these names.
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


def _is_anything(_: Any) -> bool:
    return True


_TOKENS = tuple(role(name, name, accepts=_is_anything) for name in FORMATS["tokenized triples"].columns)
_WEIGHTS = tuple(role(name, name, accepts=_is_anything) for name in FORMATS["tokenized pairs with weights"].columns[3:])
VERDICT = role("verdict", *VERDICTS, accepts=lambda value: isinstance(value, str | int | float))
# A column `label` is read as a verdict only if its values name one of two responses. Other labels may mean anything.
LABEL_OF_TWO = role(
    "verdict",
    "label",
    accepts=names_a_side,
    wanted="text such as 'A' or 'A>B'; if it names the better one in another way, column_mapping={'winner': 'label'}",
)
_AROUND = (roles.SYSTEM, roles.HISTORY, roles.PREFIX)
_WITH_PROMPT = "pairs that begin with their prompt"

# What may identify the better of two responses. Each entry has its description, the role of the two responses, further
# required roles, and the function that builds a pair from them.
_TWO_AND = (
    ("a verdict and scores", roles.SCORED, (VERDICT,), to.better_of_two),
    ("a verdict", roles.TWO, (VERDICT,), to.better_of_two),
    ("a label", roles.TWO, (LABEL_OF_TWO,), to.better_of_two),
    ("submitted votes", roles.TWO, (roles.SUBMITTED_VOTES,), to.voted_two),
    ("votes", roles.TWO, (roles.VOTES,), to.voted_two),
    ("flags", roles.FLAGGED, (), to.flagged_two),
    ("the flag of the first and scores", roles.FIRST_FLAGGED_SCORED, (), to.flagged_first),
    ("the flag of the first", roles.FIRST_FLAGGED, (), to.flagged_first),
    ("scores", roles.SCORED, (), to.scored_two),
)
# How the responses of a list are compared. Each entry has the format, the required roles in addition to the question,
# the function that converts a row, the name of the layout, and `ColumnLayout.is_talk`.
_LISTS_OF = (
    ("scored lists", (roles.RESPONSES, roles.SCORES), to.plain, "responses with scores", False),
    ("ranked lists", (roles.RESPONSES, roles.RANKS), to.plain, "responses with ranks", False),
    ("scored lists", (roles.SCORED_ITEMS,), to.items, "structs of a response and its score", True),
    ("ranked lists", (roles.RANKED_ITEMS,), to.items, "structs of a response and its rank", True),
    ("scored lists", (roles.RESPONSES, roles.FLAGS_OF_LIST), to.flagged_list, "responses with flags", True),
    ("ranked lists", (roles.GOOD_AND_BAD,), to.good_and_bad, "lists of chosen and of rejected responses", True),
    ("ranked lists", (roles.ONE_GOOD, roles.SEVERAL_BAD), to.good_and_bad, "one chosen and rejected responses", True),
    ("ranked lists", (roles.SEVERAL_GOOD, roles.ONE_BAD), to.good_and_bad, "chosen and one rejected response", True),
)
# The question of a row is in two columns, an instruction and its input (as in Alpaca), or in one column.
_ASKED = (("instruction and input", roles.ALPACA), ("question", roles.QUESTION))

LAYOUTS: tuple[ColumnLayout, ...] = (
    ColumnLayout("tokenized pairs with weights", "tokenized pairs with weights", (*_TOKENS[:3], *_WEIGHTS)),
    ColumnLayout("tokenized pairs", "tokenized pairs", _TOKENS[:3]),
    # Pairs whose columns' names say which response is better, such as `chosen` and `rejected`.
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
        "triples that begin with their prompt",
        "triples that begin with their prompt",
        (roles.BY_PLACE, roles.GOLD),
        (roles.SYSTEM,),
        to.talks,
    ),
    # Pairs with a verdict: columns of two responses, and other columns that say which response is better.
    ColumnLayout(
        "turns and flags", _WITH_PROMPT, (roles.TURNS, roles.TURNS_FLAGGED), (roles.SYSTEM,), to.turns_flagged, True
    ),
    ColumnLayout(
        "turns and a verdict",
        _WITH_PROMPT,
        (roles.TURNS, roles.TURNS_OF_TWO, VERDICT),
        (roles.SYSTEM, roles.MODELS),
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
            f"two conversations and {by}",
            _WITH_PROMPT,
            (two, *more),
            (roles.SYSTEM, roles.MODELS, roles.JUDGED_TURN),
            convert,
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
    # If the first rows have one chosen and one rejected response in lists, the dataset is read as pairs only if the
    # losses compare pairs, because other rows may have more responses.
    *(
        ColumnLayout(f"pairs in lists, {asked}", "pairs", (what, roles.ONE_OF_EACH), _AROUND, to.one_of_each, True)
        for asked, what in _ASKED
    ),
)
