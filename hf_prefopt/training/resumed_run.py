"""Check that a resumed run has the same optimizer, rows and row order as the run that wrote its checkpoint."""

import json
import logging
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

logger = logging.getLogger(__name__)

# Key under which `RunFacts` are stored in `TrainerState.stateful_callbacks`.
RUN = "hf_prefopt_run"


@dataclass(frozen=True)
class RunFacts:
    """Facts that are compared when a run resumes. They determine each step's rows and the optimizer's state.

    Attributes:
        optim: The setting `optim` without the suffix "_fused", which only selects an implementation.
        seed: Seed of the row order.
        rows: Text with the number of rows, and a checksum of the tokens of the first, the middle and the last row;
            `None` for a stream.
    """

    optim: str
    seed: int
    rows: str | None


def facts_of(args: TrainingArguments, dataset: Any) -> RunFacts:
    """Return the facts of a run over a prepared dataset."""
    optim = str(getattr(args.optim, "value", args.optim)).removesuffix("_fused")
    seed = args.seed if args.data_seed is None else args.data_seed
    return RunFacts(optim, seed, _mark(dataset))


def _mark(dataset: Any) -> str | None:
    if not hasattr(dataset, "__len__") or not len(dataset):
        return None
    chosen = [dataset[place] for place in sorted({0, len(dataset) // 2, len(dataset) - 1})]
    tokens = json.dumps([[list(row["prompt_ids"]), [list(ids) for ids in row["response_ids"]]] for row in chosen])
    return f"{len(dataset)} rows ({zlib.crc32(tokens.encode()):08x})"


def entries_of(state: TrainerState) -> dict[str, Any]:
    """Return `state.stateful_callbacks`. During training it is a dict, although transformers annotates it as a list."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def keep_facts(state: TrainerState, facts: RunFacts) -> None:
    """Store the facts in the state that the Trainer saves in a checkpoint."""
    entries_of(state)[RUN] = asdict(facts)


def check_facts(checkpoint: str, facts: RunFacts, skips_rows: bool) -> None:
    """Compare this run with the run that wrote the checkpoint; warn if the rows or their order differ.

    Args:
        skips_rows: True if this run skips the rows on which the run before the checkpoint has trained; False with
            `ignore_data_skip`.

    Raises:
        ValueError: the checkpoint has the state of a different optimizer.
    """
    saved = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text()).get("stateful_callbacks", {}).get(RUN)
    if saved is None:
        return
    before = RunFacts(**saved)
    if before.optim != facts.optim and Path(checkpoint, OPTIMIZER_NAME).is_file():
        raise ValueError(
            f"{checkpoint} has the state of optim={before.optim!r}, but this run has optim={facts.optim!r}: set "
            f"optim={before.optim!r}, or start a new run with the checkpoint folder as model"
        )
    for what, old, new in (("dataset", before.rows, facts.rows), ("seed", before.seed, facts.seed)):
        if skips_rows and old != new:
            logger.warning(
                "%s was written by a run with a different %s (%s, now %s): that run did not train on the rows that are "
                "skipped now, so this epoch uses some rows twice and omits others",
                checkpoint,
                what,
                old,
                new,
            )
