"""Rows that a run saves in its folder, for the comparison of a merged model with the trained model.

The rows are tokens of evaluation rows. The file name begins with "_", because the Trainer does not push such files to
the Hub.
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
_PROMPT, _RESPONSE = 8, 8  # number of tokens in synthetic rows


class KeptRows(NamedTuple):
    """Prepared rows (`prompt_ids`, `response_ids`, `scored_masks`).

    Attributes:
        name: Description of the rows in messages. quantized: Quantization of the base model, or None.
    """

    rows: list[dict[str, Any]]
    name: str
    quantized: str | None = None


def keep_rows(folder: Path, evaluated: Any, trained: Any, quantized: str | None) -> None:
    """Save the first rows of the evaluation data or, without evaluation data, of the training data.

    Args:
        evaluated: Prepared dataset, dict of prepared datasets, or None. trained: Prepared dataset, or None.
        quantized: Quantization of the base model during training, or None.
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
    """Load the saved rows from a run's folder or, for a checkpoint, from its parent folder.

    Without saved rows, return rows of synthetic tokens.
    """
    for path in (folder / FILE, folder.parent / FILE):
        if path.is_file():
            kept = json.loads(path.read_text())
            return KeptRows(kept["rows"], kept["name"], kept["quantized"])
    generator = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = made_up_tokens(config, _PROMPT + _RESPONSE, generator)
        rows.append({"prompt_ids": ids[:_PROMPT], "response_ids": [ids[_PROMPT:]], "scored_masks": [[1] * _RESPONSE]})
    return KeptRows(rows, "rows of synthetic tokens")
