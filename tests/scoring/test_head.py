"""The log-prob head: its gradients, its statistics and its memory, alone and in real models.

Where possible, tests are in float64, in which a correct formula agrees to about 1e-14 per rounding.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_prefopt.scoring import forward
from hf_prefopt.scoring import head as head_module
from hf_prefopt.scoring.forward import install_scoring, score
from hf_prefopt.scoring.fused_head import chunk_rows as rows_of_budget
from hf_prefopt.scoring.head import FusedHeadLogps, LogitTransform, linear_head_logps, module_head_logps
from tests.scoring.logps import token_logps
from tests.scoring.plain import assert_same_gradients, gradients, padded_batch, plain_response_logps
from tests.tiny_models import perturbed, tiny_model, with_lora

N, H, V = 5, 3, 7
TRANSFORMS = {
    "plain": LogitTransform(),
    "softcap": LogitTransform(softcap=1.5),
    "scale": LogitTransform(scale=0.3),
    "temperature": LogitTransform(temperature=0.6),
    "all": LogitTransform(scale=0.7, softcap=2.0, temperature=1.7),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
# One row per chunk, a size that does not divide N, all rows, and a larger size.
each_chunk = pytest.mark.parametrize("chunk_rows", [1, 2, N, 64])


def head_inputs(n=N, h=H, v=V, dtype=torch.float64):
    """Return (hidden, weight, bias, targets) with logits of a few units, so that
    caps have an effect and probabilities differ.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, h), (v, h), (v,))
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return *tensors, torch.randint(0, v, (n,), generator=generator)


