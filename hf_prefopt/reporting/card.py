"""The model card: what was trained, on which data, with which loss and reference, and the results.

It is made from plain facts, so that the trainer, a script or a test can write one. The caller saves or pushes it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

PACKAGES = ("hf_prefopt", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class LossFacts:
    """A loss in the card: its name, its formula per example, arXiv number, weight and hyperparameters."""

    name: str
    formula: str = ""
    paper: str = ""
    weight: float = 1.0
    hyperparameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card says.

    Attributes:
        model_name: the title of the card.
        base_model: the model that was trained: a Hub name or a local folder.
        losses: the losses, in the order of the configuration.
        is_adapter: whether the result is a PEFT adapter; otherwise it is a whole model.
        model_class: the class to load, where it is not the one that `AutoModelForCausalLM` gives.
        serve: shell commands that serve the result.
        repository: what the usage snippet loads: `owner/name` on the Hub, or a local folder.
        reference: the reference, as a phrase.
        datasets: Hub names, which also go into the metadata, or folders.
        data: facts about the data, such as `{"training pairs": 1878}`.
        setup: how it was trained, as `StartSummary.as_dict` has it: a text by topic.
        hyperparameters: values by name.
        metrics: the metrics of the last evaluation.
        versions: package versions; by default, those of this environment.
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


def model_card(facts: CardFacts, tags: str | list[str] | None = None, **metadata: Any) -> ModelCard:
    """A card of `huggingface_hub`: `.save(path)`, `.push_to_hub(name)`, `.data` for the metadata.

    Args:
        facts: the content.
        tags: additional tags.
        metadata: additional metadata, such as `license` or `language`.
    """
    own_tags = ["hf_prefopt", "preference-optimization", *(loss.name for loss in facts.losses)]
    further_tags = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        base_model=facts.base_model if is_hub_name(facts.base_model) else None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=[name for name in facts.datasets if is_hub_name(name)] or None,
        tags=list(dict.fromkeys([*own_tags, *further_tags])),
        **metadata,
    )
    sections = [
        f"# {facts.model_name}",
        _summary(facts),
        _list_section("Loss", [_loss_line(loss, len(facts.losses)) for loss in facts.losses]),
        _table_section("Data", facts.data),
        _table_section("Setup", facts.setup),
        _table_section("Evaluation", _rounded(facts.metrics)),
        f"## Use\n\n{usage_snippet(facts)}",
        f"With vLLM:\n\n```bash\n{facts.serve}\n```" if facts.serve else "",
        _table_section("Hyperparameters", facts.hyperparameters),
        _table_section("Versions", facts.versions),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)


def package_versions() -> dict[str, str]:
    """The versions of the installed packages that a result depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def is_hub_name(name: str) -> bool:
    """Whether a name is valid in a card's metadata: `owner/name` or `name`, and not a local folder."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def usage_snippet(facts: CardFacts) -> str:
    """A Python block that loads the result and answers a question."""
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


def _summary(facts: CardFacts) -> str:
    """One paragraph: what this is, its base model, losses and reference."""
    kind = "A PEFT adapter for" if facts.is_adapter else "A fine-tuned version of"
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    names = " + ".join(loss.name for loss in facts.losses)
    return (
        f"{kind} {base if is_hub_name(facts.base_model) else f'`{facts.base_model}`'}, aligned with preferences by "
        f"`hf_prefopt` (loss: {names}; reference: {facts.reference})."
    )


def _loss_line(loss: LossFacts, losses: int) -> str:
    """A loss in one line; its weight only if there are several."""
    weight = f"{loss.weight:g} × " if losses > 1 else ""
    formula = f": `{loss.formula}`" if loss.formula else ""
    settings = ", ".join(f"{name} = {value}" for name, value in loss.hyperparameters.items())
    paper = f"[arXiv:{loss.paper}](https://arxiv.org/abs/{loss.paper})" if loss.paper else ""
    return f"{weight}**{loss.name}**{formula}" + "".join(f"; {part}" for part in (settings, paper) if part)


def _rounded(metrics: Mapping[str, float]) -> dict[str, object]:
    """Floats with four digits; sixteen would claim more than was measured."""
    return {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in metrics.items()}


def _list_section(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _table_section(title: str, entries: Mapping[str, object]) -> str:
    rows = "\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in entries.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}" if entries else ""
