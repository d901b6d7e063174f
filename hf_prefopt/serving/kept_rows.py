"""Rows that a run saves in its folder, so that a merged model can later be compared with the trained model.

The saved rows contain token ids of evaluation rows, or of training rows if there are no evaluation data. The file name
begins with "_", because the Trainer does not push such files to the Hub.
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
_PROMPT, _RESPONSE = 8, 8  # numbers of tokens in the prompt and the response of a synthetic row


class KeptRows(NamedTuple):
    """Rows on which a merged model is compared with the trained model.

    Attributes:
        rows: Prepared rows, with the columns `prompt_ids`, `response_ids` and `scored_masks`.
        name: Description of the rows in messages, such as "training rows".
        quantized: Description of the base model's quantization during training. None if it was not quantized.
    """

    rows: list[dict[str, Any]]
    name: str
    quantized: str | None = None


def keep_rows(folder: Path, evaluated: Any, trained: Any, quantized: str | None) -> None:
    """Save the first rows of the evaluation data or, without evaluation data, of the training data.

    Args:
        folder: Folder of the run.
        evaluated: Prepared evaluation dataset, or a dict of such datasets. None if there is no evaluation.
        trained: Prepared training dataset. None if there is no training.
        quantized: Description of the base model's quantization during training. None if it is not quantized.
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
    """Load the rows that a run saved. If there are none, return rows of synthetic tokens.

    Args:
        folder: Folder of the run, or of one of its checkpoints. The rows are in the folder of the run.
        config: Configuration of the model, which defines the valid tokens.
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
