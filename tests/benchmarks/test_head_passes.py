"""The head with fewer passes gives the log-probs and gradients of the plain formula."""

import pytest
import torch

from benchmarks.head_passes import FewerPasses, rows_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [4, 11])
def test_log_probs_and_gradients(dtype, chunk_rows):
    """Against float64; 4 rows leave a last chunk of 3.

    Logits sum 16 products and are rounded to the dtype where the CPU has no wider product; probabilities are too.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (11, 50))
    targets = torch.randint(50, (11,), generator=generator)
    incoming = torch.randn(11, generator=generator)
    found = hidden.clone().requires_grad_()
    logps = FewerPasses.apply(found, weight, targets, chunk_rows)
    (logps * incoming).sum().backward()

    exact = hidden.double().requires_grad_()
    logits = exact @ weight.double().T
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (expected * incoming).sum().backward()
    eps = torch.finfo(dtype).eps
    # An error of a logit moves its own log-prob and the sum's.
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=float(2 * eps * logits.detach().abs().max()))
    # Each of 50 probabilities is off by that and its own rounding, relatively; then the gradient is rounded.
    size = float((incoming.abs().max() * weight.abs().max()).double())
    torch.testing.assert_close(
        found.grad.double(), exact.grad, rtol=0, atol=size * eps * float(2 * logits.detach().abs().max() + 4)
    )


def test_rows_of_a_budget():
    """10 bytes a logit: 512 MiB are 353 rows of Qwen3's vocabulary, and 204 of Gemma's; never none."""
    assert (rows_of(512 << 20, 151_936), rows_of(512 << 20, 262_144)) == (353, 204)
    assert rows_of(1, 151_936) == 1
