"""What happened to each row when it was prepared: unusable rows are refused or dropped, cuts are counted and reported.

The notes travel in columns beside the row, so that the counts are also right when `datasets` finds the result in its
cache.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value

from hf_prefopt.data.rows import PROMPT_WORDS

logger = logging.getLogger(__name__)

# What happened to the row; removed once counted.
NOTES = {
    "_problem": Value("string"),  # what is wrong with the row, or ""
    "_bad": Value("bool"),
    "_no_room": Value("bool"),  # its prompt leaves no room for a response
    "_responses": Value("int32"),
    "_responses_cut": Value("int32"),
    "_prompt_cut": Value("bool"),
    "_longest": Value("int32"),  # tokens of prompt + longest response, before any cut
    "_identical": Value("bool"),  # chosen and rejected are the same tokens
    "_unlike": Value("bool"),  # texts without a prompt column that hardly begin with one
}


def settle(noted: Dataset, name: str, max_length: int | None, on_bad_rows: str) -> Dataset:
    """Refuse or leave out the rows that cannot be used, say what happened, remove the notes."""
    notes = noted.select_columns(list(NOTES)).with_format("arrow")[:]
    problems = notes["_problem"].to_pylist()
    if on_bad_rows == "error" and any(problems):
        raise ValueError(describe_bad_rows(name, problems))
    counts = {column: notes[column].to_numpy() for column in NOTES if column != "_problem"}
    unlike = describe_unlike(name, int(counts["_unlike"].sum()), int((~counts["_bad"]).sum()))
    if unlike:
        raise ValueError(unlike)
    summary = summarize(name, counts, max_length)
    if summary:
        logger.warning(summary)
    out = counts["_bad"] | counts["_no_room"]
    if out.all():
        reasons = f"\n{describe_bad_rows(name, problems)}" if any(problems) else ""
        raise ValueError(f"{name}: none of the {len(noted):,} rows can be used. {summary}{reasons}")
    kept = noted.select(np.flatnonzero(~out)) if out.any() else noted
    return kept.remove_columns(list(NOTES))


class StreamGate:
    """Lets the usable rows of a stream through: the streaming counterpart of `settle`, which cannot count ahead."""

    def __init__(self, name: str, max_length: int | None, on_bad_rows: str):
        self.name, self.max_length, self.on_bad_rows = name, max_length, on_bad_rows
        self.has_warned = False
        self.rows = self.unlike = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if row["_bad"] and self.on_bad_rows == "error":
            raise ValueError(f"{self.name}: row {row['row']:,}: {row['_problem']}")
        self.rows, self.unlike = self.rows + (not row["_bad"]), self.unlike + row["_unlike"]
        unlike = describe_unlike(self.name, self.unlike, self.rows)
        if unlike:
            raise ValueError(unlike)
        summary = summarize(self.name, {column: np.array([row[column]]) for column in NOTES}, self.max_length)
        if summary and not self.has_warned:
            self.has_warned = True
            logger.warning("%s (row %s, the first of this stream)", summary, f"{row['row']:,}")
        return not (row["_bad"] or row["_no_room"])


# Fewer rows may begin alike, or not, by chance.
_ENOUGH_ROWS = 8


def summarize(name: str, notes: Mapping[str, np.ndarray], max_length: int | None) -> str:
    """One line on the notes of prepare.py (by column, a value for each row), or "" if there is nothing to say."""
    cut, dropped = int(notes["_responses_cut"].sum()), int(notes["_no_room"].sum())
    prompts, bad, identical = (int(notes[column].sum()) for column in ("_prompt_cut", "_bad", "_identical"))
    limit = f"max_length={max_length} (longest {notes['_longest'].max():,} tokens)"
    events = []
    if cut:
        events.append(f"{cut:,} of {_plural(notes['_responses'].sum(), 'response')} cut to {limit}")
    if prompts:
        events.append(f"{_plural(prompts, 'prompt')} cut at the start to {'fit' if cut else limit}")
    if dropped:
        events.append(f"{_plural(dropped, 'row')} dropped whose prompt alone fills {'it' if cut else limit}")
    if bad:
        events.append(f"{_plural(bad, 'unusable row')} dropped")
    if identical:
        events.append(f"{_plural(identical, 'pair')} with chosen = rejected kept (nothing to learn from)")
    if not events:
        return ""
    cures = ["raise max_length"] * bool(cut or prompts or dropped) + ["truncation_mode='keep_end'"] * bool(dropped)
    return f"{name}: " + "; ".join(filter(None, [", ".join(events), " or ".join(cures)]))


def describe_bad_rows(name: str, problems: Sequence[str], shown: int = 3) -> str:
    """How many rows are bad, and the first of them. `problems`: for each row what is wrong with it, or ""."""
    bad = [(index, problem) for index, problem in enumerate(problems) if problem]
    lines = [f"{name}: {len(bad):,} of {_plural(len(problems), 'row')} cannot be used"]
    lines += [f"  row {index:,}: {problem}" for index, problem in bad[:shown]]
    if len(bad) > shown:
        lines.append(f"  … and {_plural(len(bad) - shown, 'more row')}")
    return "\n".join(lines)


def describe_unlike(name: str, unlike: int, rows: int) -> str:
    """Why texts without a prompt column cannot be used; "" where most begin with a prompt, or few rows are known."""
    if rows < _ENOUGH_ROWS or 2 * unlike <= rows:
        return ""
    return (
        f"{name}: the texts of {unlike:,} of {_plural(rows, 'row')} share fewer than {PROMPT_WORDS} words at their "
        "beginning: without a column `prompt`, the texts of a row begin with their prompt. Add a column `prompt` (with "
        "'' where there is none), or begin each text with it"
    )


def describe_weights(name: str, weights: np.ndarray | None = None) -> str:
    """That the losses of a data set's examples are multiplied. `weights`: theirs, unless it is a stream."""
    line = f"{name}: the column `weight` multiplies the losses of its examples"
    if weights is None or not len(weights):
        return line
    low, high, mean = (f"{value:.3g}" for value in (weights.min(), weights.max(), weights.mean()))
    return f"{line}: {_plural(len(weights), 'example')}, weights from {low} to {high}, {mean} on average"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
