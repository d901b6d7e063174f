"""Keep the usable rows of a dataset. Raise an error for the other rows or drop them, and log what was changed.

What happened to each row is recorded in additional columns, the notes (`NOTES`), so that the counts are also correct
when `datasets` loads prepared rows from its cache. These columns are removed after counting.
"""

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value

from hf_prefopt.data.rows import PROMPT_WORDS, BadRow, CanonicalRow, Tie, probably_lacks_prompt
from hf_prefopt.data.tokenize import TokenizedRow
from hf_prefopt.data.truncate import Cuts

logger = logging.getLogger(__name__)

NOTES = {
    "_problem": Value("string"),  # why the row cannot be used, or ""
    "_bad": Value("bool"),  # the row cannot be used; False for a tie
    "_no_room": Value("bool"),  # the prompt leaves no tokens for a response
    "_responses": Value("int32"),  # number of responses; 0 if the row is dropped
    "_responses_cut": Value("int32"),  # number of truncated responses
    "_prompt_cut": Value("bool"),  # the prompt was truncated
    "_longest": Value("int32"),  # number of tokens of prompt + longest response, before truncation
    "_identical": Value("bool"),  # chosen and rejected are the same tokens
    "_alike": Value("bool"),  # chosen and rejected differ only in white space or in their Unicode form
    "_lacks_prompt": Value("bool"),  # there is no prompt column, and the texts share only a few words at the start
    "_tie": Value("bool"),  # neither response is the better one
    "_open": Value("bool"),  # a response does not end with a scored control token
    "_against": Value("bool"),  # the chosen response has the lower score
    "_repeated": Value("bool"),  # the responses began with the prompt, and it was removed from them
    "_echoed": Value("bool"),  # the responses begin with the prompt, but it is too short to be removed
    "_text": Value("bool"),  # the row is text, to which no chat template is applied
    "_change": Value("string"),  # how the prompts in generation and in training differ; "" if they are equal
}
# Minimum number of rows for the error that prompts are missing. In fewer rows, it may be chance whether the texts share
# their first words.
_ENOUGH_ROWS = 8


