"""What becomes of a data set's rows, in words: what was cut and left out, which are unusable, what they weigh."""

from collections.abc import Mapping, Sequence

import numpy as np

from hf_prefopt.data.texts import PROMPT_WORDS

# Fewer rows may begin alike, or not, by chance.
_ENOUGH_ROWS = 8


def summarise(name: str, notes: Mapping[str, np.ndarray], max_length: int | None) -> str:
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
