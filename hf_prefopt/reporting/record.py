"""The record of a run: one file of JSON lines in its folder, from which its report can be made at any time.

Each line has a `kind`: "run" (facts), "log" (an entry of the Trainer's log history), "accuracy" (of an evaluation, with
its interval), "example" (of the last evaluation), "pair" (tokens with their log-ratios) or "answer".
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
    """What is known about a run.

    Attributes:
        run: facts: name, base_model, losses, reference, summary, data, hyperparameters, versions, command, ….
        logs: the Trainer's log history.
        accuracies: `set`, `step`, and an `Accuracy`, for each evaluation.
        examples: of the last evaluation: `set`, `row`, `pair`, `prompt` (a number), `margin`, `margin_before`,
            `reference_margin` (nats, chosen − rejected), `lengths` and `log_ratios` (chosen, rejected); null if
            unknown.
        pairs: of the examples most right and most wrong: `row`, `margin`, `is_right`, `prompt` and for each response
            its `name` and `tokens`, a list of [text, log-ratio in nats].
        answers: `prompt`, `before`, `after`.
    """

    run: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    accuracies: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.run.get("name", "run"))

    def lines(self) -> Iterable[dict[str, Any]]:
        """All lines of the file."""
        yield {"kind": "run", **self.run}
        for kind, name in _LISTS.items():
            yield from ({"kind": kind, **entry} for entry in getattr(self, name))


def write_record(record: RunRecord, folder: str | Path) -> Path:
    """Write the record into the folder of its run, and return its path."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(_finite(line), ensure_ascii=False, default=str) + "\n" for line in record.lines())
    path.write_text(text, encoding="utf-8")
    return path


def read_record(folder: str | Path) -> RunRecord:
    """Read the record of a run.

    Args:
        folder: the run's folder, or the file itself.

    Raises:
        ValueError: there is no such file, or a line of it is broken.
    """
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FILE}: the recipes and `hf_prefopt.console.finish_run` write it when a run ends"
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
    """The same with `None` for NaN and infinity, which JSON does not have; floats with six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
