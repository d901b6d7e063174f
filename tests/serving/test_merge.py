"""Merged adapters: the folder loads without PEFT, and gives the results of the adapter on its base model."""

import json

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_prefopt.commands import main
from hf_prefopt.serving import merge_adapter
from hf_prefopt.serving.agreement import Agreement
from hf_prefopt.serving.kept_rows import FILE
from hf_prefopt.serving.merge import _check
from hf_prefopt.serving.token_logps import token_logps
from tests import tiny_models
from tests.scoring.tiny_configs import tiny_config
from tests.tiny_models import QUANTIZABLE, perturbed, random_rows
from tests.tokenizers import tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
BF16_UNIT = 2.0**-8  # half the distance between 1 and the next larger number


def tiny_model(**settings):
    """Return a model with as many embeddings as the tokenizer has tokens."""
    return tiny_models.tiny_model(vocab_size=len(tiny_tokenizer()), **settings)


def save_base(folder, model, dtype=torch.bfloat16):
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base, folder, config, dtype=torch.float32, scale=0.05, seed=5):
    """Save a trained adapter: noise is added to all trainable weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    policy = perturbed(get_peft_model(model, config), scale, seed)
    policy.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def served(base, adapter, dtype=torch.float32):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


ON_BOTH = ["embed_tokens", "lm_head", "q_proj"]
ADAPTERS = {
    "linear": (lora(), {}),
    "dora": (lora(use_dora=True), {}),
    "rslora and bias": (lora(use_rslora=True, bias="lora_only"), {}),
    "embeddings, untied": (lora(target_modules=ON_BOTH), {}),
    "embeddings, tied": (lora(target_modules=["embed_tokens", "q_proj"]), {"tie_word_embeddings": True}),
    "head, tied": (lora(target_modules=["lm_head", "q_proj"]), {"tie_word_embeddings": True}),
    "both, tied": (lora(target_modules=ON_BOTH), {"tie_word_embeddings": True}),
    "whole embeddings, tied": (lora(modules_to_save=["embed_tokens"]), {"tie_word_embeddings": True}),
    "whole head, tied": (lora(modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
    "whole head": (lora(modules_to_save=["lm_head"]), {}),
    "tokens, tied": (lora(trainable_token_indices=[5, 6]), {"tie_word_embeddings": True}),
    "ia3": (IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), {}),
}


@pytest.mark.parametrize(("config", "of_model"), ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_merged_model_is_the_adapter_on_its_base(config, of_model, tmp_path):
    """In float32, the logits of the reloaded folder equal those of PEFT's own
    forward up to a relative 128 · 2⁻²⁴, because sums have another order.
    """
    base = save_base(tmp_path / "base", tiny_model(**of_model), torch.float32)
    adapter = save_adapter(base, tmp_path / "run", config)
    found = merge_adapter(adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected, plain = logits(served(base, adapter)), logits(AutoModelForCausalLM.from_pretrained(base))
    apart = (logits(model) - expected).abs().max()
    assert apart <= 128 * 2.0**-24 * expected.abs().max() * 2
    assert (expected - plain).abs().max() > 1e-2 and found.agreement.effect > 1e-2
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (of_model.get("tie_word_embeddings", False) and not adapts_one_of_the_two(config))


def adapts_one_of_the_two(config):
    named = {*(config.target_modules or ()), *(getattr(config, "modules_to_save", None) or ())}
    return bool(named & {"embed_tokens", "lm_head"})


def test_weights_are_rounded_once_and_keep_their_dtype(tmp_path):
    """W + (α/r) B A in float64, rounded to bfloat16, is the merged weight; weights
    without an adapter keep every bit.
    """
    base = save_base(tmp_path / "base", tiny_model())
    adapter = save_adapter(base, tmp_path / "run", lora(target_modules=["q_proj"], lora_alpha=6))
    found = merge_adapter(adapter, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    low_rank = load_file(adapter / "adapter_model.safetensors")
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    for name, weight in before.items():
        if "q_proj" not in name:
            assert torch.equal(weight, after[name])
            continue
        a, b = (low_rank[f"base_model.model.{name.replace('.weight', '')}.lora_{which}.weight"] for which in "AB")
        exact = weight.double() + 6 / 4 * b.double() @ a.double()
        # Half a step of bfloat16, and the rounding of the float32 sum before it.
        assert ((after[name].double() - exact).abs() <= exact.abs() * BF16_UNIT * (1 + 2.0**-10) + 1e-9).all()
    assert found.agreement.dtype == torch.bfloat16
    assert 0 < found.agreement.difference <= found.agreement.bound


def test_the_log_probs_compared_are_those_of_each_sequence_alone(tmp_path):
    """The log-probs are compared with the log-softmax of the model's own logits, in
    float32 although weights are bfloat16.
    """
    base, rows, expected = save_base(tmp_path / "base", tiny_model()), random_rows(2), []
    model, float32 = (AutoModelForCausalLM.from_pretrained(base, dtype=dtype) for dtype in ("auto", "float32"))
    found = token_logps(model, rows)
    for row in rows:
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            with torch.no_grad():
                logps = float32(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            expected.append(logps[-len(response) :])
    torch.testing.assert_close(found.logps, torch.cat(expected), rtol=0, atol=128 * 2.0**-24 * 20)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_whose_modules_read_each_others_weights(tmp_path):
    """Mamba's mixer reads the weights of its convolution; afterwards, its weights are bfloat16 again."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("falcon_mamba")).save_pretrained(tmp_path)
    model, float32 = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in ("bfloat16", "bfloat16"))
    rows = random_rows(2)
    found, expected = token_logps(model, rows), token_logps(float32.float(), rows)
    torch.testing.assert_close(found.logps, expected.logps, rtol=0, atol=128 * 2.0**-24 * 20)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_experts_are_merged(tmp_path):
    torch.manual_seed(0)
    base = save_base(tmp_path / "base", AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", vocab_size=600)))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = save_adapter(base, tmp_path / "run", lora(r=2, target_modules=["q_proj"], target_parameters=targets))
    found = merge_adapter(adapter, tmp_path / "merged", dtype="float32")
    expected = logits(served(base, adapter))
    apart = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - expected).abs().max()
    assert apart <= 128 * 2.0**-24 * 2 * expected.abs().max()
    assert found.agreement.dtype == torch.float32
    assert found.agreement.effect > 100 * found.agreement.difference


