"""The model card, which describes the model, the data, the loss, the reference, and the results.

The card is built from plain values, so the trainer, a script or a test can create one. The caller saves or pushes the
card.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_prefopt.reporting.notation import NOTATION
from hf_prefopt.reporting.preview import visible
from hf_prefopt.reporting.results import Results
from hf_prefopt.reporting.table import plain_caption

PACKAGES = ("hf_prefopt", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class LossFacts:
    """A loss in the card.

    Attributes:
        name: Name of the loss.
        formula: Formula of the loss of one example, followed by a short description.
        paper: arXiv number of the paper.
        weight: Weight of the loss in the sum of all losses.
        hyperparameters: Values of the hyperparameters, keyed by name.
    """

    name: str
    formula: str = ""
    paper: str = ""
    weight: float = 1.0
    hyperparameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class CardFacts:
    """The content of the card.

    Attributes:
        model_name: Title of the card.
        base_model: Model that was trained: a Hub name or a local folder.
        losses: Losses, in the order of the configuration.
        is_adapter: True if the result is a PEFT adapter, False if it is a full model.
        model_class: Name of the class that must load the model; None if `AutoModelForCausalLM` loads the right class.
        serve: Shell commands that serve the trained model.
        repository: Name that the usage snippet loads: `owner/name` on the Hub, or a local folder.
        reference: Description of the reference in a few words.
        datasets: Names on the Hub, or folders, of the datasets. Names on the Hub are also written to the metadata.
        data: Facts about the data, such as `{"training pairs": 1878}`.
        setup: Texts that describe the training setup, keyed by topic, from `StartSummary.as_dict`.
        hyperparameters: Values of the settings and hyperparameters, keyed by name.
        metrics: Metrics of the last evaluation.
        versions: Package versions. Default: the versions installed in this environment.
        results: Results before and after training, with confidence intervals and baselines; empty until the run has
            ended.
        answers: Dicts with a `prompt` and the answers `before` and `after` training.
        hardware: Text with the hardware and the duration of the run.
        warnings: Warnings of the run.
        has_curves: True if the card's folder contains `curves.png`.
        configuration: YAML text with the settings that differ from their defaults.
    """

    model_name: str
    base_model: str
    losses: list[LossFacts]
    is_adapter: bool
    repository: str
    reference: str = "none"
    model_class: str | None = None
    serve: str = ""
    datasets: list[str] = field(default_factory=list)
    data: Mapping[str, object] = field(default_factory=dict)
    setup: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    results: Results = field(default_factory=Results)
    answers: Sequence[Mapping[str, str]] = ()
    hardware: str = ""
    warnings: tuple[str, ...] = ()
    has_curves: bool = False
    configuration: str = ""


def model_card(facts: CardFacts, tags: str | list[str] | None = None, **metadata: Any) -> ModelCard:
    """Build the model card as a `huggingface_hub.ModelCard`, which has `.save(path)`, `.push_to_hub(name)` and `.data`.

    Args:
        facts: Content of the card.
        tags: Additional tags.
        metadata: Additional metadata, such as `license` or `language`.
    """
    own_tags = ["hf_prefopt", "preference-optimization", *(loss.name for loss in facts.losses)]
    further_tags = [tags] if isinstance(tags, str) else tags or []
    known = {"base_model": base_on_hub(facts.base_model), "license": license_of(facts.base_model)} | metadata
    data = ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=[name for name in facts.datasets if is_hub_name(name)] or None,
        tags=list(dict.fromkeys([*own_tags, *further_tags])),
        model_name=facts.model_name,
        eval_results=_eval_results(facts) or None,
        **{name: value for name, value in known.items() if value is not None},
    )
    losses = [_loss_line(loss, len(facts.losses)) for loss in facts.losses]
    setup = {**facts.setup, **({"hardware": facts.hardware} if facts.hardware else {})}
    sections = [
        f"# {facts.model_name}",
        _summary(facts),
        _list_section("Warnings", list(map(_one_line, facts.warnings))),
        _answers_section(facts.answers),
        _results_section(facts),
        "## Curves\n\n![Training curves](curves.png)" if facts.has_curves else "",
        _list_section("Loss", losses) + (f"\n\nNotation: {NOTATION}" if losses else ""),
        _table_section("Data", facts.data),
        _table_section("Setup", setup),
        f"## Use\n\n{usage_snippet(facts)}",
        f"With vLLM:\n\n```bash\n{facts.serve}\n```" if facts.serve else "",
        _table_section("Hyperparameters", facts.hyperparameters),
        _code_section("Configuration", "yaml", facts.configuration),
        _table_section("Versions", facts.versions),
        _code_section("Citation", "bibtex", citations(facts)),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect the result."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def is_hub_name(name: str) -> bool:
    """Return True if a name is valid in a card's metadata: it must be `owner/name` or `name`, and no local path."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def usage_snippet(facts: CardFacts) -> str:
    """Return a Markdown block of Python code that loads the model and answers a question."""
    loader = facts.model_class or "AutoModelForCausalLM"
    imports = f"from transformers import {loader}, AutoTokenizer"
    load = f'{loader}.from_pretrained(name, dtype="auto")'
    if facts.is_adapter and facts.model_class:
        imports = f"from peft import PeftModel\n{imports}"
        load = f'PeftModel.from_pretrained({loader}.from_pretrained("{facts.base_model}", dtype="auto"), name)'
    elif facts.is_adapter:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        load = 'AutoPeftModelForCausalLM.from_pretrained(name, dtype="auto")'
    return f"""\
```python
{imports}

name = "{facts.repository}"
model = {load}
tokenizer = AutoTokenizer.from_pretrained(name)

messages = [{{"role": "user", "content": "What is 12 times 12?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def base_on_hub(base_model: str) -> str | None:
    """Return the name of the base model on the Hub.

    If the base model is a local folder, return the name of the base model in the model card of this folder, or None.
    """
    if is_hub_name(base_model):
        return base_model
    named = _card_of(base_model).get("base_model")
    return named if isinstance(named, str) else None


def license_of(base_model: str) -> str | None:
    """Return the license in the model card of a base model that is a local folder. Otherwise, return None."""
    named = _card_of(base_model).get("license")
    return named if isinstance(named, str) else None


def _card_of(folder: str) -> dict[str, Any]:
    """Return the metadata of the card in a folder, or an empty dict if the folder has no valid card."""
    path = Path(folder, "README.md")
    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except ValueError:
        return {}  # README.md is not a model card


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Return the accuracy after training as an entry of the Hub's `model-index`, or [] if there is none."""
    accuracy = facts.results.accuracies.get("after")
    if accuracy is None:
        return []
    data = facts.datasets[0] if facts.datasets else "held-out preferences"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data if is_hub_name(data) else "preferences",
            dataset_name=Path(data).name,
            metric_type="accuracy",
            metric_name=f"preference accuracy (95% interval {accuracy.low:.3f} to {accuracy.high:.3f})",
            metric_value=round(accuracy.value, 4),
        )
    ]


