"""accelerate's regional compilation: layers are compiled one by one, and the modules around them are copied."""

import pytest
import torch
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters

from hf_prefopt.scoring.forward import base_causal_lm
from hf_prefopt.scoring.switched import Switched, decoder_layers
from hf_prefopt.scoring.tail import body_of
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs, weights

pytestmark = pytest.mark.nightly

NAMES = ("loss", "grad_norm", "logps/chosen", "rewards/margins", "eval_loss", "eval_logps/chosen")


@pytest.fixture
def regional(monkeypatch):
    """Settings that compile layer by layer; this backend fuses no kernels, so the numbers are those of the model."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    torch._dynamo.reset()
    counters.clear()
    yield {"torch_compile": True, "torch_compile_backend": "eager"}
    torch._dynamo.reset()


def trainer_of(folder, layers=2, adapted=None, **settings):
    """Two steps of two micro-batches of different lengths, evaluated after each step."""
    lora = {} if adapted is None else {"layers_to_transform": adapted, "target_modules": ["q_proj", "down_proj"]}
    model = perturbed(with_lora(tiny_model(num_hidden_layers=layers), **lora), 0.1)
    data = {"train_dataset": pairs(8), "eval_dataset": pairs(5, seed=3), "reference": "adapter_off"}
    steps = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    return make_trainer(folder, model, **{**data, **steps, **settings})


def ran(folder, *model, **settings):
    trainer = trainer_of(folder, *model, **settings)
    trainer.train()
    return trainer


CASES = {
    "shared": {"layout": "shared"},
    "around": {"layout": "around"},
    "padded": {"layout": "padded"},
    "shared, checkpointed": {"layout": "shared", "gradient_checkpointing": True},
    "around, checkpointed": {"layout": "around", "gradient_checkpointing": True},
    "around, inputs collected": {"layout": "around", "loss_type": "aot"},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_run_with_evaluations_is_the_same(settings, tmp_path, regional):
    """Every logged figure of training and evaluation, and every weight at the end."""
    whole, layers = ran(tmp_path, **settings), ran(tmp_path, **settings, **regional)
    assert counters["stats"]["unique_graphs"] > 0
    for name in NAMES:
        assert logged(layers, name) == pytest.approx(logged(whole, name), rel=1e-5), name
        assert len(logged(layers, name)) == 2
    expected = weights(whole.model)
    for name, values in weights(layers.model).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_compiled_copies_have_the_layout(tmp_path, regional):
    """Packing is done by the classes of the outer modules, too, which are copied; the reference is compiled."""
    trainer = ran(tmp_path, layout="around", **regional)
    for model in (trainer.model_wrapped, trainer.reference.compiled):
        causal_lm = base_causal_lm(model)
        assert causal_lm is not base_causal_lm(trainer.model)
        assert isinstance(body_of(causal_lm), Switched)
        assert all(isinstance(layer, OptimizedModule) for layer in decoder_layers(causal_lm))
    assert not base_causal_lm(trainer.reference.compiled).training


def test_graphs_do_not_grow_with_the_layers(tmp_path, regional):
    """In the layout "around", all layers but the last, which unpacks the row, use the same graphs."""
    graphs = []
    for layers in (3, 5):
        torch._dynamo.reset()
        counters.clear()
        ran(tmp_path, layers, layout="around", eval_strategy="no", gradient_accumulation_steps=1, **regional)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]


def test_lower_layers_are_not_shared(tmp_path, regional):
    """Graphs of policy and reference round differently, and the summary says so."""
    trainer = trainer_of(tmp_path, adapted=[1], **regional)
    trainer.scorer.settle()
    assert trainer.reference.lower is None
    assert "runs twice" in (said := trainer.summary.as_dict()["reference"]) and "the model is compiled" in said
