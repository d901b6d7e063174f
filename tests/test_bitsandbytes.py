"""bitsandbytes as people use it: optimizers of 8 bits and paged ones, and weights of 4 bits in every variant."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_prefopt.scoring.forward import install_scoring
from hf_prefopt.scoring.layout import reason_against
from tests.tiny_models import QUANTIZABLE, tiny_model
from tests.trainers import logged, make_trainer, pairs, weights

pytest.importorskip("bitsandbytes")
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_a_run_with_an_optimizer_of_theirs_is_resumed_bit_for_bit(optim, tmp_path):
    """The state of the optimizer, in blocks of 8 bits, comes back from a checkpoint. It has moved the weights, too."""

    def run(folder, **resumed):
        trainer = make_trainer(folder, tiny_model(**QUANTIZABLE), optim=optim, train_dataset=pairs(8), **RUN)
        before = weights(trainer.model)
        trainer.train(**resumed)
        return before, weights(trainer.model)

    before, whole = run(tmp_path)
    _, resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)


def test_paged_adamw_in_32_bits_is_adamw(tmp_path):
    """The same formula by other kernels: weights within a hundredth of the learning rate after four steps."""
    trained = {}
    for optim in ("adamw_torch", "paged_adamw_32bit"):
        trainer = make_trainer(tmp_path, tiny_model(**QUANTIZABLE), optim=optim, train_dataset=pairs(8), **RUN)
        trainer.train()
        trained[optim] = weights(trainer.model)
    plain, paged = trained.values()
    assert max((plain[name] - paged[name]).abs().max().item() for name in plain) < 1e-2 * RUN["learning_rate"]


VARIANTS = {
    "nf4": {},
    "double quantization": {"bnb_4bit_use_double_quant": True},
    "double, computed in bf16": {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "stored as bf16": {"bnb_4bit_quant_storage": torch.bfloat16},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_4_bit_weights_train_an_adapter_and_stay(variant, tmp_path):
    """The first loss is log 2, for the reference is the same quantized model; the last is not. Weights that are not
    quantized stay; the bytes of the others do not tell, for a CPU may pack them anew."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **VARIANTS[variant]})
    tiny_model(**QUANTIZABLE).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path / "run", model, peft_config=adapter, train_dataset=pairs(8), max_steps=3)
    floats = [(n, p) for n, p in trainer.model.named_parameters() if not p.requires_grad and p.is_floating_point()]
    frozen = {name: p.detach().clone() for name, p in floats if "norm" in name or "embed" in name}
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[-1] - math.log(2)) > 1e-4
    after = dict(trainer.model.named_parameters())
    assert frozen and all(torch.equal(frozen[name], after[name]) for name in frozen)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_in_4_bits_share_prompts(dtype, compute, tmp_path):
    """The product of 4-bit weights rounds to bf16 in an order that depends on the batch: no layout is to blame."""
    tiny_model(**QUANTIZABLE, num_hidden_layers=6).save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, device_map="cpu", dtype=dtype)
    install_scoring(model)
    assert reason_against("shared", model) is None
    assert reason_against("around", model) is None