def direct_logps(hidden, weight, bias, targets, transform):
    """Return (log-probs of the targets, all log-probs), computed directly."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logps = (logits / transform.temperature).log_softmax(-1)
    return logps[torch.arange(len(targets)), targets], logps


@each_chunk
@each_transform
@pytest.mark.parametrize("with_bias", [False, True])
def test_frozen_head_gradient_is_the_derivative(transform, chunk_rows, with_bias):
    """Float64 gradcheck of the log-probs with respect to hidden, with a frozen weight."""
    hidden, weight, bias, targets = head_inputs()
    bias = bias if with_bias else None

    def logps(hidden):
        return linear_head_logps(hidden, weight, bias, targets, transform, chunk_rows=chunk_rows)[0]

    assert torch.autograd.gradcheck(logps, hidden.requires_grad_())


@each_chunk
@each_transform
@pytest.mark.parametrize("with_bias", [False, True])
def test_trained_head_gradient_is_the_derivative(transform, chunk_rows, with_bias):
    """Float64 gradcheck with respect to hidden, weight and bias."""
    hidden, weight, bias, targets = head_inputs()
    trained = [t.requires_grad_() for t in ((hidden, weight, bias) if with_bias else (hidden, weight))]

    def logps(hidden, weight, bias=None):
        return linear_head_logps(hidden, weight, bias, targets, transform, chunk_rows=chunk_rows)[0]

    assert torch.autograd.gradcheck(logps, trained)


@each_chunk
@each_transform
def test_module_head_gradient_is_the_derivative(transform, chunk_rows):
    """Float64 gradcheck of a head that is not a single linear layer (a sum of two), including its parameters."""
    hidden, weight, bias, targets = head_inputs()

    def logps(hidden, weight, bias):
        def head(rows):
            return rows @ weight.T + (rows * 0.5) @ weight.T + bias

        return module_head_logps(head, hidden, targets, transform, chunk_rows=chunk_rows)[0]

    assert torch.autograd.gradcheck(logps, [t.requires_grad_() for t in (hidden, weight, bias)])


@each_chunk
@each_transform
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", ["linear", "module"])
def test_values_and_statistics_are_the_definitions(way, trained, transform, chunk_rows):
    """log p_y, −Σ p log p, the same divided by log V, and log Σ p² equal their
    definitions, with and without gradients.
    """
    hidden, weight, bias, targets = head_inputs()
    weight.requires_grad_(trained)
    settings = (targets, transform, ("entropy", "log_sum_sq_probs", "normalized_entropy"), chunk_rows)
    if way == "linear":
        run = partial(linear_head_logps, hidden.requires_grad_(), weight, bias, *settings)
    else:
        run = partial(module_head_logps, lambda rows: rows @ weight.T + bias, hidden.requires_grad_(), *settings)
    expected, logps = direct_logps(hidden, weight, bias, targets, transform)
    probs = logps.exp()
    entropy = -(probs * logps).sum(-1)
    definitions = (expected, entropy, probs.square().sum(-1).log(), entropy / math.log(V))
    for outputs in (run(), torch.no_grad()(run)()):
        for output, definition in zip(outputs, definitions, strict=True):
            torch.testing.assert_close(output, definition, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("chunk_rows", "least", "calls"), [(2, 0, 3), (2, 3, 3), (2, 5, 5), (9, 2, 2)])
def test_empty_chunks_make_up_the_number_that_is_asked_for(chunk_rows, least, calls):
    """N = 5: three chunks of two, or one of nine. The head is called as often as requested, also in the backward pass,
    and the log-probs and their gradient equal those of one chunk.
    """
    hidden, weight, bias, targets = head_inputs()
    hidden.requires_grad_()
    seen = []

    def head(rows):
        seen.append(len(rows))
        return rows @ weight.T + bias

    logps = module_head_logps(head, hidden, targets, chunk_rows=chunk_rows, least_chunks=least)[0]
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert len(seen) == 2 * calls and sum(seen) == 2 * N
    expected = direct_logps(hidden, weight, bias, targets, LogitTransform())[0]
    torch.testing.assert_close(logps, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), hidden)[0], rtol=1e-12, atol=1e-13)


@each_transform
def test_frozen_and_trained_ways_give_the_same_gradient(transform):
    """The gradient of a weighted sum with respect to hidden does not depend on whether the weight trains, too."""
    hidden, weight, bias, targets = head_inputs()
    incoming = torch.linspace(-1, 2, N, dtype=torch.float64)
    found = []
    for trained in (False, True):
        leaf = hidden.clone().requires_grad_()
        logps = linear_head_logps(leaf, weight.clone().requires_grad_(trained), bias, targets, transform, chunk_rows=2)
        found += torch.autograd.grad((logps[0] * incoming).sum(), leaf)
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_bf16_autocast_costs_no_more_than_full_logits_do(trained, with_bias):
    """With bf16 autocast, the error against float64 is at most that of full logits and autograd.

    Both round hidden, weight and logits to bf16, so the log-probs have errors of the same size. For the gradient, both
    round (onehot − p) and the product. The frozen head rounds once more, after scaling by the incoming gradient: with
    roundings of equal size, its error is at most √(3/2) = 1.22 times the plain error.
    """
    hidden, weight, bias, targets = head_inputs(n=200, h=64, v=500, dtype=torch.float32)
    incoming = torch.linspace(-1, 1, 200)

    def run(logps, dtype):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)
        values = logps(h, w, bias.to(dtype) if with_bias else None)
        wanted = [h, w] if trained else [h]
        return values.detach(), *torch.autograd.grad((values * incoming.to(values.dtype)).sum(), wanted)

    def plain(h, w, b):
        logits = nn.functional.linear(h, w, b)
        return token_logps(logits, targets)

    def chunked(h, w, b):
        return linear_head_logps(h, w, b, targets, chunk_rows=64)[0]

    truth = run(plain, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        by_plain = run(plain, torch.float32)
        by_head = run(chunked, torch.float32)
    for exact, full_logits, ours in zip(truth, by_plain, by_head, strict=True):
        error, theirs = ((found.double() - exact).norm().item() for found in (ours, full_logits))
        assert error <= 1.22 * theirs


@pytest.mark.parametrize("trained", [False, True])
def test_fp16_holds_a_flat_softmax_over_a_large_vocabulary(trained):
    """With V = 70,000 and logits near 0, Σ e^(z − max z) is about V, beyond fp16's 65,504.

    The gradient is about W[y] − mean W. W[y] is exact in fp16. The probabilities 1/V, which fp16 has in steps of 6e-8,
    are off by 0.2 % each, and not all in one direction. The result is rounded to 2⁻¹¹ of itself, once in the product
    and once for each factor: within 4 · 2⁻¹¹ of the norm.
    """
    hidden, weight, _, targets = head_inputs(n=3, h=4, v=70_000, dtype=torch.float32)
    hidden, weight = hidden.half(), (0.01 * weight).half()

    def gradients(dtype):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)
        logps = linear_head_logps(h, w, None, targets, chunk_rows=2)[0]
        return torch.autograd.grad(logps.sum(), [h, w] if trained else [h])

    for exact, found in zip(gradients(torch.float64), gradients(torch.float16), strict=True):
        assert (found.double() - exact).norm() <= 4 * 2**-11 * exact.norm()


class LargestTensor(TorchDispatchMode):
    """A mode that records the number of elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", ["linear", "module"])
