"""Correctness checks on a GPU, which run before timing: the kernel's mask, and both layouts against fp32.

Every check returns numbers and a verdict, and a failure does not stop the others. On a CPU, the same checks use the
CPU's implementations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.work import synthetic
from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.losses.dpo import dpo_loss
from hf_prefopt.scoring import attention
from hf_prefopt.scoring.attention import install_segment_attention, segment_attention
from hf_prefopt.scoring.forward import base_causal_lm, install_scoring, score
from hf_prefopt.scoring.layout import Reason, reason_against

Check = dict[str, Any]


def moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the batch on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def attention_by_mask(query: Tensor, key: Tensor, value: Tensor, batch: dict[str, Any], window: int | None) -> Tensor:
    """Compute attention over segments in float64, as a reference, with an explicit mask per key: `[1, T, heads, D]`."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(groups, 1),
        value.double().repeat_interleave(groups, 1),
    )
    queries, keys = batch["segment_queries"].tolist(), batch["segment_keys"].tolist()
    allowed = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool)
    position = batch["position_ids"][0].cpu()
    index = batch["segment_key_index"].cpu()
    for segment in range(len(queries) - 1):
        visible = index[keys[segment] : keys[segment + 1]]
        for row in range(queries[segment], queries[segment + 1]):
            back = position[row] - position[visible]
            allowed[row, visible[(back >= 0) & ((back < window) if window else True)]] = True
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def kernel(device: str, dtype: torch.dtype) -> dict[str, Check]:
    """Compare attention over segments with the explicit mask, for few queries, grouped heads, and sliding windows."""
    checks = {}
    rows = [row for batch in (synthetic(500, 2, 37, 19, 3)[0], synthetic(500, 1, 5, 40, 2)[0]) for row in batch]
    batch = moved(SharedCollator()(rows), device)
    length = batch["input_ids"].shape[1]
    segments = {name: value for name, value in batch.items() if name.startswith("segment_")}
    for heads, key_heads, window, size in ((4, 4, None, 64), (8, 2, None, 64), (8, 2, 16, 64), (4, 1, 48, 128)):
        torch.manual_seed(0)
        tensors = [
            torch.randn(1, n, length, size, device=device, dtype=dtype, requires_grad=True)
            for n in (heads, key_heads, key_heads)
        ]
        name = f"{heads} heads on {key_heads}, window {window}, width {size}, {str(dtype).removeprefix('torch.')}"
        checks[name] = _attempt(lambda t=tensors, w=window: _compare_attention(t, batch, segments, w))
    return checks


def _compare_attention(tensors: Sequence[Tensor], batch: dict, segments: dict, window: int | None) -> Check:
    out = segment_attention(*tensors, **segments, sliding_window=window)
    expected = attention_by_mask(*tensors, batch, window)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((out.double() * weight).sum(), tensors)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    apart = max(_relative(g, w) for g, w in zip(gradients, wanted, strict=True))
    figures = {"output": _relative(out, expected), "gradients": apart}
    return figures | {"ok": max(figures.values()) < 20 * torch.finfo(tensors[0].dtype).eps}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float(
        (found.detach().double() - expected.detach().double()).norm()
        / expected.detach().double().norm().clamp(min=1e-30)
    )


def _attempt(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    # Older versions of transformers use PyTorch's own attention for it, which ignores the soft-cap.
    "gemma2": {"sliding_window": 24, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": 24},
    "phi3": {},
    "olmo2": {},
}


def small_model(model_type: str, device: str, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """Return a random model of an architecture, with heads wide enough for every kernel and a nonzero LoRA adapter."""
    sizes = {
        "vocab_size": 500,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **changes})).float()
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model = model.to(device=device, dtype=dtype)
    install_scoring(model)
    install_segment_attention(base_causal_lm(model))
    return model


