"""Check that responses end with a token at which the model stops generating."""

import logging
from collections import Counter
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.tokenize import TokenKinds

logger = logging.getLogger(__name__)

_ROWS = 1000


def stop_tokens(model: Any) -> frozenset[int]:
    """Return the end-of-sequence ids in a model's config and generation config. If `model` is None, return no ids."""
    configs = [getattr(model, name, None) for name in ("generation_config", "config")]
    found: set[int] = set()
    for ids in (getattr(config, "eos_token_id", None) for config in configs):
        found |= set(ids) if isinstance(ids, list | tuple) else {ids} if ids is not None else set()
    return frozenset(found)


def report_endings(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int], name: str
) -> None:
    """Warn once if responses end with a control token at which the model does not stop generating.

    Args:
        dataset: Prepared rows. Only the first 1,000 rows are checked. A stream is not checked.
        tokenizer: The tokenizer. Its EOS counts as a token at which the model stops.
        stops: Other ids at which the model stops generating: the result of `stop_tokens`.
        name: Name of the dataset in the warning.
    """
    stops = stops | {tokenizer.eos_token_id} - {None}
    if not isinstance(dataset, Dataset) or not stops:
        return
    rows = dataset.select_columns(["response_ids"]).with_format(None)[:_ROWS]["response_ids"]
    kinds = TokenKinds(tokenizer)
    ends = [kinds.closing_token(ids) for responses in rows for ids in responses]
    wrong = Counter(end for end in ends if end is not None and end not in stops)
    if wrong:
        (end, _), *_ = wrong.most_common(1)
        ending, *known = [repr(tokenizer.convert_ids_to_tokens(token)) for token in (end, *sorted(stops))]
        logger.warning(
            f"{name}: {sum(wrong.values()):,} of {len(ends):,} responses end with {ending}, at which the model does "
            f"not stop generating (it stops at {', '.join(known)}): add it to model.generation_config.eos_token_id, or "
            "use the chat template that the model was trained with"
        )