def test_the_full_logits_are_never_held(way, trained):
    """N = 64 rows, V = 1000, H = 8, chunks of C = 4: no tensor in forward or backward has more than V·H = 8,000
    elements (the weight and its gradient; a chunk's logits have C·V = 4,000). The full logits would have 64,000.
    """
    hidden, weight, bias, targets = head_inputs(n=64, h=8, v=1000, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    with LargestTensor() as largest:
        if way == "linear":
            logps = linear_head_logps(hidden, weight, bias, targets, statistics=("entropy",), chunk_rows=4)[0]
        else:
            logps = module_head_logps(lambda rows: rows @ weight.T, hidden, targets, chunk_rows=4)[0]
        logps.sum().backward()
    assert largest.elements <= 8_000


def test_the_full_logits_are_never_held_in_a_model(monkeypatch):
    """Scoring with V = 4096 and chunks of 4 creates no tensor with more than V·H = 131,072 elements; the batch's logits
    at the scored positions would have N·V, more than 60 · 4096.
    """
    monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", 4)
    model, batch = tiny_model(vocab_size=4096), padded_batch()
    install_scoring(model)
    with LargestTensor() as largest:
        score(model, batch).logps.sum().backward()
    assert len(batch["targets"]) >= 60
    assert largest.elements <= 4096 * 32


def lora_on_the_head(model):
    return perturbed(with_lora(model, target_modules=["q_proj", "lm_head"]))


def trained_copy_of_the_head(model):
    return perturbed(with_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def tied_and_adapted(model):
    return perturbed(with_lora(model, target_modules=["q_proj", "v_proj"]))


HEADS = {
    "trained": ({"tie_word_embeddings": False}, lambda model: model),
    "tied": ({"tie_word_embeddings": True}, lambda model: model),
    "tied, frozen under LoRA": ({"tie_word_embeddings": True}, tied_and_adapted),
    "LoRA on lm_head": ({"tie_word_embeddings": False}, lora_on_the_head),
    "modules_to_save": ({"tie_word_embeddings": False}, trained_copy_of_the_head),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("config", "adapt"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("model_type", "own"), [("llama", {}), ("gemma2", {"final_logit_softcapping": 5.0})])
def test_every_kind_of_head_has_the_gradients_of_plain_logits(model_type, own, config, adapt, temperature, monkeypatch):
    """Every trained parameter of a float64 model gets the gradient of autograd through `model(...).logits`.

    The body computes the same numbers in both cases, so only float64 roundings of the head differ: about 100 of 1e-16
    in a sum of this size; the tolerance is 1e-12. Each response has a different weight, and chunks do not divide N.
    """
    monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", 7)
    model, batch = adapt(tiny_model(model_type, dtype=torch.float64, **own, **config)), padded_batch()
    weights = torch.linspace(-1, 1, len(batch["response_lengths"]), dtype=torch.float64)
    plain = plain_response_logps(model, batch, temperature)
    expected = gradients((plain * weights).sum(), model)
    install_scoring(model, temperature)
    logps = score(model, batch).logps
    torch.testing.assert_close(logps, plain, rtol=1e-13, atol=0)
    assert len(expected) >= 2
    assert_same_gradients(gradients((logps * weights).sum(), model), expected, rtol=1e-12)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(head_module, "_fuses", lambda hidden, transform: transform.softcap is None)


@each_chunk
@pytest.mark.parametrize("transform", ["plain", "scale", "temperature"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gpus_way_has_the_same_log_probs_and_gradients(transform, chunk_rows, with_bias, as_on_a_gpu, monkeypatch):
    """Gradcheck in float64 with a frozen head, and the method that is used with statistics and without a gradient."""
    transform = TRANSFORMS[transform]
    hidden, weight, bias, targets = head_inputs()
    bias = bias if with_bias else None
    settings = (transform, ("entropy",), chunk_rows)

    def found(hidden):
        return linear_head_logps(hidden, weight, bias, targets, *settings)

    assert torch.autograd.gradcheck(lambda h: found(h)[0], hidden.clone().requires_grad_())
    logps, all_logps = direct_logps(hidden, weight, bias, targets, transform)
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    for given in (hidden, hidden.clone().requires_grad_()):
        for one, other in zip(found(given), (logps, entropy), strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-13, atol=1e-13)
    with monkeypatch.context() as patched:
        patched.setattr(FusedHeadLogps, "forward", None)
        with pytest.raises(TypeError):
            found(hidden)


def test_the_gpus_way_in_bf16(as_on_a_gpu):
    """The tolerance is for float64 as the exact value, also for a token that is
    nearly certain: 1 − p is not rounded to 0.

    Each of 50 probabilities and the product are rounded to 8 bits, and so are
    logits, whose error changes p. log p is in fp32.
    """
    hidden, weight, _, targets = head_inputs(11, 16, 50, torch.bfloat16)
    hidden[0] = weight[targets[0]]
    given = hidden.clone().requires_grad_()
    linear_head_logps(given, weight, None, targets, chunk_rows=4)[0].sum().backward()
    exact = hidden.double().requires_grad_()
    logps = direct_logps(exact, weight.double(), None, targets, TRANSFORMS["plain"])[0]
    logps.sum().backward()
    eps, largest = torch.finfo(torch.bfloat16).eps, float((exact @ weight.double().T).detach().abs().max())
    spread = (1 - logps.detach().exp()).unsqueeze(1)  # a probability of another token than the target
    allowed = (eps * (2 * largest + 4) * spread + torch.finfo().eps * largest) * weight.abs().max().double()
    assert ((given.grad.double() - exact.grad).abs() <= allowed + eps * exact.grad.abs()).all()


def test_rows_of_a_budget():
    """12 bytes per logit: 512 MiB are 294 rows of Qwen3's vocabulary, and 170 of Gemma's; at least one row."""
    assert (rows_of_budget(151_936), rows_of_budget(262_144)) == (294, 170)
    assert rows_of_budget(151_936, budget=1) == 1


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("fuses", [False, True])
def test_second_derivatives_are_an_error(trains, fuses, monkeypatch):
    """The forward pass computes the gradient as a constant, so a second derivative would silently lack terms."""
    monkeypatch.setattr(head_module, "_fuses", lambda *_: fuses)
    hidden, weight, bias, targets = head_inputs()
    logps = linear_head_logps(hidden.requires_grad_(), weight.requires_grad_(trains), bias, targets)[0]
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
