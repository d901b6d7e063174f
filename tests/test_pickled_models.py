"""`torch.save(trainer.model)` saves a plain model, which loads without this package
and can be trained again with it.
"""

import math
import subprocess
import sys

import pytest
import torch

from tests.scoring.test_dropout import FAMILIES
from tests.tiny_models import tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

MODELS = {
    "all weights": tiny_model,
    "an adapter": lambda: with_lora(tiny_model()),
    "an adapted head": lambda: with_lora(tiny_model(), target_modules=["q_proj", "lm_head"]),
    "a capped model": lambda: tiny_model("gemma2", query_pre_attn_scalar=8, attn_implementation="eager"),
    "a model with dropout": lambda: tiny_model("gpt2", **FAMILIES["gpt2"]),
    "rates in the config": lambda: tiny_model("persimmon", **FAMILIES["persimmon"]),
}
ALONE = """
import sys, torch
sys.modules["hf_prefopt"] = None  # as if it were not installed
model = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.arange(5, 25)[None]).logits, sys.argv[2])
"""


IN_SUITE = ("rates in the config",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in IN_SUITE else pytest.mark.nightly) for n in MODELS])
def test_a_saved_model_loads_without_us(name, tmp_path):
    trainer = make_trainer(tmp_path, MODELS[name](), max_steps=1, train_dataset=pairs(4))
    trainer.train()
    torch.save(trainer.model, tmp_path / "model.pt")
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=torch.arange(5, 25)[None]).logits
    command = [sys.executable, "-c", ALONE, str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    resumed = make_trainer(tmp_path / "again", again, max_steps=1, train_dataset=pairs(4))
    resumed.train()
    assert resumed.layout == trainer.layout
    assert logged(resumed, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
