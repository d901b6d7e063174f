"""Checkpoints by name: the class that they name is loaded, trained and saved, so that servers can load the result."""

import json
import logging
import re

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_prefopt import PreferenceTrainer
from hf_prefopt.adapted import lost_adapters
from hf_prefopt.loading import load_model, load_processing_class, model_class
from hf_prefopt.policy import with_adapter
from tests.scoring.tiny_configs import text_rows, tiny_config
from tests.tiny_models import perturbed, tiny_model
from tests.tokenizers import CHATML, tiny_tokenizer
from tests.trainers import make_config

# Image-text models, and the names of the modules that text does not reach.
OF_IMAGES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
TOWERS = re.compile(r"visual|vision|projector")


def lora(target_modules="all-linear", **settings):
    return LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM", **settings)


def checkpoint(folder, model_type):
    """Save a random checkpoint of the class that the family's own checkpoints name, with a tokenizer."""
    torch.manual_seed(0)
    model = getattr(transformers, OF_IMAGES[model_type])._from_config(tiny_config(model_type))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def train(folder, output, peft_config=None, **settings):
    quiet = {"max_steps": 2, "learning_rate": 1e-2, "model_init_kwargs": {"dtype": "float32"}}
    trainer = PreferenceTrainer(
        str(folder),
        args=make_config(output, **{**quiet, **settings}),
        train_dataset=Dataset.from_list(text_rows(4, longest=10)),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model_type", OF_IMAGES)
class TestImagesAndText:
    def test_an_adapter_fits_the_class_that_the_checkpoint_names(self, model_type, tmp_path, caplog):
        """Every tensor of the saved adapter exists there, none is zero, and the
        adapter changes the logits of the served model.
        """
        base = checkpoint(tmp_path / "base", model_type)
        trainer = train(base, tmp_path / "run", lora())
        named = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
        assert type(trainer.model.get_base_model()) is named
        saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
        served = PeftModel.from_pretrained(named.from_pretrained(base, dtype=torch.float32), tmp_path / "run")
        loaded = {name.replace(".default.", "."): value for name, value in served.state_dict().items()}
        assert len(saved) >= 8 and all(torch.equal(loaded[name], value) for name, value in saved.items())
        assert all(value.abs().max() > 0 for value in saved.values())
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            trained, plain = served.eval()(ids).logits, named.from_pretrained(base, dtype=torch.float32)(ids).logits
            torch.testing.assert_close(trainer.model.eval()(ids).logits, trained)
        assert (trained - plain).abs().max() > 1e-3
        assert not any(TOWERS.search(name) for name in saved)
        assert "text does not reach them" in caplog.text

    def test_all_weights_are_saved(self, model_type, tmp_path):
        """The names are the same, and weights that did not train have the same values."""
        base = checkpoint(tmp_path / "base", model_type)
        train(base, tmp_path / "run")
        before, after = tensors(base), tensors(tmp_path / "run")
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and not any(TOWERS.search(name) for name in changed)
        assert {name for name in before if TOWERS.search(name)}


def test_what_the_class_leaves_out_is_said(tmp_path, caplog):
    """The tensors are of layers that predict several tokens, which transformers
    ignores without a message, and an unknown one.
    """
    base = checkpoint(tmp_path, "qwen3_5")
    extra = {"mtp.layers.0.weight": torch.zeros(2), "stranger.weight": torch.zeros(2)}
    save_file({**tensors(base), **extra}, base / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING, "hf_prefopt"):
        load_model(str(base), None)
    assert "2 tensors (mtp.layers.0.weight, stranger.weight) of the checkpoint are not in Qwen3_5For" in caplog.text


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_weights_that_would_be_random_are_an_error(kind, tmp_path):
    config = tiny_model().config
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for 1 tensors \(lm_head.weight\) of LlamaForCausalLM"):
        load_model(str(tmp_path), None)


def test_a_config_without_a_class(tmp_path):
    """The first Auto class that accepts the config is used."""
    assert model_class(AutoConfig.for_model("llama")) is AutoModelForCausalLM
    assert model_class(AutoConfig.for_model("mistral3")) is transformers.AutoModelForImageTextToText


def test_an_adapter_of_another_class_is_an_error(tmp_path):
    """The tensors of an adapter that was trained on the text-only class have names
    that the served class does not have.
    """
    base = checkpoint(tmp_path / "base", "qwen3_5")
    text_only = AutoModelForCausalLM.from_pretrained(base)
    assert type(text_only).__name__ == "Qwen3_5ForCausalLM"
    by_last_name = lora(["down_proj"])
    perturbed(with_adapter(text_only, by_last_name)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"\(base_model.* are not loaded into Qwen3_5ForConditionalG"):
        load_model(str(tmp_path / "adapter"), None)


def test_an_adapter_that_peft_loses_is_an_error(tmp_path):
    """PEFT 0.21 saves the adapters of Laguna's shared experts but does not load
    them: the error comes before training.
    """
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("laguna")).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora())
    perturbed(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"tensors \(.*shared_expert.* are not loaded into LagunaForCausalLM"):
        load_model(str(tmp_path / "adapter"), None)


