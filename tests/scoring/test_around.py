"""The layout "around": token mixers compute padded sequences, and all other modules compute each prompt once.

The models are in float64, because gated delta nets in fp32 differ by 1e-4 from themselves with other padding. Some
operations of these models (norms, rotary embeddings, softmax, time steps) still compute in fp32, with a rounding error
of 2⁻²⁴ each. About thirty roundings in a row on log-probs of size 10 are below 2e-5. Gradients, compared in norm, have
the same relative error of 30 · 2⁻²⁴ = 2e-6 per token, with random signs over tokens and layers: 1e-5.
"""

import copy
import io

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_prefopt.data.layouts import AroundCollator, PaddedCollator
from hf_prefopt.scoring import around
from hf_prefopt.scoring.around import Rows
from hf_prefopt.scoring.forward import base_causal_lm, install_scoring, score
from hf_prefopt.scoring.layout import reason_against, settled_layout
from hf_prefopt.scoring.switched import STATE, restore
from tests.scoring.architectures import AROUND, adapted, architecture
from tests.scoring.plain import assert_same_gradients, gradients
from tests.tiny_models import perturbed, random_rows

LOGPS, GRADIENTS = 2e-5, 1e-5
COLLATE = AroundCollator(PaddedCollator(0))


def in_float64(model):
    """Return the model in float64, with its experts computed one by one, because the fused product has no float64."""
    base_causal_lm(model).set_experts_implementation("eager")
    return model.double()


def rows_of_three_kinds():
    """Return pairs, a list of three responses, and a single response."""
    rows = random_rows(3)
    rows[0]["response_ids"].append([5, 6, 7, 8])
    rows[1]["response_ids"] = rows[1]["response_ids"][:1]
    for row in rows:
        row["scored_masks"] = [[1] * len(response) for response in row["response_ids"]]
        row["pairs"] = [[0, i] for i in range(1, len(row["response_ids"]))]
    return rows


def plain_logps(model, rows):
    """Return the log-prob of each response token from the model's own forward of one sequence without padding."""
    logps = []
    for prompt, ids in ((row["prompt_ids"], ids) for row in rows for ids in row["response_ids"]):
        rows_of_logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        logps.append(rows_of_logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.cat(logps)


def weighted(logps):
    weights = torch.randn(logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (logps * weights).sum()


def assert_close(model, logps, expected, expected_gradients):
    """Compare the log-probs, and all gradients of a random weighting of them."""
    torch.testing.assert_close(logps.double(), expected.double(), rtol=0, atol=LOGPS)
    model.zero_grad()
    weighted(logps).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected_gradients.keys()
    # Some gradients are only rounding (a bias of keys cancels in the softmax): eps of the whole gradient is allowed.
    floor = 1.2e-7 * torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        assert (found[name] - gradient).norm() <= GRADIENTS * gradient.norm() + floor, name


SOME_ADAPTED = ("qwen3_5_text", "lfm2", "nemotron_h", "bloom", "llama")
CASES = [
    *(pytest.param(name, False, id=f"{name}-full") for name in [*AROUND, "llama", "gpt_oss", "gemma2"]),
    *(
        pytest.param(name, True, id=f"{name}-lora", marks=() if name in SOME_ADAPTED else pytest.mark.nightly)
        for name in [*AROUND, "llama"]
    ),
]


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_equals_the_plain_logits_of_each_sequence_alone(name, lora):
    """Log-probs and all gradients are compared, in evaluation mode, and in training
    mode with both kinds of checkpointing.
    """
    model = in_float64(perturbed(adapted(name)) if lora else architecture(name))
    rows = rows_of_three_kinds()
    expected = plain_logps(model, rows)
    expected_gradients = gradients(weighted(expected), model)
    install_scoring(model)
    assert reason_against("around", model) is None
    batch = COLLATE(rows)
    assert_close(model, score(model, batch).token_logps, expected, expected_gradients)
    model.train()
    for reentrant in (False, True):
        base_causal_lm(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
        base_causal_lm(model).enable_input_require_grads()
        assert_close(model, score(model, batch).token_logps, expected, expected_gradients)


@pytest.mark.parametrize("name", AROUND)
def test_auto_takes_it_with_the_reason_against_shared(name):
    model = architecture(name)
    install_scoring(model)
    layout = settled_layout("auto", [model])
    assert layout.name == "around" and f"not shared because {reason_against('shared', model).words}" in layout.why
    assert AROUND[name][1] in layout.why


@pytest.mark.parametrize("name", ["lfm2", "llama"])
def test_layers_that_pytorch_checkpoints(name):
    """The layers are wrapped one by one, as FSDP2's activation checkpointing does."""
    model, batch = in_float64(architecture(name)), COLLATE(rows_of_three_kinds())
    install_scoring(model)
    logps = score(model, PaddedCollator(0)(rows_of_three_kinds())).token_logps
    expected = gradients(weighted(logps), model)
    layers = model.get_decoder().layers
    for place, layer in enumerate(layers):
        layers[place] = checkpoint_wrapper(layer)
    assert reason_against("around", model) is None
    found = gradients(weighted(score(model, batch).token_logps), model)
    found = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}
    assert_same_gradients(found, expected, GRADIENTS)


def test_only_mixers_see_padding():
    """Norms, MLPs and projections compute the row; only the recurrence and the attention get whole sequences."""
    model = architecture("qwen3_5_text")
    install_scoring(model)
    assert reason_against("around", model) is None
    batch = COLLATE(rows_of_three_kinds())
    row, padded = (1, len(batch["around_places"])), batch["around_tokens"].shape
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: shapes.update({name: (*args, *kwargs.values())[0].shape[:2]}),
            with_kwargs=True,
        )
    with torch.no_grad():
        score(model, batch)
    inside = {name: shape for name, shape in shapes.items() if ".layers." in name}
    assert {shape for name, shape in inside.items() if ".mlp." in name or "layernorm" in name} == {row}
    assert {shape for name, shape in inside.items() if name.endswith("_proj")} == {row}
    assert {shape for name, shape in inside.items() if name.endswith(("self_attn", "linear_attn"))} == {padded}
    assert row[1] < padded[0] * padded[1]


def test_a_batch_without_anything_to_share_is_the_padded_one(monkeypatch):
    """With one response, no index is used."""
    model = architecture("bloom")
    install_scoring(model)
    assert reason_against("around", model) is None
    monkeypatch.setattr(around, "Rows", None)
    rows = rows_of_three_kinds()[1:2]
    with torch.no_grad():
        expected = score(model, PaddedCollator(0)(rows)).token_logps
        torch.testing.assert_close(score(model, COLLATE(rows)).token_logps, expected, rtol=0, atol=LOGPS)


class TestTheModelItself:
    @pytest.fixture(params=["qwen3_5_text", "bloom"])
    def model(self, request):
        model = architecture(request.param)
        install_scoring(model)
        self.before = {name: type(module) for name, module in model.named_modules()}
        self.keys = list(model.state_dict())
        self.logits = model(torch.arange(5, 25)[None]).logits
        assert reason_against("around", model) is None
        return model

    def test_keeps_its_names_and_answers(self, model):
        assert {name: type(module).__name__ for name, module in model.named_modules()} == {
            name: cls.__name__ for name, cls in self.before.items()
        }
        assert list(model.state_dict()) == self.keys
        assert torch.equal(model(torch.arange(5, 25)[None]).logits, self.logits)

    def test_copied_and_pickled_it_is_the_plain_one(self, model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert {name: type(module) for name, module in other.named_modules()} == self.before
            assert not any(STATE in vars(module) for module in other.modules())
            assert torch.equal(other(torch.arange(5, 25)[None]).logits, self.logits)
        assert (
            type(model.get_decoder())
            is not self.before[next(n for n, m in model.named_modules() if m is model.get_decoder())]
        )

    def test_is_given_back(self, model):
        restore(model)
        assert {name: type(module) for name, module in model.named_modules()} == self.before
        assert not any(STATE in vars(module) for module in model.modules())

    def test_generates_as_before(self, model):
        ids = torch.arange(5, 11)[None]
        found = model.generate(ids, max_new_tokens=5, do_sample=False)
        restore(model)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), found)