def note_row(
    kept: TokenizedRow | None,
    cuts: Cuts,
    problem: BadRow | None,
    read: CanonicalRow | None,
    is_open: bool = False,
    change: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Return the notes on a row.

    Args:
        kept: The row after truncation, or None if it is dropped.
        cuts: What truncation removed.
        problem: The reason why the row cannot be used; None if it can be used.
        read: The canonical row; None if the row could not be read.
        is_open: Whether a response, before truncation, has no scored end token.
        change: See `TokenizedRow.change`.
    """
    responses = kept.response_ids if kept else []
    pairs = kept.example_columns.get("pairs", []) if kept else []
    is_tie = isinstance(problem, Tie)
    is_identical = any(responses[chosen] == responses[rejected] for chosen, rejected in pairs)
    return {
        "_problem": "" if problem is None or is_tie else str(problem),
        "_bad": problem is not None and not is_tie,
        "_no_room": kept is None and problem is None,
        "_responses": len(responses),
        "_responses_cut": cuts.responses,
        "_prompt_cut": cuts.prompt,
        "_longest": cuts.longest,
        "_identical": is_identical,
        "_alike": bool(pairs) and not is_identical and read is not None and _are_alike(*read.responses[:2]),
        "_lacks_prompt": read is not None and probably_lacks_prompt(read),
        "_tie": is_tie,
        "_open": is_open,
        "_repeated": read is not None and read.repeated,
        "_echoed": read is not None and read.echoed,
        "_text": read is not None and read.content_type == "text",
        "_change": "" if change is None else "{!r} in generation, {!r} in training".format(*change),
    }


def _are_alike(chosen: Any, rejected: Any) -> bool:
    """Return True if two responses are equal after white space is removed and Unicode is normalized (NFC)."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        one, other = ("".join(unicodedata.normalize("NFC", text).split()) for text in (chosen, rejected))
        return one == other
    if isinstance(chosen, dict) and isinstance(rejected, dict):
        return chosen.keys() == rejected.keys() and all(_are_alike(chosen[key], rejected[key]) for key in chosen)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return len(chosen) == len(rejected) and all(map(_are_alike, chosen, rejected))
    return chosen == rejected


def keep_usable_rows(
    noted: Dataset | IterableDataset, name: str, max_length: int | None, on_bad_rows: str
) -> Dataset | IterableDataset:
    """Return the usable rows without their notes, and log a warning about truncated and dropped rows.

    Args:
        noted: Prepared rows with their notes.
        name: Name of the dataset in messages.
        max_length: Maximum number of tokens, for messages.
        on_bad_rows: "error" or "drop".

    Raises:
        ValueError: If on_bad_rows="error" and a row cannot be used, if no row can be used, or if most rows seem to lack
            a prompt. For a stream, errors are raised while rows are read, and a stream without usable rows raises none.
    """
    if isinstance(noted, IterableDataset):
        return noted.filter(_StreamFilter(name, max_length, on_bad_rows)).remove_columns(list(NOTES))
    if not len(noted):
        return noted.remove_columns(list(NOTES))
    notes = noted.select_columns(list(NOTES)).with_format("arrow")[:]
    problems = notes["_problem"].to_pylist()
    if on_bad_rows == "error" and any(problems):
        raise ValueError(describe_bad_rows(name, problems))
    counts = {column: notes[column].to_numpy() for column in NOTES if column != "_problem"}
    _reject_missing_prompts(name, int(counts["_lacks_prompt"].sum()), int((~counts["_bad"]).sum()))
    dropped = counts["_bad"] | counts["_no_room"] | counts["_tie"]
    if dropped.all():
        raise ValueError("\n".join([_describe_no_rows(name, counts, max_length), *_bad_rows(problems)]))
    if summary := _summarize(name, counts, max_length):
        logger.warning(summary)
    kept = noted.select(np.flatnonzero(~dropped)) if dropped.any() else noted
    return kept.remove_columns(list(NOTES))


def count_notes(noted: Dataset) -> dict[str, int]:
    """Return the sum of each note over the rows, keyed by the name of the note without its underscore.

    The key `rows` is the number of rows. `longest` is the maximum instead of the sum. For a note that is text, the
    value is the number of rows in which the note is not empty.
    """
    counts = {"rows": len(noted)}
    for column, feature in NOTES.items():
        values = noted.with_format("arrow")[column][:]
        if feature.dtype == "string":
            values = pc.not_equal(values, "")
        total = pc.max(values) if column == "_longest" else pc.sum(values)
        counts[column.removeprefix("_")] = total.as_py() or 0
    return counts


class _StreamFilter:
    """A filter that keeps the usable rows of a stream. Each row is checked when it is read."""

    def __init__(self, name: str, max_length: int | None, on_bad_rows: str):
        self.name, self.max_length, self.on_bad_rows = name, max_length, on_bad_rows
        self.has_warned = False
        self.usable = self.lacking_prompt = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if row["_bad"] and self.on_bad_rows == "error":
            raise ValueError(f"{self.name}: row {row['row']:,}: {row['_problem']}")
        self.usable += not row["_bad"]
        self.lacking_prompt += row["_lacks_prompt"]
        _reject_missing_prompts(self.name, self.lacking_prompt, self.usable)
        summary = _summarize(self.name, {column: np.array([row[column]]) for column in NOTES}, self.max_length)
        if summary and not self.has_warned:
            self.has_warned = True
            logger.warning("%s (row %s, the first of this stream)", summary, f"{row['row']:,}")
        return not (row["_bad"] or row["_no_room"] or row["_tie"])


def _reject_missing_prompts(name: str, lacking: int, rows: int) -> None:
    """Raise `ValueError` if most rows seem to lack a prompt (see `probably_lacks_prompt`).

    `lacking` is the number of these rows, and `rows` the number of all usable rows. Fewer than `_ENOUGH_ROWS` rows
    raise no error.
    """
    if rows >= _ENOUGH_ROWS and 2 * lacking > rows:
        raise ValueError(
            f"{name}: the texts of {lacking:,} of {plural(rows, 'row')} share fewer than {PROMPT_WORDS} words at their "
            "beginning. Without a column `prompt`, the texts of a row must begin with their prompt: add a column "
            "`prompt` (with '' if there is none), or begin each text with it"
        )


def _describe_no_rows(name: str, notes: Mapping[str, np.ndarray], max_length: int | None) -> str:
    """Return the error message for a dataset of which no row is left.

    If rows are too long, the first sentence says so and names the fix. A line follows for each other event
    (`_events`).
    """
    count, others = len(notes["_bad"]), {**notes, "_no_room": np.zeros(1, bool)}
    if not notes["_no_room"].any():
        return "\n  ".join([f"{name}: none of {plural(count, 'row')} is left", *_events(others, max_length)])
    longest = notes["_longest"].max()
    reason = f"the prompts of {plural(int(notes['_no_room'].sum()), 'row')} alone fill max_length={max_length}"
    if notes["_no_room"].all():
        reason = f"their prompts alone fill max_length={max_length}"
    cure = f"pass max_length={longest}, which all rows fit, or truncation_mode='keep_end'"
    return "\n  ".join(
        [f"{name}: none of {plural(count, 'row')} is left, because {reason}: {cure}", *_events(others, max_length)]
    )


def _summarize(name: str, notes: Mapping[str, np.ndarray], max_length: int | None) -> str:
    """Return one line that says what was truncated, dropped or changed; "" if there is nothing to report.

    `notes` maps the columns of `NOTES` to arrays with one value per row.
    """
    events = _events(notes, max_length)
    no_room = bool(notes["_no_room"].any())
    too_long = no_room or any(notes[column].any() for column in ("_responses_cut", "_prompt_cut"))
    cures = ["raise max_length"] * too_long + ["set truncation_mode='keep_end'"] * no_room
    return f"{name}: " + "; ".join(filter(None, [", ".join(events), " or ".join(cures)])) if events else ""


def _events(notes: Mapping[str, np.ndarray], max_length: int | None) -> list[str]:
    """Return one text for each kind of event: rows truncated, dropped or changed, and doubtful rows that are kept.

    `notes` maps the columns of `NOTES` to arrays with one value per row.
    """
    cut, no_room = int(notes["_responses_cut"].sum()), int(notes["_no_room"].sum())
    prompts, bad, identical = (int(notes[column].sum()) for column in ("_prompt_cut", "_bad", "_identical"))
    ties, repeated, against, unclosed = (
        int(notes[column].sum()) for column in ("_tie", "_repeated", "_against", "_open")
    )
    limit = f"max_length={max_length} (longest {notes['_longest'].max():,} tokens)"
    events = []
    if cut:
        events.append(f"{cut:,} of {plural(notes['_responses'].sum(), 'response')} cut to {limit}")
    if prompts:
        events.append(f"{plural(prompts, 'prompt')} cut at the start to {'fit' if cut else limit}")
    if no_room:
        events.append(f"{plural(no_room, 'row')} dropped because the prompt alone fills {'it' if cut else limit}")
    if bad:
        events.append(f"{plural(bad, 'unusable row')} dropped")
    if ties:
        events.append(f"{plural(ties, 'tie')} dropped, because neither response is better")
    if repeated:
        events.append(f"the prompt removed from the responses of {plural(repeated, 'row')}, which began with it")
    if identical:
        events.append(f"{plural(identical, 'pair')} with chosen = rejected kept (nothing to learn from)")
    alike = int(notes["_alike"].sum())
    if alike:
        events.append(f"{plural(alike, 'pair')} kept whose responses differ only in white space or Unicode form")
    if unclosed:
        events.append(
            f"{plural(unclosed, 'row')} with a response that has no scored end-of-turn token, so the model does not "
            "learn to stop"
        )
    echoed = int(notes["_echoed"].sum())
    if echoed:
        events.append(
            f"the responses of {plural(echoed, 'row')} begin with their prompt, which is too short to be removed "
            "automatically: remove it if they repeat it"
        )
    texts = int(notes["_text"].sum())
    if 0 < texts < len(notes["_text"]) - bad - ties:
        events.append(
            f"{plural(texts, 'row')} {'is' if texts == 1 else 'are'} text, trained on unchanged, and the others are "
            "conversations (text_as='messages' converts all to conversations)"
        )
    changes = [change for change in notes["_change"] if change]
    if changes:
        events.append(
            f"in {plural(len(changes), 'row')}, the prompt in training differs from the prompt for generation, first: "
            f"{changes[0]}"
        )
    if against:
        events.append(f"{plural(against, 'pair')} kept although the chosen response has the lower score")
    return events


def describe_bad_rows(name: str, problems: Sequence[str], shown: int = 3) -> str:
    """Return how many rows are unusable, and why the first `shown` of these rows are.

    `problems` has one entry per row: the problem, or "" if the row is usable.
    """
    bad = sum(map(bool, problems))
    return "\n".join([f"{name}: {bad:,} of {plural(len(problems), 'row')} cannot be used", *_bad_rows(problems, shown)])


def _bad_rows(problems: Sequence[str], shown: int = 3) -> list[str]:
    """Return one line for each of the first `shown` unusable rows, and a last line that says how rows are counted."""
    bad = [(index, problem) for index, problem in enumerate(problems) if problem]
    lines = [f"  row {index:,}: {problem}" for index, problem in bad[:shown]]
    more = [f"  … and {plural(len(bad) - shown, 'more row')}"] * (len(bad) > shown)
    return [*lines, *more, *["  (rows are counted from 0)"] * bool(bad)]


def plural(count: int, noun: str) -> str:
    """Return the count and its noun: 1 row, 2,000 rows."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
