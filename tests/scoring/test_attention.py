"""Attention over segments, against a mask that is spelled out key by key.

PyTorch's variable-length kernel has no CPU version: a stand-in with its signatures and its documented meaning takes its
place here, which checks what the kernel is given. Whether the kernel keeps to that is for `benchmarks/gpu_check.py`.
"""

import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu_correctness import attention_by_mask
from hf_prefopt.data.shared import SharedCollator
from hf_prefopt.scoring import attention
from hf_prefopt.scoring.attention import UnsupportedAttention, segment_attention
from tests.tiny_models import random_rows

# Heads, key heads and window; the rows are up to twelve tokens long.
SHAPES = [(4, 4, None), (4, 2, None), (4, 1, 3), (2, 2, 1), (4, 2, 64)]


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """`varlen_attn` of PyTorch 2.11, `[T, heads, D]`: the last query on the last key, keys in a window."""

    def by_segment(tensor, bounds):
        return tensor.transpose(0, 1).split(bounds.diff().tolist(), dim=1)

    pieces = []
    left, right = (size if size >= 0 else 1 << 20 for size in window_size)
    segments = by_segment(query, cu_seq_q), by_segment(key, cu_seq_k), by_segment(value, cu_seq_k)
    for q, k, v in zip(*segments, strict=True):
        assert q.shape[1] <= max_q and k.shape[1] <= max_k and q.shape[0] == k.shape[0]
        ahead = torch.arange(k.shape[1]) - torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
        scores = (q @ k.transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
        scores = scores.masked_fill((ahead < -left) | (ahead > right), float("-inf"))
        pieces.append(scores.softmax(-1) @ v)
    return torch.cat(pieces, dim=1).transpose(0, 1)


def documented_with_gqa(query, key, value, *bounds, enable_gqa=False, **options):
    """The same of PyTorch 2.13, which repeats grouped heads by itself when it is told to."""
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return documented(query, key, value, *bounds, **options)


def by_kernel(query, key, value, segment_queries, segment_keys, segment_key_index, segment_longest, sliding_window):
    """Every segment to the kernel, as half precision on a GPU goes to it."""
    key, value = (tensor.index_select(2, segment_key_index) for tensor in (key, value))
    bounds = (segment_queries, segment_keys, segment_longest)
    return attention._varlen(query, key, value, *bounds, None, sliding_window)


WAYS = {  # what attends, PyTorch's kernel, and whether that repeats grouped heads
    "by segment": (segment_attention, None, None),
    "kernel of 2.11": (by_kernel, documented, False),
    "kernel of 2.13": (by_kernel, documented_with_gqa, True),
}


@pytest.mark.parametrize(("heads", "key_heads", "window"), SHAPES)
@pytest.mark.parametrize(("attend", "kernel", "has_gqa"), WAYS.values(), ids=WAYS)
def test_every_way_is_the_mask_spelled_out(monkeypatch, attend, kernel, has_gqa, heads, key_heads, window):
    """Output and gradients, in float64."""
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_VARLEN_HAS_GQA", has_gqa)
    batch = SharedCollator()(random_rows(3))
    segments = {name: value for name, value in batch.items() if name.startswith("segment_")}
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, n, batch["input_ids"].shape[1], 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    )
    found = attend(query, key, value, **segments, sliding_window=window)
    expected = attention_by_mask(query, key, value, batch, window)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    inputs = (query, key, value)
    gradients = (torch.autograd.grad((output * weight).sum(), inputs) for output in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_the_installed_kernel_takes_what_it_is_given():
    """The names by which it is called are the installed PyTorch's."""
    options = {"scale": None, "window_size": (-1, 0)} | ({"enable_gqa": True} if attention._VARLEN_HAS_GQA else {})
    inspect.signature(varlen_attn).bind(*"qkv", "queries", "keys", 1, 2, **options)


@pytest.mark.parametrize("asked", [{"s_aux": torch.ones(4)}, {"is_causal": False}])
def test_what_it_does_not_have_is_refused(asked):
    """Sinks, and attention to later tokens; by the name that the module asked with."""
    batch = SharedCollator()(random_rows(2))
    segments = {name: value for name, value in batch.items() if name.startswith("segment_")}
    tensors = [torch.randn(1, 4, batch["input_ids"].shape[1], 8) for _ in range(3)]
    with pytest.raises(UnsupportedAttention, match=next(iter(asked))):
        segment_attention(*tensors, **segments, **asked)