def test_a_model_of_images_keeps_its_class_and_all_its_tensors(tmp_path):
    """The merged model has tensors that its class does not load, such as layers that predict additional tokens."""
    torch.manual_seed(0)
    named = transformers.Qwen3_5ForConditionalGeneration
    base = save_base(tmp_path / "base", named._from_config(tiny_config("qwen3_5")))
    more = {"mtp.fc.weight": torch.ones(3, 4, dtype=torch.bfloat16)}
    save_file({**load_file(base / "model.safetensors"), **more}, base / "model.safetensors", {"format": "pt"})
    loaded = named.from_pretrained(base, dtype=torch.float32)
    policy = perturbed(get_peft_model(loaded, lora(target_modules=["q_proj", "v_proj", "down_proj"])), 0.05)
    policy.save_pretrained(tmp_path / "run")
    merge_adapter(tmp_path / "run", tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    assert torch.equal(after["mtp.fc.weight"], more["mtp.fc.weight"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]


def test_tokenizer_template_and_generation_config_go_along_in_shards(tmp_path):
    model = tiny_model()
    model.generation_config.update(temperature=0.7, do_sample=True)
    base = save_base(tmp_path / "base", model)
    adapter = save_adapter(base, tmp_path / "run", lora())
    merge_adapter(adapter, tmp_path / "merged", max_shard_size="40KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["temperature"] == 0.7


def test_the_rows_that_the_run_kept_are_compared(tmp_path):
    base = save_base(tmp_path / "base", tiny_model())
    adapter = save_adapter(base, tmp_path / "run", lora())
    rows = random_rows(3)
    kept = {"name": "held-back rows", "quantized": "4 bits (nf4)", "rows": rows}
    (adapter / FILE).write_text(json.dumps(kept))
    said = []
    found = merge_adapter(adapter, tmp_path / "merged", say=said.append)
    assert any("check on 3 held-back rows: " in line for line in said)
    assert found.agreement.tokens == sum(len(ids) for row in rows for ids in row["response_ids"])
    assert any("trained on a base model quantized to 4 bits (nf4)" in line for line in said)


def test_a_merge_that_goes_wrong_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    """In the saved model, the weight change of one layer is missing, so its log-probs differ by more than rounding."""
    base = save_base(tmp_path / "base", tiny_model())
    adapter = save_adapter(base, tmp_path / "run", lora())
    merge = Linear.merge
    monkeypatch.setattr(Linear, "merge", lambda self, **k: None if self.in_features == 64 else merge(self, **k))
    with pytest.raises(ValueError, match="differs from the trained model"):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_an_adapter_lost_in_rounding_is_an_error(tmp_path):
    """Weight changes far below one step of bfloat16 are lost, so the merged model would be the base model."""
    base = save_base(tmp_path / "base", tiny_model())
    adapter = save_adapter(base, tmp_path / "run", lora(init_lora_weights=True), scale=1e-3)
    with pytest.raises(ValueError, match=r"lost more than half of the adapter's effect.*--dtype float32"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    wide = merge_adapter(adapter, tmp_path / "wide", dtype="float32").agreement
    assert wide.difference < wide.effect / 2


def test_an_adapter_that_is_not_merged_is_an_error_in_bfloat16(tmp_path, monkeypatch):
    """The error is raised even if the bound on the rounding is larger than the effect of the adapter."""
    base = save_base(tmp_path / "base", tiny_model())
    adapter = save_adapter(base, tmp_path / "run", lora(init_lora_weights=True), scale=7e-3)
    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    with pytest.raises(ValueError, match="lost more than half"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize("difference", [2.4e-7, 3.2e-4])
def test_a_layer_that_is_not_merged_is_an_error_in_float32(difference):
    """The numbers are those of SmolLM2-135M with an adapter after two steps, merged correctly, and merged without its
    `down_proj`. Both differences are below the bound for sums in another order.
    """
    agreement = Agreement(174, difference, 0.02, bound=3.7e-4, effect=2.7e-3, dtype=torch.float32)
    if difference < 1e-6:
        return _check(agreement)
    with pytest.raises(ValueError, match="lacks a part of the adapter"):
        _check(agreement)


def test_several_adapters_are_added_up(tmp_path):
    base = save_base(tmp_path / "base", tiny_model(), torch.float32)
    policy = served(base, save_adapter(base, tmp_path / "run" / "one", lora(), seed=1))
    policy.load_adapter(save_adapter(base, tmp_path / "run" / "two", lora(), seed=2), adapter_name="second")
    policy.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"several adapters or checkpoints \(one, two\)"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")
    merge_adapter(tmp_path / "run", tmp_path / "merged", adapters=["one", "two"])
    expected = logits(policy)
    apart = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - expected).abs().max()
    assert apart <= 128 * 2.0**-24 * 2 * expected.abs().max()
    with pytest.raises(ValueError, match=r"has no adapter three; its adapters are: one, two"):
        merge_adapter(tmp_path / "run", tmp_path / "other", adapters=["three"])


class TestErrors:
    def test_a_quantized_base(self, tmp_path):
        base = save_base(tmp_path / "base", tiny_model(**QUANTIZABLE), torch.float32)
        adapter = save_adapter(base, tmp_path / "run", lora())
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(base, quantization_config=bits).save_pretrained(tmp_path / "bits")
        with pytest.raises(ValueError, match=r"quantized .*--base"):
            merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "bits"))
        assert merge_adapter(adapter, tmp_path / "merged", base=str(base)).folder == tmp_path / "merged"

    def test_a_whole_model(self, tmp_path):
        base = save_base(tmp_path / "base", tiny_model())
        with pytest.raises(ValueError, match="full model"):
            merge_adapter(base, tmp_path / "merged")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="is not an adapter: there is no adapter_config"):
            merge_adapter(tmp_path / "no-such-run", tmp_path / "merged")

    def test_a_folder_that_is_not_empty(self, tmp_path):
        base = save_base(tmp_path / "base", tiny_model())
        adapter = save_adapter(base, tmp_path / "run", lora())
        with pytest.raises(ValueError, match="not empty"):
            merge_adapter(adapter, base)

    def test_a_soft_prompt(self, tmp_path):
        base = save_base(tmp_path / "base", tiny_model(), torch.float32)
        adapter = save_adapter(base, tmp_path / "run", PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="soft prompt"):
            merge_adapter(adapter, tmp_path / "merged")

    def test_a_base_that_is_gone(self, tmp_path):
        base = save_base(tmp_path / "base", tiny_model())
        adapter = save_adapter(base, tmp_path / "run", lora())
        base.rename(tmp_path / "moved")
        with pytest.raises(ValueError, match="--base"):
            merge_adapter(adapter, tmp_path / "merged")
        assert merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "moved")).agreement.tokens > 0


def test_the_command(tmp_path, capsys):
    base = save_base(tmp_path / "base", tiny_model())
    run = str(save_adapter(base, tmp_path / "run", lora()))
    assert main(["merge", run, "--to", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "check on 8 rows of synthetic tokens" in shown and f"vllm serve {tmp_path / 'merged'}" in shown
    assert main(["merge", run, "--to", str(tmp_path / "merged")]) == 1
    assert "not empty" in capsys.readouterr().err
