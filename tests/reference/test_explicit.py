"""An explicit reference (another model, a path, another dtype, quantized, or an
adapter) has the log-probs that it has alone, with and without the cache.
"""

import math
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel

from hf_prefopt.reference.cache_key import fingerprint
from hf_prefopt.scoring.forward import score
from tests.tiny_models import QUANTIZABLE, perturbed, tiny_model, with_lora
from tests.trainers import first_batch, logged, make_trainer, pairs, weights


def scores_by_itself(model, folder, batch):
    """Return the token log-probs of a model as the policy of its own trainer."""
    trainer = make_trainer(folder, model, loss_type="sft", layout="padded")
    with torch.no_grad():
        return score(trainer.model.eval(), batch).token_logps


def cache(folder, cached):
    """Return the settings of a cache in a folder, or no settings."""
    return {"precompute_ref_log_probs": True, "reference_cache_dir": str(folder / "cache")} if cached else {}


def reference_scores(trainer, batch):
    trainer.scorer.settle()
    return trainer.scorer.reference_scores(batch).token_logps


def test_a_name_is_loaded_as_the_policy_is(tmp_path):
    """The saved model is loaded in the dtype of `model_init_kwargs`."""
    perturbed(tiny_model(), scale=0.1).save_pretrained(tmp_path / "saved")
    settings = {"ref_model": str(tmp_path / "saved"), "model_init_kwargs": {"dtype": "float64"}, "layout": "padded"}
    trainer = make_trainer(tmp_path / "run", tiny_model(dtype=torch.float64), **settings)
    assert {p.dtype for p in trainer.reference.model.parameters()} == {torch.float64}
    batch = first_batch(trainer)
    expected = scores_by_itself(perturbed(tiny_model(), scale=0.1).double(), tmp_path, batch)
    assert torch.equal(reference_scores(trainer, batch), expected)


def test_a_name_is_not_loaded_where_no_loss_needs_it(tmp_path):
    """The name does not exist, but the error about the unused reference comes before loading."""
    with pytest.raises(ValueError, match="need no reference"):
        make_trainer(tmp_path, tiny_model(), ref_model="nowhere/at-all", loss_type="simpo")


@pytest.mark.parametrize("cached", [False, True])
def test_a_reference_in_another_dtype(cached, tmp_path):
    """The reference is in bf16 and the policy in fp32. Its log-probs are those that it has alone, in full precision
    from the head on; the first loss is close to log 2, but not equal.
    """
    settings = {"ref_model": tiny_model(dtype=torch.bfloat16), "layout": "padded", "max_steps": 2}
    settings |= cache(tmp_path, cached)
    trainer = make_trainer(tmp_path / "run", tiny_model(), **settings)
    batch = first_batch(trainer)
    expected = scores_by_itself(tiny_model(dtype=torch.bfloat16), tmp_path, batch)
    actual = reference_scores(trainer, batch)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    trainer.train()
    assert 1e-5 < abs(logged(trainer, "loss")[0] - 0.6931472) < 0.1


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_reference_that_waits_in_the_cpus_memory(layout, cached, tmp_path):
    """accelerate's hooks load each layer's weights when they are used; before and after, they are on no device. The
    log-probs and the fingerprint equal those of the model without offloading, bit for bit.
    """
    plain = perturbed(tiny_model(), scale=0.1)
    known_by = fingerprint(plain, 1.0, None)
    offloaded = cpu_offload(perturbed(tiny_model(), scale=0.1), execution_device="cpu")
    settings = {"ref_model": offloaded, "layout": layout, "max_steps": 2, **cache(tmp_path, cached)}
    trainer = make_trainer(tmp_path / "run", tiny_model(), **settings)
    batch = first_batch(trainer)
    other = make_trainer(tmp_path / "other", plain, loss_type="sft", layout=layout)
    other.scorer.settle()
    with torch.no_grad():
        expected = score(plain.eval(), batch).token_logps
    assert torch.equal(reference_scores(trainer, batch), expected)
    assert fingerprint(offloaded, 1.0, None) == known_by
    trainer.train()
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    assert all(math.isfinite(loss) and abs(loss - math.log(2)) > 1e-3 for loss in logged(trainer, "loss"))


