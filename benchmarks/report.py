"""Shows the results in the JSON file of `benchmarks.compare` as terminal tables, as Markdown, and as a plot."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
Rows = list[list[str]]


def machine() -> dict[str, str]:
    """The processor, the number of threads and the package versions."""
    import torch

    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "threads": str(torch.get_num_threads()), "python": platform.python_version(), **versions}


def tables(results: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """(title, columns, rows) for all results so far."""
    cases = results.get("cases", {})
    if cases:
        yield "Speed against TRL: TRL's step time / ours", SPEED_COLUMNS, [_speed(case) for case in cases.values()]
        yield (
            "Products: their FLOP, and the share of a step at the speed of one product",
            PRODUCT_COLUMNS,
            [_products(case) for case in cases.values()],
        )
        yield "Rates and work", RATE_COLUMNS, [_rates(case) for case in cases.values()]
    with_memory = [case for case in cases.values() if "memory" in case]
    if with_memory:
        yield "Peak resident memory of the process (GiB)", MEMORY_COLUMNS, [_memory(case) for case in with_memory]
    for name, levers in results.get("ablation", {}).items():
        title = f"Ablation on {name}: the step without the lever / the whole step"
        yield title, ("without", "ratio", "range", "positions"), [_lever(*item) for item in levers.items()]
    growth = results.get("growth", {})
    if growth:
        rows = [_growth(what, point, figures) for what, points in growth.items() for point, figures in points.items()]
        yield "Growth (ours)", ("with", "point", "positions", "CPU s per step", "peak GiB", "of which the step"), rows


SPEED_COLUMNS = ("case", "ratio", "range", "loss apart", "gradients apart", "rounds")
PRODUCT_COLUMNS = ("case", "TFLOP, TRL", "ours", "TRL / ours", "share, TRL", "ours", "GFLOP/s of one product")
RATE_COLUMNS = (
    "case",
    "CPU s per step, TRL",
    "ours",
    "of it system time, TRL",
    "ours",
    "pairs/s, TRL",
    "ours",
    "real tokens/s, TRL",
    "ours",
    "positions, TRL",
    "ours",
)
MEMORY_COLUMNS = ("case", "TRL", "ours", "ours / TRL", "model loaded")


def _speed(case: Mapping[str, Any]) -> list[str]:
    return [
        case["name"],
        f"{case['ratio']:.2f}×",
        _span(case["ratios"]),
        f"{case['loss_apart']:.0e}",
        f"{case['gradients_apart']:.0e}",
        str(len(case["ratios"])),
    ]


def _products(case: Mapping[str, Any]) -> list[str]:
    """FLOP and shares of the first round's batch."""
    flop, speed = case["flop"], case["product_speed"]
    shares = [flop[role] / case[role][0] / speed for role in ("peer", "ours")]
    return [
        case["name"],
        f"{flop['peer'] / 1e12:.2f}",
        f"{flop['ours'] / 1e12:.2f}",
        f"{flop['peer'] / flop['ours']:.2f}×",
        *(f"{share:.0%}" for share in shares),
        f"{speed / 1e9:.0f}",
    ]


def _rates(case: Mapping[str, Any]) -> list[str]:
    rounds = len(case["ratios"])
    return [
        case["name"],
        f"{sum(case['peer']) / rounds:.1f}",
        f"{sum(case['ours']) / rounds:.1f}",
        f"{case['system']['peer'] / rounds:.1f}",
        f"{case['system']['ours'] / rounds:.1f}",
        f"{case['peer_pairs_per_second']:.3f}",
        f"{case['our_pairs_per_second']:.3f}",
        f"{case['peer_tokens_per_second']:.0f}",
        f"{case['our_tokens_per_second']:.0f}",
        f"{case['positions']['peer'] // rounds:,}",
        f"{case['positions']['ours'] // rounds:,}",
    ]


def _memory(case: Mapping[str, Any]) -> list[str]:
    peer, ours = case["memory"]["trl"], case["memory"]["ours"]
    return [
        case["name"],
        f"{peer['peak']:.2f}",
        f"{ours['peak']:.2f}",
        f"{ours['peak'] / peer['peak']:.2f}",
        f"{ours['before']:.2f}",
    ]


def _lever(name: str, figures: Mapping[str, Any]) -> list[str]:
    positions = figures["positions"]["peer"] // len(figures["ratios"])
    return [name, f"{figures['ratio']:.2f}×", _span(figures["ratios"]), f"{positions:,}"]


def _growth(what: str, point: str, figures: Mapping[str, Any]) -> list[str]:
    positions = f"{figures['positions']:,}" if "positions" in figures else "–"
    step = figures["peak"] - figures["before"]
    return [what, point, positions, f"{figures['seconds']:.2f}", f"{figures['peak']:.2f}", f"{step:.2f}"]


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} – {max(values):.2f}"


def print_tables(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print all tables."""
    console = console or Console(width=150)
    for title, columns, rows in tables(results):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == columns[0] else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def as_markdown(results: Mapping[str, Any], plot: str | None = None) -> str:
    """All tables as a Markdown page."""
    about = results["about"]
    versions = ", ".join(f"{name} {about[name]}" for name in PACKAGES)
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(about["commands"]))
    lines = [
        "# Results",
        "",
        f"Printed by {commands} on {about['date']}: {about['cpu']}, {about['threads']} thread(s), "
        f"Python {about['python']}, {versions}. Model: {about['model']}; LoRA r = 16 on all linear layers, fp32, live "
        "reference, no checkpointing on either side, CPU time of the process. The two sides take turns on the same "
        "batches; `ratio` is the median over the rounds. TRL uses its defaults, including metrics, which it cannot "
        "turn off.",
    ]
    for title, columns, rows in tables(results):
        lines += ["", f"## {title}", "", *markdown_table(columns, rows)]
    if plot:
        lines += ["", f"![Speed and memory by case]({plot})"]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Rows) -> list[str]:
    """The lines of a table."""
    return [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(results: Mapping[str, Any], path: str | Path) -> None:
    """Two panels: the ratio of each case, and the peak memory of both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(results["cases"].values())
    places = range(len(cases))
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(11, 0.55 * len(cases) + 1.7), sharey=True, layout="constrained"
    )
    ratios = [case["ratio"] for case in cases]
    spread = [
        [r - min(c["ratios"]) for r, c in zip(ratios, cases, strict=True)],
        [max(c["ratios"]) - r for r, c in zip(ratios, cases, strict=True)],
    ]
    speed.barh(places, ratios, height=0.6, color="#2a6f97", xerr=spread, error_kw={"ecolor": "#12263a", "capsize": 3})
    speed.axvline(1, color="#888888", linewidth=1)
    for place, case in enumerate(cases):
        label = f"{case['ratio']:.2f}×"
        speed.text(0.08, place, label, va="center", color="white", fontweight="bold")
    speed.set_yticks(places, [case["name"] for case in cases])
    speed.invert_yaxis()
    speed.set_xlabel("times as fast as TRL (median and range)")

    measured = [(place, case["memory"]) for place, case in enumerate(cases) if "memory" in case]
    for offset, (name, label, color) in zip(
        (-0.2, 0.2), (("trl", "TRL", "#adb5bd"), ("ours", "hf_prefopt", "#2a6f97")), strict=True
    ):
        peaks = [side[name]["peak"] for _, side in measured]
        bars = memory.barh([place + offset for place, _ in measured], peaks, height=0.38, color=color, label=label)
        memory.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    memory.set_xlabel("peak resident memory of the process (GiB)")
    memory.margins(x=0.12)
    memory.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    for axis in (speed, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
