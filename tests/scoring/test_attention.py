"""Attention over segments is compared with an explicit mask for every key.

PyTorch's variable-length kernel has no CPU version. A stand-in with the same signatures and the documented behavior
replaces it, and checks its arguments. `benchmarks/gpu_check.py` checks whether the kernel behaves as documented.
"""

import inspect
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu_correctness import ARCHITECTURES, attention_by_mask
from hf_prefopt.data.layouts import SharedCollator
from hf_prefopt.scoring import attention
from hf_prefopt.scoring.attention import UnsupportedAttention, install_segment_attention, segment_attention
from hf_prefopt.scoring.forward import install_scoring, score
from tests.scoring.architectures import architecture
from tests.tiny_models import random_rows, tiny_model

# Heads, key heads and window; the rows have up to twelve tokens.
SHAPES = [(4, 4, None), (4, 2, None), (4, 1, 3), (2, 2, 1), (4, 2, 64)]


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Implement `varlen_attn` of PyTorch 2.11, `[T, heads, D]`: the last query is
    aligned with the last key; windows.
    """

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
    """Implement that of PyTorch 2.13, which repeats grouped heads itself if `enable_gqa` is set."""
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return documented(query, key, value, *bounds, **options)


def by_kernel(query, key, value, *, segment_key_index, sliding_window, segment_lengths, **bounds):
    """Run the kernel for every segment, as for half precision on a GPU."""
    assert max(segment_lengths.queries) == bounds["segment_longest"][0]
    key, value = (tensor.index_select(2, segment_key_index) for tensor in (key, value))
    settled = (bounds[f"segment_{name}"] for name in ("queries", "keys", "longest"))
    return attention._varlen(query, key, value, *settled, None, sliding_window)


WAYS = {  # the attention function, PyTorch's kernel, and whether the kernel repeats grouped heads
    "by segment": (segment_attention, None, None),
    "kernel of 2.11": (by_kernel, documented, False),
    "kernel of 2.13": (by_kernel, documented_with_gqa, True),
}


@pytest.mark.parametrize(("heads", "key_heads", "window"), SHAPES)
@pytest.mark.parametrize(("attend", "kernel", "has_gqa"), WAYS.values(), ids=WAYS)
def test_every_way_is_the_mask_spelled_out(monkeypatch, attend, kernel, has_gqa, heads, key_heads, window):
    """Output and gradients are compared in float64."""
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
    """The parameter names with which it is called exist in the installed PyTorch."""
    options = {"scale": None, "window_size": (-1, 0)} | ({"enable_gqa": True} if attention._VARLEN_HAS_GQA else {})
    inspect.signature(varlen_attn).bind(*"qkv", "queries", "keys", 1, 2, **options)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class BySegment(Exception):
    """A segment with this number of queries is computed by a separate call."""


@pytest.mark.parametrize(
    ("query", "value", "autocast", "expected"),
    [
        (FP32, BF16, BF16, BF16),  # fp32 weights: rotary embeddings in fp32, and the value projection under autocast
        (FP32, FP16, FP16, FP16),
        (FP32, FP32, BF16, BF16),
        (FP32, BF16, None, BF16),  # fp32 norms of queries and keys in a half-precision model
        (BF16, BF16, None, BF16),
        (FP32, FP32, None, None),  # full precision everywhere, which the kernel does not support
    ],
)
def test_half_precision_reaches_the_kernel_on_cuda(monkeypatch, query, value, autocast, expected):
    """Fake CUDA tensors take the same path as real ones, up to the call of the kernel or of a segment."""
    calls = []

    def kernel_call(query, key, value, *bounds_and_settings):
        calls.append({tensor.dtype for tensor in (query, key, value)})
        return query

    def one_segment(query, *_):
        raise BySegment(query.shape[2])

    monkeypatch.setattr(attention, "_varlen", kernel_call)
    monkeypatch.setattr(attention, "_one_segment", one_segment)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    batch = SharedCollator()(random_rows(3))
    with FakeTensorMode(), torch.no_grad(), cuda_autocast(autocast):
        segments = {
            name: torch.empty(given.shape, dtype=given.dtype, device="cuda") if torch.is_tensor(given) else given
            for name, given in batch.items()
            if name.startswith("segment_")
        }
        length = batch["input_ids"].shape[1]
        tensors = [
            torch.empty(1, heads, length, 64, dtype=dtype, device="cuda")
            for heads, dtype in ((4, query), (2, query), (2, value))
        ]
        if expected is None:
            # Fake tensors have no values, so reading a length would raise another error.
            with pytest.raises(BySegment, match=f"^{batch['segment_lengths'].queries[0]}$"):
                segment_attention(*tensors, **segments)
        else:
            segment_attention(*tensors, **segments)
    assert calls == ([{expected}] if expected else [])


@contextmanager
def cuda_autocast(dtype):
    """Do what `torch.autocast("cuda", dtype)` does, which disables itself on a machine without a GPU."""
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_under_autocast_every_layer_attends_in_its_dtype(monkeypatch, model_type):
    """fp32 weights with bf16 autocast: in every architecture, attention over segments computes in bf16."""
    seen, one_segment = [], attention._one_segment

    def recorded(query, key, value, *settings):
        seen.append({tensor.dtype for tensor in (query, key, value)})
        return one_segment(query, key, value, *settings)

    monkeypatch.setattr(attention, "_one_segment", recorded)
    model = tiny_model(model_type, **ARCHITECTURES[model_type])
    install_scoring(model)
    install_segment_attention(model)
    batch = SharedCollator()(random_rows(3))
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        score(model, batch)
    segments = len(batch["segment_queries"]) - 1
    assert seen == [{BF16}] * (segments * model.config.num_hidden_layers)


@pytest.mark.parametrize("asked", [{"position_bias": torch.ones(4)}, {"is_causal": False}])
def test_what_it_does_not_have_is_refused(asked):
    """A position bias and attention to later tokens raise an error with the name of the argument."""
    batch = SharedCollator()(random_rows(2))
    segments = {name: value for name, value in batch.items() if name.startswith("segment_")}
    tensors = [torch.randn(1, 4, batch["input_ids"].shape[1], 8) for _ in range(3)]
    with pytest.raises(UnsupportedAttention, match=next(iter(asked))):
        segment_attention(*tensors, **segments, **asked)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (3, None), (None, 4), (3, 4)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_sinks_and_chunks_are_the_mask_spelled_out(has_sinks, window, chunk):
    """In float64, with the gradient of the sinks: out = attention · σ(lse − s),
    which equals one more key with value 0.
    """
    batch = SharedCollator()(random_rows(3))
    segments = {name: value for name, value in batch.items() if name.startswith("segment_")}
    generator = torch.Generator().manual_seed(0)
    length = batch["input_ids"].shape[1]
    query, key, value = (
        torch.randn(1, heads, length, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    sinks = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True) if has_sinks else None
    position = batch["position_ids"][0]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    keys = batch["segment_key_index"].split(batch["segment_keys"].diff().tolist())
    for rows, visible in zip(torch.arange(length).split(batch["segment_queries"].diff().tolist()), keys, strict=True):
        q, k = position[rows, None], position[visible]
        sees = (q >= k) & (q - k < (window or length)) & (q // (chunk or length) == k // (chunk or length))
        allowed[rows[:, None], visible] = sees
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    if has_sinks:
        expected = expected * (scores.logsumexp(-1) - sinks[:, None]).sigmoid()[..., None]
    found = segment_attention(query, key, value, **segments, sliding_window=window, chunk=chunk, s_aux=sinks)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    inputs = [query, key, value, sinks][: 4 if has_sinks else 3]
    gradients = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected.transpose(1, 2)))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


V100, T4, A100, H100 = (7, 0), (7, 5), (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "expected"),
    [
        (H100, BF16, (128, 128), True),
        (A100, FP16, (256, 256), True),
        (A100, BF16, (64, 64), True),
        (H100, FP32, (64, 64), False),
        (H100, BF16, (320, 320), False),
        (H100, BF16, (192, 128), False),  # DeepSeek-V3
        (H100, BF16, (100, 100), False),  # OpenLLaMA-3B; the kernel needs a multiple of 8
        (T4, FP16, (64, 64), False),
        (V100, BF16, (64, 64), False),
        (None, BF16, (64, 64), False),
    ],
)
def test_where_the_kernel_is_taken(capability, dtype, widths, expected):
    assert attention.fits_varlen(dtype, widths, capability) == expected


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "said"),
    [
        ("llama", H100, BF16, "variable-length kernel"),
        ("llama", H100, FP32, "PyTorch's (sdpa), one response at a time"),
        ("llama", T4, FP16, "PyTorch's (sdpa), one response at a time"),
        ("gemma2", H100, BF16, "PyTorch's (eager), one response at a time, because of its soft-cap"),
        ("gpt_oss", H100, BF16, "PyTorch's (eager), one response at a time, because of its sinks"),
    ],
)
def test_the_summary_names_the_attention(name, capability, dtype, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = architecture(name)
    attention.install_segment_attention(model)
    assert attention.describe_attention(model, torch.device("cuda"), dtype) == said


@pytest.mark.parametrize("config", [{"head_dim": 12}, {"head_dim": 264}, {"head_dim": None, "hidden_size": 48}])
def test_the_summary_names_head_dimensions_that_the_kernel_lacks(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    model = tiny_model(**config)
    attention.install_segment_attention(model)
    said = attention.describe_attention(model, torch.device("cuda"), BF16)
    assert said == "PyTorch's (sdpa), one response at a time, because of its head dimension"
