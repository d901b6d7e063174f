"""The result of `inspect_dataset`. The terminal and the HTML page show it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_prefopt.data.summary import DataSummary
from hf_prefopt.reporting.data_texts import content_texts, size_text
from hf_prefopt.reporting.shown_rows import ShownRow


@dataclass(frozen=True)
class Inspection:
    """A dataset as training would read it.

    Attributes:
        name: Name of the dataset.
        layout: Name of the column layout, that is, of the way in which the columns are read; or "prepared rows".
        content: Content type of the rows: "messages", "text" or "tokens".
        columns: Names of the columns that are read, keyed by what they contain, such as {"prompt": "question"}.
        numbers: Names of the columns with numbers that losses may read, keyed by their names in prepared rows, such as
            {"margins": "margin"}.
        unused: Columns that are not used.
        about_the_row: Unused columns whose names show that they describe the row, such as ids, sources and models.
        kinds: Kinds of examples as which the rows can be read, such as "pairs" or "lists"; empty if the user named a
            loss.
        is_beginning: True if only the first rows of a stream were read.
        settings: Settings for truncation, such as {"max_length": 1024}, and settings that the user passed.
        summary: Counts of the prepared rows.
        counts: How many of the given rows were dropped, cut or changed (see `data.notes.count_notes`); empty if the
            given rows were already prepared.
        within: Share of rows that fit into a number of tokens, keyed by this number. The length of a row is that of its
            prompt and its longest response before truncation.
        remarks: Messages that training would log about the dataset.
        errors: Errors that would stop training.
        rows: The first usable rows. They include a truncated row if the dataset has any.
    """

    name: str
    layout: str
    content: str
    columns: Mapping[str, str]
    numbers: Mapping[str, str]
    unused: tuple[str, ...]
    about_the_row: tuple[str, ...]
    is_beginning: bool
    settings: Mapping[str, object]
    summary: DataSummary
    counts: Mapping[str, int] = field(default_factory=dict)
    within: Mapping[int, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    rows: tuple[ShownRow, ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def rows_given(self) -> int:
        """The number of rows that were read."""
        return self.counts.get("rows", self.summary.rows)


# Descriptions of what happens to rows, keyed by the name of the count (`data.notes.NOTES`). Dropped rows come first.
EVENTS: Mapping[str, str] = {
    "bad": "rows that cannot be used",
    "no_room": "rows dropped because the prompt alone fills max_length",
    "tie": "rows dropped because neither response is better",
    "responses_cut": "responses cut to max_length",
    "prompt_cut": "prompts cut at the start to max_length",
    "repeated": "rows whose responses began with the prompt, which was removed from them",
    "echoed": "rows whose responses begin with a prompt that is too short to be removed",
    "change": "rows whose prompt in training differs from the prompt for generation",
    "identical": "pairs with chosen = rejected, from which nothing is learned",
    "alike": "pairs whose responses differ only in white space or Unicode form",
    "against": "pairs whose chosen response has the lower score",
    "open": "rows with a response that has no scored end-of-turn token: the model does not learn to stop",
}
_NO_EVENTS = ("rows", "responses", "longest", "lacks_prompt", "problem", "text")


def events(inspection: Inspection) -> list[tuple[str, int]]:
    """Return pairs of a description of what happened to rows and their number, in the order of `EVENTS`."""
    names = dict.fromkeys([*EVENTS, *inspection.counts])
    counted = [(EVENTS.get(name, name), inspection.counts.get(name, 0)) for name in names if name not in _NO_EVENTS]
    return [event for event in counted if event[1]]


def facts(inspection: Inspection) -> list[tuple[str, str]]:
    """Return the facts about a dataset, as pairs of a name and a text."""
    found, summary = inspection, inspection.summary
    beginning = f" (the first {found.rows_given:,} rows of a stream)" if found.is_beginning else ""
    columns = [f"{part} = {column}" if part != column else part for part, column in found.columns.items()]
    # Shares are rounded down, so that 100% means that all rows fit.
    within = [f"{int(1000 * share) / 10:g}% ≤ {length:,}" for length, share in found.within.items()]
    listed = {
        "Rows": size_text(summary, found.counts) + beginning,
        "Layout": f"{found.layout} ({_CONTENT[found.content]})",
        "For losses of": _kinds(found.kinds),
        "Columns used": ", ".join(columns),
        "Numbers": ", ".join(found.numbers.values()) + " (read by losses that use them)" * bool(found.numbers),
        "Not used": ", ".join(found.unused),
        "About the row": ", ".join(found.about_the_row) + " (not used)" * bool(found.about_the_row),
        "Tokens": content_texts(summary)[0],
        "Row lengths": ", ".join(within) + " tokens (prompt and longest response, before any cut)" * bool(within),
        "Repeated": f"{summary.repeated_rows:,} rows" if summary.repeated_rows else "",
        "Length bias": next(iter(content_texts(summary)[1:2]), "") if summary.comparisons else "",
        "Labels": _labels(summary, advises="loss_type" not in found.settings),
        "Settings": ", ".join(f"{name}={_setting(value)}" for name, value in found.settings.items()),
    }
    return [(name, value) for name, value in listed.items() if value]


def _kinds(kinds: tuple[str, ...]) -> str:
    """Describe the kinds of examples for which losses can use a dataset."""
    unpaired = " (with unpair=True also of unpaired examples)" if "pairs" in kinds else ""
    return ", ".join(kinds) + unpaired


_CONTENT = {
    "messages": "conversations, written with the chat template",
    "text": "text, trained on unchanged, without the chat template",
    "tokens": "token ids",
}


def _setting(value: object) -> str:
    """Format a setting as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _labels(summary: DataSummary, advises: bool) -> str:
    """Describe the number of examples with each label and, if `advises`, the weights that KTO's authors recommend."""
    if not summary.desirable and not summary.undesirable:
        return ""
    counts = f"{summary.desirable:,} desirable, {summary.undesirable:,} undesirable"
    if summary.kto_weights is None or not advises:
        return counts
    desirable, undesirable = summary.kto_weights
    return f"{counts}; KTO's authors recommend desirable_weight={desirable:.3g}, undesirable_weight={undesirable:.3g}"
