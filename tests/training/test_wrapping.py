"""The settings that are chosen before accelerate prepares the model."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from hf_prefopt.scoring.forward import install_scoring
from hf_prefopt.training.wrapping import settle_unused_parameters, uses_every_parameter
from tests.tiny_models import tiny_model, with_lora


class Experts(nn.Module):
    """A layer in which each token uses one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, hidden):
        chosen = hidden.sum(-1, keepdim=True) > 0
        ways = zip(self.experts, (chosen, ~chosen), strict=True)
        parts = [expert(hidden[mine[..., 0]]) for expert, mine in ways if mine.any()]
        return hidden + sum(part.sum(0) for part in parts)


def frozen(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(mark in name for mark in names))
    return model


def with_experts(model):
    model.model.layers[0].mlp = Experts()
    return model


def with_a_layer_that_nothing_calls(model):
    model.spare = nn.Linear(4, 4)
    return model


MODELS = {
    "all trains": (tiny_model, True),
    "tied": (lambda: tiny_model(tie_word_embeddings=True), True),
    "frozen layers": (lambda: frozen(tiny_model(), ["embed", "layers.0"]), True),
    "LoRA": (lambda: with_lora(tiny_model()), True),
    "LoRA on the last layer": (
        lambda: with_lora(tiny_model(), layers_to_transform=[1], target_modules=["q_proj"]),
        True,
    ),
    "modules to save": (lambda: with_lora(tiny_model(), modules_to_save=["lm_head"]), True),
    "experts in one parameter": (lambda: tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=1), True),
    "experts apart": (lambda: with_experts(tiny_model()), False),
    "experts apart, frozen": (lambda: frozen(with_experts(tiny_model()), ["experts"]), True),
    "a spare layer": (lambda: with_a_layer_that_nothing_calls(tiny_model()), False),
    "layers that are left out at random": (
        lambda: tiny_model("opt", layerdrop=0.5, word_embed_proj_dim=32, ffn_dim=64),
        False,
    ),
}


@pytest.mark.parametrize(("make", "expected"), MODELS.values(), ids=MODELS)
def test_whether_every_parameter_gets_a_gradient(make, expected):
    """If the result is True, the backward pass of a few tokens gives a gradient to all parameters."""
    model = make()
    install_scoring(model)
    assert uses_every_parameter(model) == expected
    if expected:
        model(input_ids=torch.arange(5, 8)[None]).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("engine", "setting", "looks"),
    [
        (DistributedType.MULTI_CPU, None, False),
        (DistributedType.MULTI_GPU, None, False),
        (DistributedType.MULTI_GPU, True, True),
        (DistributedType.FSDP, None, True),
    ],
)
def test_ddp_looks_for_unused_parameters_where_there_may_be_some(engine, setting, looks):
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = SimpleNamespace(distributed_type=engine, ddp_handler=handler, autocast=lambda: torch.autocast("cpu"))
    settle_unused_parameters(accelerator, setting, tiny_model())
    assert handler.find_unused_parameters == looks
    if setting is None and not looks:
        settle_unused_parameters(accelerator, setting, with_a_layer_that_nothing_calls(tiny_model()))
        assert handler.find_unused_parameters