def dpo_step(model: nn.Module, batch: dict[str, Any], backward: bool = True) -> Tensor:
    """Compute the DPO loss of a batch and run its backward pass. The reference is the model without its adapter."""
    policy = score(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference = score(model, batch)
    sides = (batch["chosen"], batch["rejected"])
    logps = [scores.logps[side] for scores in (policy, reference) for side in sides]
    loss = dpo_loss(*logps, beta=0.1).losses.mean()
    if backward:
        loss.backward()
    return loss


def default_configuration(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Check]:
    """Check that fp32 weights under autocast, as in the recipes, always use the variable-length kernel.

    The log-probs are compared with the padded layout in fp32; the tolerance is the error of the padded layout itself
    under autocast.
    """
    return {
        model_type: _attempt(lambda t=model_type, c=changes: _default_configuration(t, device, dtype, c))
        for model_type, changes in ARCHITECTURES.items()
    }


def _default_configuration(model_type: str, device: str, dtype: torch.dtype, changes: dict[str, Any]) -> Check:
    rows = synthetic(500, 3, 41, 23, 2)[0]
    padded, shared = (moved(collate(rows), device) for collate in (PaddedCollator(0), SharedCollator()))
    model = small_model(model_type, device, torch.float32, **changes)
    expected = _logps_and_gradients(model, padded)
    figures: Check = {}
    for layout, batch in (("padded", padded), ("shared", shared)):
        model.zero_grad()
        with torch.autocast(device, dtype=dtype), counted_varlen_calls() as calls:
            found = _logps_and_gradients(model, batch)
        figures[f"{layout} log-probs"], figures[f"{layout} gradients"] = map(_relative, found, expected)
    layers, forwards = model.config.num_hidden_layers, 3  # one call each for scoring, the policy, and the reference
    figures["varlen calls"] = f"{len(calls)} of {layers * forwards}"
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    on_kernel = len(calls) == (0 if capped or device == "cpu" else layers * forwards)
    figures["ok"] = on_kernel and all(
        figures[f"shared {what}"] <= 1.2 * figures[f"padded {what}"] for what in ("log-probs", "gradients")
    )
    return figures


@contextmanager
def counted_varlen_calls() -> Iterator[list[torch.dtype]]:
    """Record the dtype of each call of the variable-length kernel inside the context."""
    kernel_call, calls = attention._varlen, []

    def counted(query: Tensor, *args: Any) -> Tensor:
        calls.append(query.dtype)
        return kernel_call(query, *args)

    attention._varlen = counted
    try:
        yield calls
    finally:
        attention._varlen = kernel_call


def layouts(model_type: str, device: str, dtype: torch.dtype, changes: dict[str, Any]) -> Check:
    """Compare log-probs and gradients of both layouts in `dtype` with those of "padded" in fp32."""
    rows = synthetic(500, 3, 41, 23, 2)[0] + synthetic(500, 1, 30, 12, 4)[0]
    batches = {"padded": PaddedCollator(0)(rows), "shared": SharedCollator()(rows)}
    model = small_model(model_type, device, torch.float32, **changes)
    expected = _logps_and_gradients(model, moved(batches["padded"], device))
    del model
    figures: Check = {}
    for layout, batch in batches.items():
        model = small_model(model_type, device, dtype, **changes)
        found = _logps_and_gradients(model, moved(batch, device))
        figures[f"{layout} log-probs"], figures[f"{layout} gradients"] = map(_relative, found, expected)
    slack = 1e-4 if dtype == torch.float32 else 0.0
    figures["ok"] = all(
        figures[f"shared {what}"] <= max(1.2 * figures[f"padded {what}"], slack) for what in ("log-probs", "gradients")
    )
    return figures


def _logps_and_gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    logps = score(model, batch).logps.detach().float()
    dpo_step(model, batch)
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return logps, torch.cat(gradients)


def probes(device: str, dtype: torch.dtype) -> dict[str, Check]:
    """Compare the layout that the probe chooses for each architecture with the expected one."""
    decisions = {}
    for model_type, changes in ARCHITECTURES.items():
        decisions[model_type] = _attempt(
            lambda t=model_type, c=changes: _decision(reason_against("shared", small_model(t, device, dtype, **c)))
        )
    return decisions


def _decision(reason: Reason | None) -> Check:
    return {"ok": True, "layout": "shared" if reason is None else f"padded: {reason.words}"}


def all_checks(
    device: str, dtypes: Sequence[torch.dtype], show: Callable[[dict[str, dict[str, Check]]], None]
) -> dict[str, dict[str, Check]]:
    """Run all checks, keyed by group and name; `show` gets the results so far after each part."""
    results = {"fp32 weights under bf16 autocast": default_configuration(device)}
    show(results)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        results[f"kernel, {name}"] = kernel(device, dtype)
        results[f"layouts against fp32, {name}"] = {
            model_type: _attempt(lambda t=model_type, c=changes, d=dtype: layouts(t, device, d, c))
            for model_type, changes in ARCHITECTURES.items()
        }
        results[f"probe, {name}"] = probes(device, dtype)
        show(results)
    return results
