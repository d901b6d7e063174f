"""The record of a run: a JSON Lines file in the run's folder, from which the report can be built at any time.

Each line has a `kind`: "run" (facts about the run), "log" (an entry of the Trainer's log history), "accuracy" (the
accuracy of one evaluation, with its confidence interval), "example" (an example of the last evaluation), "pair" (a pair
with the log-ratio of each token) or "answer" (answers to a prompt before and after training).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "record.jsonl"
_LISTS = {"log": "logs", "accuracy": "accuracies", "example": "examples", "pair": "pairs", "answer": "answers"}


@dataclass
class RunRecord:
    """The record of a run.

    Attributes:
        run: Facts about the run, such as name, base_model, losses, reference, summary, data, hyperparameters, versions
            and command.
        logs: Log history of the Trainer.
        accuracies: One dict per evaluation, with `set` (the metric prefix of the dataset), `step`, and the attributes
            of `Accuracy`.
        examples: One dict per example of the last evaluation, with `set`, `row`, `pair` (the index of the example in
            its row), `prompt` (an integer that identifies the prompt), the margins `margin`, `margin_before` training
            and `reference_margin` (chosen − rejected, in nats), `lengths` and `log_ratios` (lists of the values of the
            chosen and the rejected response). Unknown values are `None`.
        pairs: Dicts for the pairs with the largest positive and the most negative margins, with `row`, `margin`,
            `is_right` (True if the margin is positive), `prompt` (text), and `responses`. Each response has a `name`
            and `tokens`, which is a list of pairs [text, log-ratio in nats].
        answers: Dicts with a `prompt` and the answers `before` and `after` training.
    """

    run: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    accuracies: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run."""
        return str(self.run.get("name", "run"))

    def lines(self) -> Iterable[dict[str, Any]]:
        """Yield the content of each line of the file as a dict."""
        yield {"kind": "run", **self.run}
        for kind, name in _LISTS.items():
            yield from ({"kind": kind, **entry} for entry in getattr(self, name))


def write_record(record: RunRecord, folder: str | Path) -> Path:
    """Write the record to the folder of the run, and return the path of the file."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(_finite(line), ensure_ascii=False, default=str) + "\n" for line in record.lines())
    path.write_text(text, encoding="utf-8")
    return path


def read_record(folder: str | Path) -> RunRecord:
    """Read the record of a run.

    Args:
        folder: Folder of the run, or path of the record file.

    Raises:
        ValueError: If the file does not exist or has an invalid line.
    """
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{folder}: there is no such folder: name the output_dir of a run"
            if not Path(folder).exists()
            else f"{folder} has no {FILE}, which is written when a run of `hf_prefopt train` ends, and by "
            "`hf_prefopt.console.finish_run`: name the output_dir of a finished run, or finish an interrupted run with "
            "--resume_from_checkpoint true"
        )
    record = RunRecord()
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            kind = line.pop("kind")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a line of a run's record: {text[:80]!r}") from error
        if kind == "run":
            record.run = line
        elif kind in _LISTS:
            getattr(record, _LISTS[kind]).append(line)
        else:
            raise ValueError(f"{path}, line {number}: kind {kind!r} is not one of run, {', '.join(_LISTS)}")
    return record


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by `None`, because JSON does not have them. Round floats to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
