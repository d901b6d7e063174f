"""The trainer's collator, and the choice of its layout."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.collator import Collator, CustomCollator, LoaderCollator
from hf_prefopt.data.layouts import AroundCollator, PaddedCollator, SharedCollator
from hf_prefopt.reference.cache_key import KeyedCollator
from hf_prefopt.scoring.layout import reason_of_length, settled_layout

CUSTOM = "the data_collator's"
NEFTUNE = "NEFTune scales its noise by the row length, but a row would contain several sequences"


def loader_collator(
    args: PreferenceConfig, pad_token_id: int, custom: Callable[[Any], PreferenceBatch] | None
) -> LoaderCollator:
    """Return the trainer's collator, which has one collator per layout. `settle_layout` later chooses one of them.

    If the user passed a `data_collator` (`custom`), it is the only choice.
    """
    if custom is not None:
        return LoaderCollator({CUSTOM: CustomCollator(custom)}, CUSTOM)
    padded = PaddedCollator(pad_token_id, args.pad_to_multiple_of)
    layouts: dict[str, Collator] = {"shared": SharedCollator(), "around": AroundCollator(padded), "padded": padded}
    if args.precompute_ref_log_probs:
        layouts = {name: KeyedCollator(collator) for name, collator in layouts.items()}
    return LoaderCollator(layouts, max_tokens=args.max_tokens_per_batch)


def settle_layout(
    collator: LoaderCollator, args: PreferenceConfig, models: Sequence[nn.Module], autocast_dtype: torch.dtype | None
) -> str:
    """Choose the layout of the batches, unless a custom collator determines it.

    Args:
        models: The policy and, if the reference is a separate model, the reference.

    Returns:
        The name of the layout and the reason for it, for the start summary.

    Raises:
        ValueError: `args.layout` is a layout that would change the scores of one of the models.
    """
    if collator.layout == CUSTOM:
        return CUSTOM
    collator.max_tokens = args.max_tokens_per_batch
    known = NEFTUNE if args.neftune_noise_alpha is not None else reason_of_length(models, args.max_length)
    layout = settled_layout(args.layout, models, autocast_dtype, known)
    collator.layout = layout.name
    return f"{layout.name}, {layout.why}"
