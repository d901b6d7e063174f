"""A simple implementation of log-probs, with which scoring is compared: all logits at once, and autograd."""

import torch
from torch import Tensor, nn

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.layouts import PaddedCollator
from tests.scoring.logps import sequence_logps
from tests.tiny_models import random_rows


def padded_batch(count: int = 3, seed: int = 0, **settings) -> PreferenceBatch:
    """Return random pairs in the padded layout."""
    return PaddedCollator(pad_token_id=0, **settings)(random_rows(count, seed))


def scored_mask(batch: PreferenceBatch) -> Tensor:
    """Return a mask `[R, T]`, 1 for scored tokens. A token is one position after the row that predicts it."""
    mask = torch.zeros(batch["input_ids"].numel(), dtype=torch.long)
    mask[batch["scored_rows"] + 1] = 1
    return mask.view_as(batch["input_ids"])


def plain_response_logps(model: nn.Module, batch: PreferenceBatch, temperature: float = 1.0) -> Tensor:
    """Return the summed log-prob of each response, `[R]`, from `model(...).logits`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return sequence_logps(logits, batch["input_ids"], scored_mask(batch), temperature=temperature)


def gradients(value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of a scalar, keyed by the name of each trained parameter that it depends on."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> float:
    """Check that every gradient agrees to `rtol` of its largest entry; return the largest relative difference."""
    assert actual.keys() == expected.keys()
    worst = 0.0
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)
        ratio = ((actual[name] - gradient).abs().max() / scale).item()
        assert ratio <= rtol, f"{name}: off by {ratio:.2e} of its largest entry"
        worst = max(worst, ratio)
    return worst
