"""Take two steps of the trainer with every loss: fp32 on a device must equal the CPU, and bf16 must be finite."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

# The rounding error after two steps of AdamW, which keeps only the sign of gradients that are nearly zero.
TOLERANCE = 1e-3


def every_loss(device: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the result of the check of each registered loss."""
    from hf_prefopt.losses import list_losses

    for name in names or list_losses():
        try:
            yield name, _check(name, device)
        except Exception as error:
            yield name, {"ok": False, "error": f"{type(error).__name__}: {error}"[:200]}


def _check(name: str, device: str) -> dict[str, Any]:
    expected, found = (_two_steps(name, use_cpu=on_cpu) for on_cpu in (True, device == "cpu"))
    apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True))
    check = {"fp32 apart": apart, "ok": apart < TOLERANCE}
    if device == "cuda":
        half = _two_steps(name, use_cpu=False, bf16=True)
        check["bf16 apart"] = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(half, expected, strict=True))
        check["ok"] &= all(map(math.isfinite, half))
    return check


def _two_steps(name: str, **settings: Any) -> list[float]:
    """Return the losses and gradient norms of two steps of a tiny Llama with a LoRA adapter."""
    from tests.tiny_models import tiny_model, with_lora
    from tests.trainers import logged, make_trainer

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        trainer = make_trainer(folder, with_lora(tiny_model()), loss_type=name, max_steps=2, **settings)
        trainer.train()
    return logged(trainer, "loss") + logged(trainer, "grad_norm")
