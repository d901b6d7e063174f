"""Rows that a run keeps beside its model, by which a merged model is compared with the trained one.

They are tokens of evaluation rows, in a file whose name begins with "_": the Trainer pushes no such file to the Hub.
"""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from hf_prefopt.scoring.agreement import made_up_tokens

FILE = "_kept_rows.json"
ROWS = 8
_COLUMNS = ("prompt_ids", "response_ids", "scored_masks")
_PROMPT, _RESPONSE = 8, 8  # tokens of made-up rows


class KeptRows(NamedTuple):
    """Prepared rows (`prompt_ids`, `response_ids`, `scored_masks`), what they are, and how the base was quantized."""

    rows: list[dict[str, Any]]
    name: str
    quantized: str | None = None


def keep_rows(folder: Path, evaluated: Any, trained: Any, quantized: str | None) -> None:
    """Write the first rows of the evaluation data, or of the training data where nothing is evaluated.

    Args:
        evaluated: a prepared data set, a dict of several, or None. trained: a prepared data set, or None.
        quantized: how the base model was quantized while it trained, if it was.
    """
    dataset = next(iter(evaluated.values()), None) if isinstance(evaluated, dict) else evaluated
    name = "held-back rows" if dataset is not None else "training rows"
    source = dataset if dataset is not None else trained
    if source is None:
        return
    rows = [{column: row[column] for column in _COLUMNS} for row in islice(source, ROWS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps({"name": name, "quantized": quantized, "rows": rows}) + "\n")


def read_rows(folder: Path, config: PreTrainedConfig) -> KeptRows:
    """The rows that a run kept in its folder, or above it for a checkpoint; without any, rows of made-up tokens."""
    for path in (folder / FILE, folder.parent / FILE):
        if path.is_file():
            kept = json.loads(path.read_text())
            return KeptRows(kept["rows"], kept["name"], kept["quantized"])
    generator = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = made_up_tokens(config, _PROMPT + _RESPONSE, generator)
        rows.append({"prompt_ids": ids[:_PROMPT], "response_ids": [ids[_PROMPT:]], "scored_masks": [[1] * _RESPONSE]})
    return KeptRows(rows, "rows of made-up tokens")
