"""bitsandbytes in common uses: 8-bit and paged optimizers, and all variants of 4-bit weights."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_prefopt import policy
from hf_prefopt.scoring.forward import install_scoring
from hf_prefopt.scoring.layout import reason_against
from hf_prefopt.training.engines import check_quantized
from tests.tiny_models import QUANTIZABLE, perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs, weights

pytest.importorskip("bitsandbytes")
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_a_run_with_an_optimizer_of_theirs_is_resumed_bit_for_bit(optim, tmp_path):
    """The state of the optimizer, in blocks of 8 bits, is restored from a
    checkpoint. It has changed the weights, too.
    """

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
    """The formula is the same, with other kernels: weights agree to a hundredth of
    the learning rate after four steps.
    """
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
    """The first loss is log 2, because the reference is the same quantized model; the last loss differs. Weights that
    are not quantized stay equal. The bytes of the quantized weights are not compared, because a CPU may pack them.
    """
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


def in_bits(folder, **config):
    """Return the tiny model in 4 bits, or with a `BitsAndBytesConfig`."""
    tiny_model(**QUANTIZABLE).save_pretrained(folder)
    quantization = BitsAndBytesConfig(**(config or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)


@pytest.mark.parametrize("evaluates", [False, True])
def test_gradients_pass_through_4_bit_weights(evaluates, tmp_path):
    """4-bit weights train like the same weights in fp32, also after an evaluation,
    whose forward may pack weights on a CPU.

    A gradient of products of 64 numbers in 20 layers has a relative error of 20·√64·2⁻²⁴ ≈ 1e-5; 1e-4 is ten times
    that. Packed weights pass no gradient: the norm is then a tenth.
    """
    settings = {"train_dataset": pairs(8), "eval_dataset": pairs(4, seed=1), "reference": "adapter_off", "optim": "sgd"}
    norms, trained = {}, {}
    for name in ("4 bits", "fp32"):
        model = in_bits(tmp_path / "base")
        model = perturbed(with_lora(model if name == "4 bits" else model.dequantize()), 0.05)
        trainer = make_trainer(tmp_path, model, max_steps=3, **{**settings, "learning_rate": 0.1})
        if evaluates:
            trainer.evaluate()
        trainer.train()
        norms[name] = logged(trainer, "grad_norm")
        trained[name] = {key: p.detach() for key, p in trainer.model.named_parameters() if p.requires_grad}
    assert norms["4 bits"] == pytest.approx(norms["fp32"], rel=1e-4)
    moved = max((p - q).abs().max() for p, q in zip(trained["fp32"].values(), start(tmp_path).values(), strict=True))
    for key, expected in trained["fp32"].items():
        assert (trained["4 bits"][key] - expected).abs().max() <= 1e-4 * moved, key


def start(folder):
    model = perturbed(with_lora(tiny_model(**QUANTIZABLE)), 0.05)
    return {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}


def test_packed_weights_are_refused(tmp_path, monkeypatch):
    """Packed weights pass no gradient. Whether a forward packs them depends on the
    CPU, so the test marks them as packed.
    """
    model = in_bits(tmp_path / "base")
    monkeypatch.setattr(policy, "lost_adapters", lambda _: [])  # reads weights that are only marked as packed
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"packed the 4-bit weights of .*layers.1.mlp.up_proj.* load the model again"):
        make_trainer(tmp_path, model, peft_config=LoraConfig(r=4, target_modules="all-linear"))


def engine(name):
    kind = DistributedType.FSDP if name == "FSDP2" else DistributedType.DEEPSPEED
    plugin = SimpleNamespace(zero_stage=int(name[-1]))
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))


FOUR = {"load_in_4bit": True}
STORED = {dtype: {**FOUR, "bnb_4bit_quant_storage": dtype} for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "precision", "config", "error"),
    [
        ("ZeRO-2", "no", FOUR, None),
        ("ZeRO-3", "bf16", FOUR, None),
        ("ZeRO-3", "bf16", STORED[torch.bfloat16], None),
        ("ZeRO-3", "bf16", {"load_in_8bit": True}, None),
        ("FSDP2", "no", STORED[torch.bfloat16], None),
        ("FSDP2", "bf16", STORED[torch.bfloat16], None),
        ("ZeRO-2", "bf16", STORED[torch.float32], r"would corrupt .*float32: .*quant_storage=torch.bfloat16\)"),
        (
            "ZeRO-3",
            "fp16",
            STORED[torch.bfloat16],
            r"would corrupt .*bfloat16: .*quant_storage=torch.float16\)",
        ),
        ("FSDP2", "bf16", STORED[torch.float32], r"would corrupt .*float32: .*quant_storage=torch.bfloat16\)"),
        ("FSDP2", "no", FOUR, r"cannot shard or resume .*uint8: .*quant_storage=torch.float32\)"),
        ("FSDP2", "bf16", FOUR, r"cannot shard or resume .*uint8: .*quant_storage=torch.bfloat16\)"),
        ("FSDP2", "bf16", {"load_in_8bit": True}, r"8-bit weights: load the model in 4 bits .*DDP or DeepSpeed"),
    ],
)
def test_engines_refuse_storage_that_they_would_cast(name, precision, config, error, tmp_path):
    model = in_bits(tmp_path, **config)
    if error is None:
        check_quantized(engine(name), model, precision)
    else:
        with pytest.raises(ValueError, match=error):
            check_quantized(engine(name), model, precision)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_in_4_bits_share_prompts(dtype, compute, tmp_path):
    """The product of 4-bit weights rounds to bf16 in an order that depends on the
    batch, so this is not a wrong layout.
    """
    tiny_model(**QUANTIZABLE, num_hidden_layers=6).save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, device_map="cpu", dtype=dtype)
    install_scoring(model)
    assert reason_against("shared", model) is None
    assert reason_against("around", model) is None