def citations(facts: CardFacts) -> str:
    """Return BibTeX entries for this package and for the papers of the losses."""
    package = (
        "@software{hf_prefopt,\n  title = {hf_prefopt: offline preference optimization for Hugging Face models},\n"
        "  author = {{The hf_prefopt authors}},\n  year = {2026}\n}"
    )
    papers = {loss.paper: loss.name for loss in facts.losses if loss.paper}
    entries = [
        f"@misc{{arxiv_{paper.replace('.', '_')},\n  note = {{The loss {name}}},\n  eprint = {{{paper}}},\n"
        f"  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{paper}}}\n}}"
        for paper, name in papers.items()
    ]
    return "\n\n".join([package, *entries])


def _results_section(facts: CardFacts) -> str:
    """Return the results before and after training. If the run has not ended, return the last evaluation's metrics."""
    results = facts.results
    if results.after is None:
        return _table_section("Evaluation", _rounded(facts.metrics))
    heads = [name for name, _ in results.columns]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    lines += [f"| {label.strip()} | {' | '.join(cells)} |" for label, cells in results.rows()]
    notes = [f"{plain_caption(results)}. All other values are in nats.", *results.verdicts()]
    return "\n\n".join(["## Evaluation", "\n".join(lines), *notes])


def _answers_section(answers: Sequence[Mapping[str, str]]) -> str:
    """Return a table of prompts with the answers before and after training. The text in all cells is escaped."""
    if not answers:
        return ""
    rows = [f"| {' | '.join(_cell(answer[name]) for name in ('prompt', 'before', 'after'))} |" for answer in answers]
    head = "## Answers before and after training\n\nGreedy answers to prompts of the data.\n\n"
    return head + "| prompt | before | after |\n|---|---|---|\n" + "\n".join(rows)


_CELL = 600


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table, so that HTML, Markdown and line breaks in it have no effect."""
    text = text.strip()
    text = text if len(text) <= _CELL else text[:_CELL] + " …"
    escaped = re.sub(r"([\\`*_\[\]#~$!])", r"\\\1", html.escape(visible(text), quote=False))
    return escaped.replace("|", "&#124;").replace("\n", "<br>")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code_section(title: str, language: str, code: str) -> str:
    """Return a section with a code block. Its fence has more backticks than any sequence of backticks in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"## {title}\n\n{fence}{language}\n{code.strip()}\n{fence}" if code else ""


def _summary(facts: CardFacts) -> str:
    """Return one paragraph with the type of the model, its base model, its losses and its reference."""
    kind = "A PEFT adapter for" if facts.is_adapter else "A fine-tuned version of"
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    names = " + ".join(loss.name for loss in facts.losses)
    return (
        f"{kind} {base if is_hub_name(facts.base_model) else f'`{facts.base_model}`'}, aligned with preferences by "
        f"`hf_prefopt` (loss: {names}; reference: {facts.reference})."
    )


def _loss_line(loss: LossFacts, losses: int) -> str:
    """Describe a loss in one line, with its weight only if there are several losses."""
    weight = f"{loss.weight:g} × " if losses > 1 else ""
    formula = f": `{loss.formula}`" if loss.formula else ""
    settings = ", ".join(f"{name} = {value}" for name, value in loss.hyperparameters.items())
    paper = f"[arXiv:{loss.paper}](https://arxiv.org/abs/{loss.paper})" if loss.paper else ""
    return f"{weight}**{loss.name}**{formula}" + "".join(f"; {part}" for part in (settings, paper) if part)


def _rounded(metrics: Mapping[str, float]) -> dict[str, object]:
    """Format floats with four decimal places, because more digits would suggest a higher precision than measured."""
    return {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in metrics.items()}


def _list_section(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _table_section(title: str, entries: Mapping[str, object]) -> str:
    rows = "\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in entries.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}" if entries else ""
