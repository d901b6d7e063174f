"""Reject rows whose chosen and rejected responses are only the names of responses in other columns, and rows in which
another column names the rejected response as the better one.

`chosen` may contain the better answer, or only a name of it: its letter, its column, or the model that wrote it. The
values of `chosen` and `rejected` count as names if they have at most a few words, and two unused columns contain other
texts.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from hf_prefopt.data.contents import read_content
from hf_prefopt.data.messages import text_of
from hf_prefopt.data.preferences import VERDICTS
from hf_prefopt.data.roles import BY_PLACE, TWO, Names
from hf_prefopt.data.rows import BadRow, CanonicalRow

# Maximum number of words of a name; the name of a model may have several words.
_WORDS = 4


def reject_names_of_responses(unused: Mapping[str, Any], read: CanonicalRow, columns: Mapping[str, str]) -> None:
    """Raise `BadRow` if the responses of a pair are only names of texts that are in unused columns.

    Args:
        unused: The values of the raw row in columns that were not read, keyed by column.
        read: The canonical row that was read from the other columns.
        columns: The dataset's name of each column that was read, keyed by the format's name, such as "chosen".
    """
    if read.content_type == "tokens" or "pairs" not in read.example_columns:
        return
    rivals = _rivals(tuple(unused))
    if not rivals:
        return
    responses = [_text(response) for response in read.responses]
    if any(len(response.split()) > _WORDS for response in responses):
        return
    for names in rivals:
        texts = [_text(unused[name]) for name in names]
        if all(texts) and not any(_have_in_common(text, response) for text in texts for response in responses):
            problem = f"is {responses[0]!r}, but {' and '.join(f'`{name}`' for name in names)} contain other texts"
            own = [columns.get(part, part) for part in read.columns]
            raise BadRow(own[0], problem, _cure(names, own))


def reject_other_verdict(unused: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise `BadRow` if an unused column names the rejected response of a pair as the better one.

    The arguments are those of `reject_names_of_responses`.
    """
    chosen, rejected = (columns.get(part) for part in ("chosen", "rejected"))
    for name in VERDICTS if chosen and rejected else ():
        value = unused.get(name)
        if isinstance(value, str) and value.strip() == rejected:
            cure = f"if it is right, swap the columns of this row; if not, remove_columns={[name]}"
            raise BadRow(name, f"is {value!r}, but the better response is in `{chosen}`", cure)


def _cure(names: Names, own: Sequence[str]) -> str:
    """Return the fix. The columns `names` seem to hold the responses; the columns `own` only name these responses."""
    cure = f"if those are the responses, remove_columns={[*own]}"
    if names in TWO.names:
        cure = f"if it names one of them, column_mapping={{'winner': {own[0]!r}}}"
    return f"{cure}; if not, remove_columns={[*names]}"


def _have_in_common(left: str, right: str) -> bool:
    """Return True if the texts are equal, or if one contains the other and the shorter one has at least two letters."""
    shorter, longer = sorted((left, right), key=len)
    return left == right or (len(shorter) > 1 and shorter in longer)


@lru_cache(maxsize=256)
def _rivals(columns: Names) -> tuple[Names, ...]:
    """Return the pairs among these columns that may hold two responses, according to their names."""
    return tuple(names for names in (*TWO.names, *BY_PLACE.names) if set(names).issubset(columns))


def _text(value: Any) -> str:
    """Return the value if it is text, or the text of its last message; "" if it is neither text nor messages."""
    try:
        content = read_content("text", value)
    except BadRow:
        return ""
    if isinstance(content, str):
        return content.strip()
    last = content[-1] if content else None
    text = (text_of(last) or last.get("value")) if isinstance(last, dict) else None
    return text.strip() if isinstance(text, str) else ""
