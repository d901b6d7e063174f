"""Every option that a recipe parses has an effect, or is refused with what to do; trl's new options show up here."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from tests.tiny_models import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
OURS = ("common", "data_lines", "loss_lines", "mixture", "model_options", "short_help")
# What each recipe says of itself, beside the options that it wants at least.
KINDS: dict[str, tuple[dict[str, bool], list[str]]] = {
    "dpo_lora": ({"adapter": True}, ["--use_peft", "true"]),
    "dpo_full": ({"adapter": False}, []),
    "qlora": ({"adapter": True, "quantized": True}, ["--use_peft", "true", "--load_in_4bit", "true"]),
}


@pytest.fixture
def common(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    import common

    yield common
    for name in OURS:
        sys.modules.pop(name, None)


Parse = Callable[..., SimpleNamespace]


@pytest.fixture
def parse(common, monkeypatch, tmp_path) -> Parse:
    """What a recipe reads from a command line."""

    def parsed(recipe: str, *options: str) -> SimpleNamespace:
        kind, wanted = KINDS[recipe]
        fixed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), *wanted]
        monkeypatch.setattr(sys, "argv", ["recipe.py", *fixed, "--use_cpu", "--bf16", "false", *options])
        script, training, model, _ = common.parse_arguments(**kind)
        return SimpleNamespace(
            script=script,
            training=training,
            model=model,
            loading=training.model_init_kwargs,
            lora=get_peft_config(model),
            bits=get_quantization_config(model),
        )

    return parsed


# An option: the recipe, what is typed, where the effect is, and which.
USED: dict[str, tuple[str, list[str], str, Any]] = {
    "model_name_or_path": ("dpo_lora", ["other"], "model.model_name_or_path", "other"),
    "model_revision": ("dpo_lora", ["v2"], "loading.revision", "v2"),
    "dtype": ("dpo_full", ["bfloat16"], "loading.dtype", "bfloat16"),
    "attn_implementation": ("dpo_full", ["eager"], "loading.attn_implementation", "eager"),
    "use_peft": ("dpo_lora", ["true"], "lora.peft_type", "LORA"),
    "lora_r": ("dpo_lora", ["4"], "lora.r", 4),
    "lora_alpha": ("dpo_lora", ["3"], "lora.lora_alpha", 3),
    "lora_dropout": ("qlora", ["0.3"], "lora.lora_dropout", 0.3),
    "lora_target_modules": ("dpo_lora", ["q_proj", "v_proj"], "lora.target_modules", {"q_proj", "v_proj"}),
    "lora_target_parameters": ("dpo_lora", ["experts.w"], "lora.target_parameters", ["experts.w"]),
    "lora_modules_to_save": ("dpo_lora", ["lm_head"], "lora.modules_to_save", ["lm_head"]),
    "use_rslora": ("dpo_lora", ["true"], "lora.use_rslora", True),
    "use_dora": ("dpo_lora", ["true"], "lora.use_dora", True),
    "load_in_4bit": ("qlora", ["true"], "bits.load_in_4bit", True),
    "load_in_8bit": ("qlora", ["true", "--load_in_4bit", "false"], "bits.load_in_8bit", True),
    "bnb_4bit_quant_type": ("qlora", ["fp4"], "bits.bnb_4bit_quant_type", "fp4"),
    "use_bnb_nested_quant": ("qlora", ["true"], "bits.bnb_4bit_use_double_quant", True),
    "bnb_4bit_quant_storage": ("qlora", ["uint8"], "bits.bnb_4bit_quant_storage.itemsize", 1),
}
# What is typed, and what is said; the recipe to take is named.
REFUSED: list[tuple[str, list[str], str]] = [
    ("dpo_lora", ["--use_peft", "false"], "set use_peft to true, or take dpo_full.py"),
    ("dpo_lora", ["--load_in_4bit", "true"], "load_in_4bit=True: this recipe does not quantize.*take qlora.py"),
    ("dpo_lora", ["--load_in_8bit", "true"], "load_in_8bit=True: this recipe does not quantize"),
    ("dpo_lora", ["--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type=fp4: this recipe does not quantize"),
    ("dpo_lora", ["--lora_task_type", "SEQ_CLS"], "lora_task_type=SEQ_CLS: a causal language model is trained"),
    ("dpo_full", ["--use_peft", "true"], "use_peft=True: this recipe trains all weights.*take dpo_lora.py"),
    ("dpo_full", ["--lora_r", "8", "--use_dora"], "lora_r=8, use_dora=True: this recipe trains all weights"),
    ("dpo_full", ["--load_in_4bit", "true"], "load_in_4bit=True: this recipe does not quantize"),
    ("qlora", ["--load_in_4bit", "false"], "set load_in_4bit or load_in_8bit, or take dpo_lora.py"),
    ("qlora", ["--load_in_8bit", "--load_in_4bit=0", "--bnb_4bit_quant_type=fp4"], "quant_type=fp4 is of 4 bits"),
    ("qlora", ["--load_in_8bit", "true"], "can't use 8 bit and 4 bit precision at the same time"),
    ("dpo_lora", ["--ignore_bias_buffers", "true"], "ignore_bias_buffers=True has no effect: leave it out"),
    ("dpo_lora", ["--do_predict", "true"], "do_predict=True has no effect"),
    ("dpo_lora", ["--fp16", "true"], "fp16=True .* has no effect on a CPU: leave it out"),
    ("dpo_lora", ["--model_init_kwargs", '{"dtype": "bfloat16"}'], "has dtype: set it by its own option, --dtype bf"),
    ("dpo_lora", ["--trust_remote_code", "true"], "not used by the HfArgumentParser.*trust_remote_code"),
]


def test_every_option_of_a_model_is_used_or_refused():
    assert {field.name for field in fields(ModelConfig)} == {*USED, "lora_task_type"}
    assert {field.name for field in fields(ScriptArguments)} == {*DATA, "ignore_bias_buffers"}


@pytest.mark.parametrize("option", USED)
def test_an_option_of_a_model_has_its_effect(option, parse):
    recipe, typed, where, expected = USED[option]
    found: Any = parse(recipe, f"--{option}", *typed)
    for name in where.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == expected


@pytest.mark.parametrize(("recipe", "typed", "message"), REFUSED, ids=[" ".join(typed) for _, typed, _ in REFUSED])
def test_an_option_without_effect_is_refused(recipe, typed, message, parse):
    """In one line and without a traceback."""
    with pytest.raises(SystemExit, match=message):
        parse(recipe, *typed)


def test_the_adapter_on_the_upper_half_of_the_layers(parse):
    """Seven linear modules in each of the layers 15 to 29 of a model as deep as SmolLM2-135M, and none elsewhere."""
    lora = parse("dpo_lora", "--config", str(RECIPES / "dpo_lora_upper.yaml")).lora
    model = get_peft_model(tiny_model(num_hidden_layers=30), lora)
    adapted = [name.split(".layers.")[1] for name, _ in model.named_parameters() if "lora_A" in name]
    assert Counter(int(name.split(".")[0]) for name in adapted) == dict.fromkeys(range(15, 30), 7)


def test_further_arguments_of_loading_are_kept(parse):
    typed = ["--model_init_kwargs", '{"trust_remote_code": true, "num_hidden_layers": 2}', "--model_revision", "v2"]
    loading = parse("dpo_full", *typed).loading
    assert loading == {"trust_remote_code": True, "num_hidden_layers": 2, "revision": "v2", "dtype": "float32"}


# What is typed, and what `datasets.load_dataset` is asked, or which rows are found.
DATA: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dataset_name": (["other"], {"path": "other"}),
    "dataset_config": (["easy"], {"name": "easy"}),
    "dataset_streaming": (["true"], {"streaming": True}),
    "dataset_train_split": (["other"], {"train": "other"}),
    "dataset_test_split": (["held_out"], {"test": "held_out"}),
}


@pytest.mark.parametrize("option", DATA)
def test_an_option_of_the_data_has_its_effect(option, common, parse, monkeypatch):
    typed, expected = DATA[option]
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **others: Any) -> DatasetDict:
        asked.update(others, path=path)
        names = "train", "test", "other", "held_out"
        return DatasetDict({name: Dataset.from_dict({"from": [name]}) for name in names})

    monkeypatch.setattr("hf_prefopt.data.files.load_dataset", load_dataset)
    parsed = parse("dpo_lora", f"--{option}", *typed)
    train, test = common.load_pairs(parsed.script, common.RecipeArguments(), parsed.training)
    assert test is not None
    asked.update(train=train["from"][0], test=test["from"][0])
    assert asked == {"path": "d", "name": None, "streaming": False, "train": "train", "test": "test", **expected}


FILES = ("dpo_lora.yaml", "configs/dpo.yaml", "configs/simpo.yaml", "configs/sft.yaml", "configs/cal_dpo.yaml")


@pytest.mark.parametrize("loss", ["simpo", "sft", "cal_dpo", "dpo"])
@pytest.mark.parametrize("file", FILES)
def test_another_loss_than_the_files_has_its_own_hyperparameters(file, loss, parse, capsys):
    """`--config configs/dpo.yaml --loss_type simpo` runs at SimPO's β, and a line says what was left out."""
    from hf_prefopt import get_loss

    parsed = parse("dpo_lora", "--config", str(RECIPES / file), "--loss_type", loss)
    (term,) = parsed.training.build_objective().terms
    assert term.spec is get_loss(loss) and term.hyperparameters == get_loss(loss).defaults
    written = yaml.safe_load((RECIPES / file).read_text())
    is_said = f"not used for {loss}" in capsys.readouterr().out
    assert is_said == (written["loss_type"] != [loss] and "beta" in written)


def test_hyperparameters_on_the_command_line_are_the_losses(parse):
    """Also the file's own loss by another of its names keeps what the file says."""
    file = ["--config", str(RECIPES / "configs" / "dpo.yaml")]
    (term,) = parse("dpo_lora", *file, "--loss_type", "simpo", "--beta", "3.0").training.build_objective().terms
    assert term.params["beta"] == 3.0
    (term,) = parse("dpo_lora", *file, "--loss_type=sigmoid").training.build_objective().terms
    assert term.params == {"beta": 0.1, "label_smoothing": 0.0}


def test_a_folder_with_an_earlier_run_is_named(parse, tmp_path, capsys):
    parse("dpo_lora")
    assert "earlier run" not in capsys.readouterr().out
    (tmp_path / "README.md").touch()
    parse("dpo_lora")
    assert f"{tmp_path} holds an earlier run" in capsys.readouterr().out