class TestLostAdapters:
    """Adapters that PEFT saves but does not load, here those of Laguna's shared experts."""

    def model(self):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config("laguna"))

    @pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"], r".*\.(q_proj|down_proj)"])
    def test_a_new_adapter_is_without_them(self, target, tmp_path, caplog):
        model = with_adapter(self.model(), lora(target))
        assert "shared_experts.down_proj" in caplog.text and "PEFT saves adapters there but does" in caplog.text
        perturbed(model).save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(self.model(), tmp_path)
        saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
        assert saved.keys() == loaded.keys() and len(saved) >= 6
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)

    def test_one_that_is_there_is_an_error(self):
        with pytest.raises(ValueError, match=r"layers \(.*shared_experts.*exclude_modules=\['down_proj', 'gate_proj'"):
            with_adapter(get_peft_model(self.model(), lora()), None)

    def test_where_peft_loads_none(self):
        config = tiny_config("unlimited_ocr")
        with pytest.raises(ValueError, match=r"PEFT saves adapters of UnlimitedOcrFor.* but loads none of them again"):
            with_adapter(AutoModelForImageTextToText.from_config(config), lora())

    def test_trying_leaves_an_adapter_as_it_is(self):
        model = perturbed(get_peft_model(tiny_model(), lora()))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert lost_adapters(model) == []
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def no_processor(name, **_):
    raise ImportError("it needs torchvision\nwhich is not there")


def test_the_processors_template(tmp_path, monkeypatch, caplog):
    """The template is in its own file, next to a processor that cannot be loaded:
    the tokenizer gets it, with a message.
    """
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", no_processor)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    model = checkpoint(tmp_path, "qwen3_5")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"processor_class": "NoSuchProcessor"}))
    loaded = load_processing_class(load_model(str(model), None), None)
    assert loaded.chat_template == CHATML
    assert "loading only its tokenizer: it needs torchvision" in caplog.text


def test_a_processor_is_what_processes(tmp_path, monkeypatch):
    """Rows are rendered with the processor's template, and its files are saved with the model."""

    class Processor(transformers.ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer, self.chat_template = tokenizer, CHATML

        def save_pretrained(self, folder, **_):
            (tmp_path / "run" / "saved").touch()

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name, **_: Processor(tokenizer))
    base = checkpoint(tmp_path / "base", "qwen3_5")
    (base / "processor_config.json").write_text("{}")
    trainer = train(base, tmp_path / "run", max_steps=1)
    assert isinstance(trainer.processing_class, Processor) and trainer.data.tokenizer.chat_template == CHATML
    assert (tmp_path / "run" / "saved").exists()


