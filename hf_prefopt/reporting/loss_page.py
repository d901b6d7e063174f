"""The loss catalogue as a page of Markdown: `python -m hf_prefopt.reporting.loss_page > docs/losses.md`.

All that it says stands in the losses' signatures and docstrings, so a registered loss, a user's own among them, cannot
be left out or described wrongly.
"""

import inspect
import re
from collections import defaultdict

from hf_prefopt.kinds import KINDS
from hf_prefopt.losses.registry import LossSpec, get_loss, list_losses, token_stats_of

CONFIGS = "recipes/configs"
NOTATION = """\
s, the sum of the policy's log-probs (nats) over a response's scored tokens; s̄, their mean; r, s less the
reference's; r̄, that per token; w, l and g, the chosen, the rejected and the gold response; h = r_w − r_l;
ℓ(z) = −log σ(z); σ, the logistic function; sg, no gradient; R, a score of the data set."""
INTRODUCTION = f"""\
# The losses

Made from the registry by `python -m hf_prefopt.reporting.loss_page > docs/losses.md`; do not edit it by hand.

Any of these names, or an alias, goes into `loss_type`, in Python, in YAML or on the command line; several names with
`loss_weights` are summed over one forward. A loss's `beta` and `label_smoothing` are fields of `PreferenceConfig`; its
other hyperparameters go into `loss_params`.

Notation: {NOTATION}
"""


def loss_page() -> str:
    """The page: the notation, a table and a section for each kind of examples, and the index of papers."""
    specs = [get_loss(name) for name in list_losses()]
    parts = [INTRODUCTION]
    for kind in KINDS:
        of_kind = [spec for spec in specs if spec.kind is kind]
        parts.append(f"## Losses of {kind.name}\n\nData: {kind.wanted}.\n\n{_table(of_kind)}")
        parts += [_section(spec) for spec in of_kind]
    return "\n\n".join([*(part.rstrip() for part in parts), _papers(specs)]) + "\n"


def _table(specs: list[LossSpec]) -> str:
    rows = [f"| [{spec.name}](#{spec.name}) | {_cell(_formula(spec))} | {_reference(spec)} |" for spec in specs]
    return "\n".join(["| loss | formula | reference |", "|---|---|---|", *rows])


def _section(spec: LossSpec) -> str:
    """One loss: formula, what it is, when to use it, what it needs, its defaults, its source."""
    _, *details = _prose(spec)
    facts = {
        "Aliases": ", ".join(f"`{alias}`" for alias in spec.aliases),
        "Hyperparameters": ", ".join(f"`{name}={value!r}`" for name, value in spec.defaults.items()),
        "Inputs": ", ".join(f"`{name}`" for name in spec.inputs),
        "Needs": ", ".join(_needs(spec)),
        "Paper": _link(spec.paper) if spec.paper else "",
        "Run it": f"`accelerate launch recipes/dpo_lora.py --config {CONFIGS}/{spec.name}.yaml`",
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
    return "\n\n".join([f"### {spec.name}", spec.description, *details, lines])


def _needs(spec: LossSpec) -> list[str]:
    """What the loss asks of the trainer beyond summed log-probs of the policy, in words."""
    statistics = ", ".join(sorted(token_stats_of(spec.inputs, "policy") | token_stats_of(spec.inputs, "ref")))
    said = {
        "a reference model": spec.needs_reference_model and not spec.can_be_reference_free,
        "a reference model, unless `reference_free`": spec.can_be_reference_free,
        f"token statistics ({statistics})": statistics,
        "the global batch": spec.needs_global_batch,
        "state across batches (kept in checkpoints)": spec.state is not None,
        "the progress of the run": "progress" in spec.run_inputs,
        "the number of the epoch": "epoch" in spec.run_inputs,
        "log-probs averaged over tokens": spec.is_average_loss,
        "responses to other prompts": any("mismatched" in name for name in spec.inputs),
    }
    return [words for words, holds in said.items() if holds]


def _reference(spec: LossSpec) -> str:
    if not spec.needs_reference_model:
        return "none"
    return "yes, or none by `reference_free`" if spec.can_be_reference_free else "yes"


def _papers(specs: list[LossSpec]) -> str:
    """The index: each paper with its losses and their files."""
    by_paper: dict[str, list[LossSpec]] = defaultdict(list)
    for spec in specs:
        if spec.paper:
            by_paper[spec.paper].append(spec)
    rows = [
        f"| {_link(paper)} | {', '.join(f'[{spec.name}](#{spec.name})' for spec in of_paper)} | "
        f"{', '.join(f'[{spec.name}.yaml](../{CONFIGS}/{spec.name}.yaml)' for spec in of_paper)} |"
        for paper, of_paper in sorted(by_paper.items())
    ]
    return "\n".join(["## Papers", "", "| arXiv | losses | run it |", "|---|---|---|", *rows])


def _prose(spec: LossSpec) -> list[str]:
    """The paragraphs of the docstring before its sections."""
    paragraphs = re.split(r"\n\s*\n", inspect.getdoc(spec.function) or "")
    sections = (i for i, text in enumerate(paragraphs) if re.match(r"(Args|Returns|Raises|Example):", text))
    return paragraphs[: next(sections, len(paragraphs))]


def _formula(spec: LossSpec) -> str:
    """The first line up to what it says in words."""
    return spec.description.split(": ", 1)[0].rstrip(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})"


if __name__ == "__main__":
    print(loss_page(), end="")
