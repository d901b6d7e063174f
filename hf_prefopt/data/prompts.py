"""Score the prompts of a batch in addition to its responses. The scored prompt tokens follow the response tokens.

The model computes no further positions, because every layout of a batch (padded or packed) already contains the
prompts. The first token of a prompt is not scored, because no position predicts it. If a layout contains a prompt once
per response, the first copy is scored.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.group import group_rows


def with_scored_prompts(batch: PreferenceBatch, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
    """Append the G distinct prompts of these rows to the R responses of a batch of pairs, as scored sequences.

    Returns:
        A batch of R + G scored sequences. Its entry `prompts`, `[B]` int64, has the index of each pair's prompt among
            these sequences.
    """
    groups = group_rows(rows).groups
    counts = np.array([len(group.responses) for group in groups])
    first_responses, responses = np.cumsum(counts) - counts, int(counts.sum())
    starts = _starts(batch, first_responses)
    lengths = np.array([max(len(group.prompt_ids) - 1, 0) for group in groups])
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    targets = [np.asarray(group.prompt_ids[1:], dtype=np.int64) for group in groups]
    further = {
        "scored_rows": np.repeat(starts, lengths) + places,
        "targets": np.concatenate(targets),
        "response_index": responses + np.repeat(np.arange(len(groups)), lengths),
        "response_lengths": lengths,
    }
    entries = cast(dict[str, Any], batch)
    joined = {name: torch.cat([entries[name], torch.from_numpy(values)]) for name, values in further.items()}
    of_response = torch.from_numpy(responses + np.repeat(np.arange(len(groups)), counts))
    longest = max(batch["longest_response"], int(lengths.max()))
    return cast(
        PreferenceBatch,
        {**entries, **joined, "prompts": of_response[batch["chosen"]], "longest_response": longest},
    )


def _starts(batch: PreferenceBatch, first_responses: np.ndarray) -> np.ndarray:
    """Return, for each group, the index of its first prompt token in the flattened positions of the batch."""
    if "segment_queries" in batch:
        return batch["segment_queries"].numpy()[first_responses].astype(np.int64)
    return first_responses * batch["input_ids"].shape[1]
