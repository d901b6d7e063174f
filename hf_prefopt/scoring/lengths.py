"""Handle rotary embeddings whose frequencies depend on the sequence length: "dynamic" and "longrope".

In transformers, the longest sequence of a batch determines the frequencies for all sequences in the batch. With
"dynamic", it is the longest sequence that the model has seen so far. During scoring, each sequence gets the frequencies
for its own length, as if it were the first sequence that the model sees.
A prompt shared by responses of several lengths would need several sets of frequencies, so such prompts are not shared.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def ropes_by_length(model: nn.Module) -> list[str]:
    """Return the names of modules whose frequencies depend on the sequence length."""
    return [name for name, module in model.named_modules() if _kinds(module)]


def length_limit(model: nn.Module) -> int | None:
    """Return the sequence length up to which frequencies are constant; `None` if they never depend on the length."""
    ropes = [module for module in model.modules() if _kinds(module)]
    return min((_limit(module) for module in ropes), default=None)


def own_positions(attention_mask: Tensor) -> Tensor:
    """Return positions `[B, T]`: 0, 1, … for the tokens of a sequence; right padding repeats the last position."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def own_lengths(model: nn.Module, ropes: list[str]) -> Iterator[None]:
    """Make the named modules handle each row of `position_ids` `[B, T]` separately, within this context."""
    with ExitStack() as stack:
        for name in ropes:
            stack.enter_context(_row_by_row(model.get_submodule(name)))
        yield


@contextmanager
def _row_by_row(rope: nn.Module) -> Iterator[None]:
    together = rope.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        parts = []
        for row in range(len(position_ids)):
            _forget(rope)
            parts.append(together(x[min(row, len(x) - 1)][None], position_ids[row][None], *args, **kwargs))
        _forget(rope)
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    before = vars(rope).get("forward")
    vars(rope)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(rope)["forward"]
        else:
            vars(rope)["forward"] = before


def _forget(rope: nn.Module) -> None:
    """Reset the frequencies and the cached maximum length, which earlier sequences may have changed."""
    for name, original in list(rope.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            rope.register_buffer(name.replace("original_", ""), original.clone(), persistent=False)
    for name in [name for name in vars(rope) if name.endswith("max_seq_len_cached")]:
        setattr(rope, name, rope.original_max_seq_len)


def _kinds(module: nn.Module) -> list[str]:
    """Return the rope types of a module that depend on the sequence length. A module may have one per layer type."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return [kind for kind in kinds if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")]


def _limit(rope: nn.Module) -> int:
    parameters = getattr(rope.config, "rope_parameters", None) or {}
    nested = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    limits = [part["original_max_position_embeddings"] for part in nested if "original_max_position_embeddings" in part]
    return min([*limits, rope.original_max_seq_len])
