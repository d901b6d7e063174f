"""Print counts of tiny steps as JSON, for `test_roofline.py`: PyTorch must not be imported before the fake device."""

from benchmarks.roofline.fake_device import fake_gpu, load_device

load_device()

import json  # noqa: E402
from collections import Counter  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402

from benchmarks.roofline.__main__ import main as roofline  # noqa: E402
from benchmarks.roofline.counting import Batch, Counting  # noqa: E402
from benchmarks.roofline.kernels import cuda_kernels  # noqa: E402
from benchmarks.roofline.models import build  # noqa: E402
from benchmarks.roofline.stepping import DTYPES, Case, Counts, counted_step  # noqa: E402
from benchmarks.sides import lora  # noqa: E402
from benchmarks.work import prepared  # noqa: E402
from hf_prefopt.batch import SegmentLengths  # noqa: E402
from hf_prefopt.scoring.attention import segment_attention  # noqa: E402

LAYERED = ("bf16", "fp32-autocast")
PHASES = ("policy", "reference", "backward", "loss", "optimizer")
# Two pairs of unequal lengths: segments of 12 + 5, 7, 9 + 4 and 6 tokens.
ROWS = [prepared([7] * 12, [[3] * 5, [4] * 7]), prepared([8] * 9, [[5] * 4, [6] * 6], 1)]


def summary(counts: Counts) -> dict[str, Any]:
    """Return the counts that the tests check."""
    operators = Counter((w.phase, w.operator) for w in counts.work)
    return {
        "launches": {phase: counts.total("launches", phase=phase) for phase in PHASES},
        "product flop": counts.total("flop", part="products"),
        "attention flop": counts.total("flop", part="attention"),
        "varlen": {phase: operators[phase, "_varlen_attn"] for phase in PHASES},
        "varlen backward": operators["backward", "_varlen_attn_backward"],
        "waits": counts.waits,
        "waits of a log": counts.waits_of_log,
        "kept": counts.kept,
        "positions": counts.positions,
        "layout": counts.layout,
    }


def step(side: str, layers: int, dtype: str = "bf16", checkpointing: bool = False) -> dict[str, Any]:
    """Count a step."""
    changes = {"num_hidden_layers": layers}
    return summary(counted_step(side, Case("tiny", "unequal", ROWS, "lora", dtype, checkpointing, changes=changes)))


def plain(layers: int, dtype: str) -> dict[str, int]:
    """Count the launches of the model itself on the padded rows: forward and
    backward with the adapter, forward without.
    """
    weights, autocast = DTYPES[dtype]
    counting = Counting(set(), None)
    with fake_gpu(), cuda_kernels(counting), counting, torch.device("cuda"):
        model = get_peft_model(build("tiny", weights, num_hidden_layers=layers), lora()).train()
        ids = torch.ones(4, 19, dtype=torch.long)
        counting.begin(Batch())
        with torch.autocast("cuda", torch.bfloat16 if autocast == "bf16" else torch.float16):
            with counting.during("policy"):
                loss = model(ids, use_cache=False).logits.sum()
            with counting.during("reference"), torch.no_grad(), model.disable_adapter():
                model(ids, use_cache=False)
        with counting.during("backward"):
            loss.backward()
    return {phase: sum(w.launches for w in counting.work if w.phase == phase) for phase in PHASES[:3]}


def by_hand() -> dict[str, Any]:
    """Run the counter on operators with known counts."""
    counting = Counting(set(), None)
    with fake_gpu(), counting:
        first, second = (torch.ones(64, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        bias = torch.ones(64, device="cuda", dtype=torch.bfloat16)
        counting.begin(Batch(scored=0.25))
        before = counting.memory
        product = first @ second.t()
        kept = product.view(-1)[:10]
        total = product.float().sum()
        expanded = bias[:, None].expand(64, 64) + product
        in_use = counting.memory - before
        del product, kept, expanded
        after = counting.memory - before
        work = [(w.operator, w.launches, w.flop, w.bytes) for w in counting.work]
        for wait in (
            lambda: total.item(),
            lambda: bool(total > 0),
            lambda: total.cpu(),
            lambda: bias.nonzero(),
            lambda: bias[bias > 0],
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: torch.zeros(2).to("cuda"),
            lambda: torch.zeros(2).to("cuda", non_blocking=True),
            lambda: torch.full((), 3, device="cuda"),
        ):
            wait()
        waits = {kind: sum(n for site, n in counting.waits.items() if site.startswith(kind)) for kind in KINDS}
        selected = bias[bias > 0].shape[0]
        weight = torch.ones(8, 8, device="cuda", requires_grad=True)
        with counting.watching_saved():
            keeps = (bias[:8].float() @ weight).sum()
        del keeps
    names = {"work": work, "in use": in_use, "after": after, "waits": waits, "selected": selected}
    return names | {"kept": dict(counting.kept)}


KINDS = ("read", "copy", "nonzero", "mask as index")


def attention_path(query: str, value: str, autocast: str | None, width: int) -> bool:
    """Return whether attention over segments uses the variable-length kernel."""
    counting = Counting(set(), None)
    with fake_gpu(), cuda_kernels(counting), counting, torch.device("cuda"):
        q, k = (torch.ones(1, heads, 7, width, dtype=getattr(torch, query)) for heads in (4, 2))
        v = torch.ones(1, 2, 7, width, dtype=getattr(torch, value))
        bounds = torch.tensor([0, 4, 7], dtype=torch.int32)
        lengths = SegmentLengths((4, 3), (4, 3))
        dtype = getattr(torch, autocast or "bfloat16")
        try:
            with torch.autocast("cuda", dtype, enabled=autocast is not None):
                segment_attention(
                    q,
                    k,
                    v,
                    segment_queries=bounds,
                    segment_keys=bounds,
                    segment_key_index=torch.arange(7),
                    segment_longest=(4, 4),
                    segment_lengths=lengths,
                )
        except NotImplementedError:  # `cuda_attention` has no kernel for it, so another path was used
            return False
    return any(w.operator == "_varlen_attn" for w in counting.work)


# (dtypes of query and key, of the value, of autocast; head width): weights and activations of each way to load a model.
PATHS = {
    "bf16": ("bfloat16", "bfloat16", None, 64),
    "fp16": ("float16", "float16", None, 64),
    "bf16 under autocast": ("bfloat16", "bfloat16", "bfloat16", 64),
    "fp32 under autocast": ("float32", "bfloat16", "bfloat16", 64),
    "fp32 under fp16 autocast": ("float32", "float16", "float16", 64),
    "4-bit, norms in fp32": ("float32", "bfloat16", None, 64),
    "4-bit under autocast": ("float32", "bfloat16", "bfloat16", 64),
    "head of 256": ("bfloat16", "bfloat16", None, 256),
    "fp32": ("float32", "float32", None, 64),
}


def main() -> None:
    """Print everything."""
    found = {
        "by hand": by_hand(),
        "paths": {name: attention_path(*path) for name, path in PATHS.items()},
        "ours": {dtype: [step("ours", layers, dtype) for layers in (1, 2)] for dtype in LAYERED},
        "fp16": step("ours", 1, "fp16-autocast"),
        "plain": {dtype: [plain(layers, dtype) for layers in (1, 2)] for dtype in LAYERED},
        "checkpointed": step("ours", 1, checkpointing=True),
        "command": roofline(["--tiny", "--pairs", "2"]),
    }
    print("COUNTS " + json.dumps(found))


if __name__ == "__main__":
    main()
