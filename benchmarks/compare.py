"""Speed and memory against TRL's `DPOTrainer`, in one command.

    python -m benchmarks.compare --rounds 5 --memory --ablation --growth --write-results
    python -m benchmarks.compare --quick

Each case first asserts that both trainers compute the same loss and gradients, then times alternating steps. The
results are saved to a JSON file after every case, so that you can stop a run and continue it with `--cases`; other
cases keep their earlier results. The text in `REMARKS.md` is appended to the results page. You need the model's folder,
or
`--model random:layers=2,vocab=1000 --cases equal-1:1` for a trial. A step of 8 pairs needs up to 16 GB in TRL.
"""

import argparse
import datetime
import gc
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.ablation import LEVERS, ladder
from benchmarks.cases import CASES
from benchmarks.growth import GROWTH
from benchmarks.memory import in_own_process
from benchmarks.paired import agreement, measure
from benchmarks.products import product_speed
from benchmarks.sides import Side, copy_adapter, our_side, perturb_adapters, trl_side
from benchmarks.work import ROOT, Work

MODEL = "models/smollm2-135m-instruct"
RESULTS, PLOT = ROOT / "benchmarks" / "RESULTS.md", ROOT / "benchmarks" / "results.png"
# At 35 and 105 s a round (RESULTS.md), and another round for the comparison of losses and gradients.
QUICK = ("equal-4:1", "chat")
# Appended to the tables: the section on the last GPU run, and notes.
SECTIONS = (ROOT / "benchmarks" / "GPU.md", ROOT / "benchmarks" / "REMARKS.md")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the cases given on the command line; print, save and return the results."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    results = _earlier(options.json)
    command = "python -m benchmarks.compare " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    date = datetime.date.today().isoformat()
    commands = [*results.get("about", {}).get("commands", ()), command.strip()]
    results["about"] = report.machine() | {"date": date, "commands": commands, "model": Path(options.model).name}

    def keep(part: str, name: str, figures: Mapping[str, Any]) -> None:
        results.setdefault(part, {})[name] = figures
        options.json.write_text(json.dumps(results, indent=1))

    if options.cases:
        peer, ours = trl_side(options.model), our_side(options.model)
        perturb_adapters(peer, ours)
        built = {name: CASES[name](peer, options.model) for name in options.cases}
        if options.rounds:  # the first batch also chooses the layout, which takes forward passes of its own
            ours.backward(next(iter(built.values())).batch(0))
        for name, work in built.items():
            if options.rounds:
                keep("cases", name, results.get("cases", {}).get(name, {}) | compared(peer, ours, work, options.rounds))
                report.print_tables({"cases": {name: results["cases"][name]}})
        del peer, ours
        gc.collect()
        if options.memory:
            for name, work in built.items():
                figures = {side: in_own_process(side, options.model, work.batch(0)) for side in ("trl", "ours")}
                keep("cases", name, results.get("cases", {}).get(name, {"name": work.name}) | {"memory": figures})
        if options.ablation and "gsm8k" in built:
            keep("ablation", "GSM8K pairs", ladder(options.model, built["gsm8k"], options.ablation))
        if options.ablation and "ranked" in built:
            levers = ["each pair a group"]
            keep("ablation", "ranked lists", ladder(options.model, built["ranked"], options.ablation, levers))
    for name in options.growth:
        keep("growth", name, GROWTH[name](options.model))

    report.print_tables(results)
    if options.write_results:
        report.draw(results, PLOT)
        sections = [report.as_markdown(results, PLOT.name), *(path.read_text() for path in SECTIONS)]
        RESULTS.write_text("\n".join(sections))
    return results


def compared(peer: Side, ours: Side, work: Work, rounds: int) -> dict[str, Any]:
    """Run a case: assert equality, then time the rounds, starting from the same adapter."""
    copy_adapter(peer, ours)
    apart = agreement(peer, ours, work.batch(0))
    print(
        f"{work.name}: losses apart by {apart.loss:.1e}, gradients by {apart.gradient:.1e} "
        f"(worst parameter {apart.worst_parameter:.1e})",
        flush=True,
    )
    apart.check()
    figures = {
        "name": work.name,
        "loss_apart": apart.loss,
        "gradients_apart": apart.gradient,
        "worst_parameter_apart": apart.worst_parameter,
    }
    # The FLOP of the first round's batch; the speed of a product beside the steps, as the machine may be shared.
    timed = measure(peer, ours, work, rounds).summary()
    return figures | timed | {"flop": apart.flop, "product_speed": product_speed(ours.model)}


def _earlier(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"a model's folder (default {MODEL}), or random:layers=2,…")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per case; 0 for none")
    parser.add_argument(
        "--quick", action="store_true", help=f"two rounds of {' and '.join(QUICK)}: some 7 minutes on one CPU thread"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of each side")
    parser.add_argument(
        "--ablation", type=int, nargs="?", const=2, default=0, help=f"rounds of the ladder: {', '.join(LEVERS)}"
    )
    parser.add_argument("--growth", nargs="*", default=[], choices=list(GROWTH), help="no names: all")
    parser.add_argument("--json", type=Path, default=Path("benchmark-results.json"), help="JSON file with the results")
    parser.add_argument("--write-results", action="store_true", help="write benchmarks/RESULTS.md and the plot")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    if options.quick:
        options.cases, options.rounds = list(QUICK), 2
    if "--growth" in given and not options.growth:
        options.growth = list(GROWTH)
    return options


if __name__ == "__main__":
    main()