class TestTheProbe:
    @pytest.fixture
    def model(self):
        model = architecture("qwen3_5_text")
        install_scoring(model)
        return model

    def test_notices_tokens_of_another_response(self, model, monkeypatch):
        """The row gives each token of a response the state of the next token."""
        right = Rows.collapsed
        monkeypatch.setattr(Rows, "collapsed", lambda self, padded: right(self, padded.roll(1, 0)))
        assert reason_against("around", model) is not None

    def test_notices_a_mixer_that_is_not_known_as_one(self, monkeypatch):
        """A convolution over the row as a single sequence mixes responses."""
        model = architecture("lfm2")
        install_scoring(model)
        mixers = around.mixers_of
        monkeypatch.setattr(
            around, "mixers_of", lambda layer: [m for m in mixers(layer) if m is not getattr(layer, "conv", 0)]
        )
        assert "depends on another response" in reason_against("around", model).words

    def test_layers_skipped_at_random(self):
        model = architecture("opt")
        model.config.layerdrop = 0.1
        install_scoring(model)
        assert "layerdrop" in reason_against("around", model).words


def test_under_autocast_it_is_as_far_from_fp32_as_padded():
    """The bf16 error of the summed log-probs against fp32, as a mean over responses,
    is within 1.2 times that of padded.
    """
    model, rows = architecture("lfm2"), random_rows(12)
    install_scoring(model)
    with torch.no_grad():
        truth = score(model, PaddedCollator(0)(rows)).logps
        with torch.autocast("cpu", dtype=torch.bfloat16):
            padded = score(model, PaddedCollator(0)(rows)).logps
            assert reason_against("around", model, torch.bfloat16) is None
            found = score(model, COLLATE(rows)).logps
    assert (found - truth).abs().mean() <= 1.2 * (padded - truth).abs().mean()


def test_weights_that_hooks_bring():
    """accelerate's hooks call the forward that they have replaced."""
    from accelerate import cpu_offload

    model, rows = architecture("lfm2"), random_rows(3)
    install_scoring(model)
    with torch.no_grad():
        expected = score(model, PaddedCollator(0)(rows)).token_logps
        offloaded = cpu_offload(architecture("lfm2"), execution_device=torch.device("cpu"))
        install_scoring(offloaded)
        assert reason_against("around", offloaded) is None
        torch.testing.assert_close(score(offloaded, COLLATE(rows)).token_logps, expected, rtol=0, atol=LOGPS)


@pytest.mark.nightly
def test_compiled():
    """With graphs that are compiled for each length, or without graphs, the results are equal."""
    model, batch = architecture("bloom"), COLLATE(random_rows(3))
    install_scoring(model)
    assert reason_against("around", model) is None
    with torch.no_grad():
        expected = score(model, batch).token_logps
        torch._dynamo.reset()
        found = score(torch.compile(model, backend="eager"), batch).token_logps
        torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGPS)
