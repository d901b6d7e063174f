"""What a resumed run has to share with the run that wrote its checkpoint: the optimizer, the rows and their order."""

import json
import logging
import zlib
from collections.abc import Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

logger = logging.getLogger(__name__)

# The key next to the states of the callbacks.
RUN = "hf_prefopt_run"


@dataclass(frozen=True)
class RunFacts:
    """What decides which rows a step has, and what its optimizer keeps.

    Attributes:
        optim: the setting, without a suffix for another implementation of the same.
        seed: of the order of the rows.
        rows: their number and a checksum of three of them; `None` for a stream.
    """

    optim: str
    seed: int
    rows: str | None


def facts_of(args: TrainingArguments, dataset: Any) -> RunFacts:
    """The facts of a run over a prepared data set."""
    optim = str(getattr(args.optim, "value", args.optim)).removesuffix("_fused")
    seed = args.seed if args.data_seed is None else args.data_seed
    return RunFacts(optim, seed, _mark(dataset))


def _mark(dataset: Any) -> str | None:
    if not isinstance(dataset, Sized) or not len(dataset):
        return None
    chosen = [dataset[place] for place in sorted({0, len(dataset) // 2, len(dataset) - 1})]
    tokens = json.dumps([[list(row["prompt_ids"]), [list(ids) for ids in row["response_ids"]]] for row in chosen])
    return f"{len(dataset)} rows ({zlib.crc32(tokens.encode()):08x})"


def keep_facts(state: TrainerState, facts: RunFacts) -> None:
    """Put them into the state that the Trainer saves with a checkpoint."""
    state.stateful_callbacks[RUN] = asdict(facts)


def check_facts(checkpoint: str, facts: RunFacts, skips_rows: bool) -> None:
    """Compare a run with that of the checkpoint; other rows or another order are warned of.

    Args:
        skips_rows: whether the rows before the checkpoint are passed over (not with `ignore_data_skip`).

    Raises:
        ValueError: the checkpoint has the state of another kind of optimizer.
    """
    saved = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text()).get("stateful_callbacks", {}).get(RUN)
    if saved is None:
        return
    before = RunFacts(**saved)
    if before.optim != facts.optim and Path(checkpoint, OPTIMIZER_NAME).is_file():
        raise ValueError(
            f"{checkpoint} has the state of optim={before.optim!r}, and this run has optim={facts.optim!r}: set the "
            "same, or start a new run from its weights, with the folder as model"
        )
    for what, old, new in (("data", before.rows, facts.rows), ("seed", before.seed, facts.seed)):
        if skips_rows and old != new:
            logger.warning(
                "%s was written by a run with another %s (%s, now %s): the rows that are passed over are not those it "
                "trained on, so some rows are trained on twice and others are left out of this epoch",
                checkpoint,
                what,
                old,
                new,
            )
