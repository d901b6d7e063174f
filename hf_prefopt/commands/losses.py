"""List the losses, or show the formula, the hyperparameters and the source of a loss.

hf_prefopt losses
hf_prefopt losses simpo
"""

import textwrap
from argparse import ArgumentParser, Namespace

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from hf_prefopt.kinds import KINDS
from hf_prefopt.losses import LossSpec, get_loss, list_losses
from hf_prefopt.reporting.loss_page import formula_of, needs_of, prose_of, reference_of


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `losses`."""
    parser.add_argument(
        "name", nargs="*", metavar="NAME", help="one or more losses, by name or alias; default: a table"
    )
    parser.add_argument(
        "--kind", choices=[kind.name for kind in KINDS], help="list only losses for this kind of examples"
    )


def run(options: Namespace) -> int:
    """Print the table of losses, or the descriptions of the named losses."""
    console = Console(highlight=False)
    if not options.name:
        console.print(_table([get_loss(name) for name in list_losses()], options.kind))
        console.print("hf_prefopt losses NAME describes a loss. NAME is a value of --loss_type.")
    for name in options.name:
        console.print(Text(_described(get_loss(name))), soft_wrap=True)
    return 0


def _table(specs: list[LossSpec], kind: str | None) -> Table:
    """Build a table with one row per loss, grouped by the kind of examples that the losses need."""
    table = Table(Column("loss", no_wrap=True), "data", "reference", "formula", "defaults", box=None, pad_edge=False)
    for of_kind in KINDS:
        for spec in specs:
            if spec.kind is of_kind and kind in (None, of_kind.name):
                cells = (spec.name, of_kind.name, reference_of(spec), formula_of(spec), _defaults(spec))
                table.add_row(*map(Text, cells))
    return table


def _defaults(spec: LossSpec) -> str:
    return ", ".join(f"{name}={value}" for name, value in spec.defaults.items())


def _described(spec: LossSpec) -> str:
    """Return the description of a loss: formula, explanation, requirements, defaults and source."""
    facts = {
        "aliases": ", ".join(spec.aliases),
        "data": spec.kind.wanted,
        "needs": ", ".join(needs_of(spec)),
        "defaults": _defaults(spec),
        "source": f"https://arxiv.org/abs/{spec.paper}" if spec.paper else "",
        "run it": f"hf_prefopt train --config {spec.name}, or --loss_type {spec.name}",
    }
    lines = [f"{name + ':':<10} {value}" for name, value in facts.items() if value]
    paragraphs = [textwrap.fill(" ".join(text.split()), 110) for text in prose_of(spec)]
    return "\n\n".join([spec.name, *paragraphs, "\n".join(lines)]) + "\n"