class TestTowers:
    """Adapters on image towers, which text never reaches."""

    @pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen2_5_vl", "llava"])
    @pytest.mark.parametrize("target", [["q_proj", "v_proj", "qkv", "lm_head"], r"(.*\.)?(q_proj|qkv|v_proj|lm_head)"])
    def test_named_layers_of_a_tower_are_left_out(self, model_type, target, caplog):
        """The head and the language model keep their adapters, and each adapter has a gradient."""
        model = with_adapter(AutoModelForImageTextToText.from_config(tiny_config(model_type)), lora(target))
        assert "(model.v" in caplog.text and "text does not reach them" in caplog.text
        ids = torch.randint(3, 270, (1, 12))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
        adapted = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
        assert len(adapted) == 2 * 2 + 1 and all(grad is not None for grad in adapted.values())

    @pytest.mark.parametrize("model_type", ["gemma4", "llama4"])
    def test_layers_that_peft_chooses_by_itself(self, model_type):
        """The configuration names no modules, so PEFT chooses those of the family."""
        model = with_adapter(AutoModelForImageTextToText.from_config(tiny_config(model_type)), lora(None))
        adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert adapted and all("language_model" in name for name in adapted)

    def test_an_adapter_that_is_there(self, caplog):
        """An existing adapter is kept, and a message names it."""
        config = tiny_config("gemma3")
        model = get_peft_model(AutoModelForImageTextToText.from_config(config), lora(["q_proj", "lm_head"]))
        assert with_adapter(model, None) is model
        assert "2 layers with an adapter (model.vision_tower" in caplog.text and "are not trained" in caplog.text
        assert "lm_head" not in caplog.text


class TestAllLinear:
    """Layers that PEFT cannot adapt are left out, and the other layers train."""

    @pytest.mark.parametrize(
        ("model_type", "reason"),
        [
            ("llama4_text", "Llama4Router has a different output than a linear layer"),
            ("phimoe", "PhimoeTopKRouter has a different output than a linear layer"),
            ("deepseek_v4", "has a different output than a linear layer"),
            ("nemotron_h", "Mamba's fused kernel bypasses adapters"),
            ("falcon_h1", "Mamba's fused kernel bypasses adapters"),
            ("mamba2", "Mamba's fused kernel bypasses adapters"),
            ("granitemoehybrid", "GraniteMoeHybridMambaLayer reads their weights directly, bypassing an adapter"),
            ("bamba", "BambaMixer reads their weights directly, bypassing an adapter"),
            ("longcat_flash", "LongcatFlashTopkRouter reads their weights directly, bypassing an adapter"),
            ("gemma3n_text", "Gemma3nTextAltUp reads their weights directly, bypassing an adapter"),
        ],
    )
    def test_it_runs(self, model_type, reason, caplog):
        torch.manual_seed(0)
        model = with_adapter(AutoModelForCausalLM.from_config(tiny_config(model_type)), lora())
        assert reason in caplog.text
        ids = torch.randint(3, 280, (1, 12))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
        adapted = [p for name, p in model.named_parameters() if "lora_B" in name]
        # An indexer only selects positions, so it has no gradient, with or without an adapter.
        assert adapted and (model_type == "deepseek_v4" or all(p.grad is not None for p in adapted))

    @pytest.mark.parametrize("given", [["q_proj"], r"model\.layers\.0\..*"])
    def test_exclusions_of_ones_own_stay(self, given):
        config = lora(exclude_modules=given)
        model = with_adapter(AutoModelForCausalLM.from_config(tiny_config("phimoe")), config)
        adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert adapted and not any("router" in name for name in adapted)
        assert not any(("q_proj" in name) if isinstance(given, list) else ("layers.0." in name) for name in adapted)

    @pytest.mark.parametrize(("model_type", "layers"), [("qwen3", 7), ("falcon", 4), ("bloom", 4)])
    def test_a_model_of_text_is_adapted_whole(self, model_type, layers, caplog):
        """Falcon's linear layers have their own forward, which computes the same as the common one."""
        model = with_adapter(AutoModelForCausalLM.from_config(tiny_config(model_type)), lora())
        assert sum(hasattr(module, "lora_A") for module in model.modules()) == 2 * layers
        assert "get no adapter" not in caplog.text
