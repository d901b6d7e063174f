"""LoRA on the experts of a mixture of experts, whose weights are parameters and not layers (`target_parameters`)."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_prefopt import PreferenceTrainer
from tests.scoring.families import _plain_logps
from tests.scoring.tiny_configs import text_rows, tiny_config
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged, make_config

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")


def experts(**settings):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM", **settings)


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(request.param, vocab_size=600)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


ROWS = text_rows(4, longest=10)


def make(model, output, **settings):
    """Return a trainer with all pairs in each step."""
    torch.manual_seed(0)  # seed of the adapter's initial weights
    quiet = {
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": len(ROWS),
        "lr_scheduler_type": "constant",
        "router_aux_loss_coef": 0.0,
    }
    peft_config = settings.pop("peft_config", None)
    args = make_config(output, **{**quiet, **settings})
    return PreferenceTrainer(str(model), args=args, train_dataset=Dataset.from_list(ROWS), peft_config=peft_config)


def test_fresh_trained_saved_and_trained_on(base, tmp_path):
    """The reference is first the base model without the experts' adapters, and then a copy of the trained adapters: the
    first loss is log 2 both times. The saved adapters give the trained log-probs, for each sequence alone.
    """
    first = make(base, tmp_path / "first", peft_config=experts())
    assert first.reference.description.startswith("the base model")
    first.train()
    first.save_model()
    assert logged(first, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(first, "loss")[-1] < math.log(2) - 1e-3
    saved = load_file(tmp_path / "first" / "adapter_model.safetensors")
    of_experts = [name for name in saved if "experts" in name]
    assert len(of_experts) == 2 * 2 * 2 and all(saved[name].abs().max() > 0 for name in saved)

    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        untrained = _plain_logps(plain.eval(), ROWS)
        served = PeftModel.from_pretrained(plain, tmp_path / "first").eval()
        trained = _plain_logps(served, ROWS)
        of_trainer = _plain_logps(first.model.eval(), ROWS)
    # fp32: roundings of 6e-8 in sums of about 50 nats.
    torch.testing.assert_close(of_trainer, trained, rtol=1e-5, atol=0)
    assert (trained - untrained).abs().max() > 0.1

    second = make(tmp_path / "first", tmp_path / "second")
    assert second.reference.description.startswith("a frozen copy")
    second.train()
    assert logged(second, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(second, "logps/chosen")[0] == pytest.approx(trained[0::2].mean().item(), rel=1e-5)
    assert logged(second, "loss")[-1] < math.log(2) - 1e-4


def test_resumed_as_if_never_stopped(base, tmp_path):
    """Four steps at once, and two and two: the losses are equal, bit for bit on one machine."""
    whole = make(base, tmp_path / "whole", peft_config=experts())
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 2, "peft_config": experts()}
    make(base, tmp_path / "parts", **settings, max_steps=2).train()
    rest = make(base, tmp_path / "parts", **settings)
    rest.train(resume_from_checkpoint=True)
    assert logged(rest, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