def test_whole_predictions_of_a_reference_that_waits_in_the_cpus_memory(tmp_path):
    """The losses equal those of the model without offloading: TDPO uses the reference's head outside its forward."""
    losses = []
    for place in (lambda model: model, partial(cpu_offload, execution_device="cpu")):
        reference = place(perturbed(tiny_model(), scale=0.1))
        trainer = make_trainer(tmp_path, tiny_model(), ref_model=reference, loss_type="tdpo2", max_steps=2)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cached", [False, True])
def test_a_quantized_reference(bits, cached, tmp_path):
    """The policy is in full precision; the rounding of the reference's weights changes the first loss."""
    pytest.importorskip("bitsandbytes", reason="quantized references need bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    perturbed(tiny_model(**QUANTIZABLE), scale=0.1).save_pretrained(tmp_path / "saved")
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=quantization)
    before = fingerprint(quantized, 1.0, None)
    quantized(torch.tensor([[5, 6, 7]]))
    assert fingerprint(quantized, 1.0, None) == before
    policy = perturbed(tiny_model(**QUANTIZABLE), scale=0.1)
    settings = {"ref_model": quantized, "layout": "padded", "max_steps": 2}
    settings |= cache(tmp_path, cached)
    trainer = make_trainer(tmp_path / "run", policy, **settings)
    batch = first_batch(trainer)
    with torch.no_grad():
        logits = quantized(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    rows = logits.flatten(0, 1)[batch["scored_rows"]].log_softmax(-1)
    expected = rows.gather(1, batch["targets"][:, None])[:, 0]
    # The head computes a batch of scored rows or all rows: the same products in another order.
    torch.testing.assert_close(reference_scores(trainer, batch), expected, rtol=1e-3, atol=1e-3)
    trainer.train()
    assert 1e-5 < abs(logged(trainer, "loss")[0] - 0.6931472) < 1.0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_named_adapter_is_the_model_with_it_merged(layout, cached, tmp_path):
    """Another adapter trains. Merging rounds W + B·A once in fp32: about 1e-6 of log-probs of a few nats."""
    ours = perturbed(with_lora(tiny_model()), scale=0.1, seed=5)
    ours.save_pretrained(tmp_path / "adapter")
    model = with_lora(tiny_model())
    model.load_adapter(tmp_path / "adapter", "before")
    perturbed(model, scale=0.1, seed=7)
    settings = {"reference": "adapter:before", "layout": layout, **cache(tmp_path, cached)}
    trainer = make_trainer(tmp_path, model, **settings)
    trainer.scorer.settle()
    batch = first_batch(trainer)
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").merge_and_unload().requires_grad_()
    other = make_trainer(tmp_path, merged, loss_type="sft", layout=layout)
    other.scorer.settle()
    with torch.no_grad():
        expected = score(other.model.eval(), batch).token_logps
        policy = score(trainer.model.eval(), batch).token_logps
    torch.testing.assert_close(reference_scores(trainer, batch), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(policy, expected, atol=1e-2)


def test_several_active_adapters_are_active_again(tmp_path):
    """An SFT adapter is active below the adapter that trains, and a third adapter is the reference. After the
    reference's forward, the first two are active, the SFT adapter is still frozen, and the other one trains.
    """
    model = perturbed(with_lora(tiny_model()), 0.1)
    model.add_adapter("ref", LoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("dpo", LoraConfig(r=4, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "dpo"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dpo." in name)
    trainer = make_trainer(tmp_path, model, reference="adapter:ref", eval_dataset=pairs(2), max_steps=2)
    trainer.evaluate()
    assert model.active_adapters == ["default", "dpo"]
    before = weights(model)
    trainer.train()
    assert model.active_adapters == ["default", "dpo"]
    changed = {name.split(".")[-2] for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"dpo"}
