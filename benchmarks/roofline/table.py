"""Tables of the counts of both trainers, and of measurements of the same case."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.roofline.estimate import PARTS, parts
from benchmarks.roofline.stepping import Case, Counts

GIB = 1024**3
MEASURED = Path(__file__).resolve().parents[1] / "GPU.md"
# The names of the shapes in `GPU.md`, and its names for the dtype of frozen weights.
SHAPES = {"qwen2.5-0.5b": "0.5B", "qwen3-8b": "8B"}
WEIGHTS = {"bf16": "bfloat16", "fp32-autocast": "float32"}
Figures = dict[str, float]


def figures(counts: Counts) -> Figures:
    """Return the totals of a step and the parts of its estimate, keyed by the names of the table's rows."""
    estimated = parts(counts.work)
    return {
        "positions": counts.positions,
        "TFLOP": counts.total("flop") / 1e12,
        "GB moved": counts.total("bytes") / 1e9,
        "launches": counts.total("launches"),
        "waits of the host": sum(counts.waits.values()),
        "peak GiB": counts.peak / GIB,
        "estimated ms": 1000 * sum(estimated.values()),
        **{f"  {part}": 1000 * estimated[part] for part in PARTS},
    }


def with_more_layers(few: Figures, one_more: Figures, more: int) -> Figures:
    """Extrapolate from a few layers, and from one more layer, to `more` additional layers of the same kind."""
    return {name: few[name] + more * (one_more[name] - few[name]) for name in few}


def measured(case: Case, path: Path = MEASURED) -> dict[str, str]:
    """Return the row for this case in the first table of `GPU.md`, keyed by column; empty if there is none."""
    wanted = {
        "shape": SHAPES.get(case.model),
        "frozen weights": WEIGHTS.get(case.dtype),
        "prompt : response": case.lengths,
        "pairs": str(len(case.rows)),
    }
    if case.mode != "lora" or case.checkpointing:
        return {}
    found = (row for row in _first_table(path.read_text()) if wanted.items() <= row.items())
    return next(found, {})


def _first_table(markdown: str) -> Iterator[dict[str, str]]:
    lines = markdown.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    columns: list[str] = []
    for name in _cells(lines[start]):  # "peak GiB TRL | ours"
        columns.append(columns[-1].replace("TRL", "ours") if name == "ours" else name)
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield dict(zip(columns, _cells(line), strict=True))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def show(case: Case, theirs: Figures, mine: Figures) -> None:
    """Print the table of a case."""
    real = measured(case)
    beside: dict[str, tuple[str, str]] = {}
    if real:
        beside["estimated ms"] = real["ms TRL"], real["ms ours"]
        beside["peak GiB"] = real["peak GiB TRL"], real["peak GiB ours"]
    title = f"{case.model}, {case.lengths}, {len(case.rows)} pairs, {case.mode}, {case.dtype}"
    title += ", checkpointing" if case.checkpointing else ""
    table = Table("", title=title, title_justify="left")
    for column in ("TRL", "ours", "TRL / ours", "measured TRL", "ours"):
        table.add_column(column, justify="right")
    for name in theirs:
        ratio = f"{theirs[name] / mine[name]:.2f}" if mine[name] else "–"
        table.add_row(name, _number(theirs[name]), _number(mine[name]), ratio, *beside.get(name, ("", "")))
    Console(width=110).print(table)


def show_sites(side: str, counts: Counts) -> None:
    """Print where the host waits, and which casts are kept."""
    console = Console(width=110)
    for site, count in sorted(counts.waits.items(), key=lambda item: -item[1]):
        console.print(f"{side} waits {count} times, {site}")
    for site, size in counts.kept.items():
        console.print(f"{side} keeps {size / GIB:.2f} GiB for the backward, {site}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.1f}"


def names_of(case: Case) -> dict[str, Any]:
    """Return the columns that identify a case in tables."""
    checkpointing = "yes" if case.checkpointing else "no"
    checkpointing = "keeps attention" if case.keeps_attention else checkpointing
    names = {"model": case.model, "lengths": case.lengths, "pairs": len(case.rows), "mode": case.mode}
    return names | {"weights": case.dtype, "checkpointing": checkpointing}


def markdown(records: list[dict[str, Any]]) -> str:
    """Return two tables in Markdown: the counts of both sides, and the parts of the estimate."""
    counts, estimates = [], []
    for each in records:
        theirs, mine, case = each["trl"], each["ours"], each["case"]
        ratio = {"TRL / ours": f"{theirs['estimated ms'] / mine['estimated ms']:.2f}"}
        names = [name for name in mine if not name.startswith("  ")]
        shown = {name: f"{_number(theirs[name])} / {_number(mine[name])}" for name in names}
        counts.append({**case, **shown, **ratio})
        of_parts = {part: f"{theirs[f'  {part}']:.0f} / {mine[f'  {part}']:.0f}" for part in PARTS}
        estimates.append({name: case[name] for name in list(case)[:2]} | of_parts | ratio)
    return f"{_table(counts)}\n\nThe parts of the estimate, ms of TRL / ours:\n\n{_table(estimates)}\n"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
