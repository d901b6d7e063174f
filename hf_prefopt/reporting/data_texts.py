"""Describe datasets in a line or two, for the start of a run."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from datasets import Dataset

from hf_prefopt.data.notes import plural
from hf_prefopt.data.summary import DataSummary, summarize


def data_texts(
    datasets: Mapping[str, Any],
    counts: Mapping[Any, Mapping[str, int]] = MappingProxyType({}),
    by_prompt: bool = False,
    streams: Mapping[Any, str] = MappingProxyType({}),
) -> list[str]:
    """Describe the sizes of the datasets, and the tokens and response lengths of the first one.

    Args:
        datasets: Prepared datasets by purpose, such as `{"train": dataset}`.
        counts: For each dataset, how many of its rows were dropped, cut or changed (`notes.count_notes`), if known.
        by_prompt: True if all rows with the same prompt are in one batch (`group_by_prompt`).
        streams: For each stream, a description of the columns of its rows (or of its sources), if known.
    """
    present = {name: rows for name, rows in datasets.items() if rows is not None}
    summaries = {name: summarize(rows) for name, rows in present.items() if isinstance(rows, Dataset)}
    sizes = [
        f"{name} {size_text(summaries[name], counts.get(rows, {}))}"
        if name in summaries
        else f"{name} a stream" + (f" of {streams[rows]}" if rows in streams else "")
        for name, rows in present.items()
    ]
    first = next(iter(present), None)
    return [", ".join(sizes) or "none", *(content_texts(summaries[first], by_prompt) if first in summaries else ())]


def size_text(summary: DataSummary, counts: Mapping[str, int]) -> str:
    """Describe the numbers of rows and examples, as in `1,000 rows → 990 pairs of 640 prompts (10 rows dropped)`."""
    given = counts.get("rows", summary.rows)
    dropped = sum(counts.get(reason, 0) for reason in ("bad", "no_room", "tie"))
    cut = counts.get("responses_cut", 0)
    events = [f"{plural(dropped, 'row')} dropped"] * bool(dropped) + [f"{plural(cut, 'response')} cut"] * bool(cut)
    return (
        f"{plural(given, 'row')} → {plural(summary.examples, summary.kind.removesuffix('s'))} of "
        f"{plural(summary.prompts, 'prompt')}" + (f" ({', '.join(events)})" if events else "")
    )


def content_texts(summary: DataSummary, by_prompt: bool = False) -> list[str]:
    """Describe the content of a dataset, in one text per topic.

    The topics are the number of tokens and the share that prompt sharing saves, how often the better response is
    longer, and the number of examples with each label.
    """
    row, prompt = f"{summary.saved_by_row:.0%}", f"{summary.saved_by_prompt:.0%}"
    saved = prompt if by_prompt else row + f" ({prompt} with group_by_prompt)" * (row != prompt)
    texts = [f"{summary.tokens:,} tokens, {summary.scored_tokens:,} of them scored; sharing prompts saves {saved}"]
    if summary.comparisons:
        texts.append(
            f"{_LONGER[summary.kind].format(f'{summary.longer:.1%}')} ({summary.as_long:.1%} equal): the accuracy of "
            f'"the longer one is better" is {summary.longer_accuracy:.1%}'
        )
    if summary.desirable or summary.undesirable:
        texts.append(f"{summary.desirable:,} desirable and {summary.undesirable:,} undesirable")
    return texts


_LONGER = {
    "pairs": "the chosen response is longer in {} of pairs",
    "triples": "the chosen response is longer in {} of pairs",
    "lists": "the better of two responses of a list is longer in {} of cases",
    "unpaired examples": "a desirable response is longer than an undesirable one in {} of cases",
}
