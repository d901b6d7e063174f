"""Every option of a recipe has an effect, or raises an error that says what to do.
New options of TRL fail these tests.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from hf_prefopt import get_loss
from hf_prefopt.recipe.adapters import lora_of, quantization_of
from hf_prefopt.recipe.data import load_pairs
from hf_prefopt.recipe.options import DataOptions, ModelOptions
from tests.e2e.typed import read
from tests.tiny_models import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
ADAPTER, BITS = {"use_peft": True}, {"use_peft": True, "load_in_4bit": True}
Parse = Callable[..., SimpleNamespace]


@pytest.fixture
def parse(tmp_path) -> Parse:
    """Parse a command line, with the settings of a script as defaults."""

    def parsed(script: dict[str, Any], *options: str) -> SimpleNamespace:
        fixed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)]
        recipe = read(*fixed, "--use_cpu", "--bf16", "false", *options, script=script)
        return SimpleNamespace(
            recipe=recipe,
            model=recipe.model,
            training=recipe.training,
            loading=recipe.training.model_init_kwargs,
            lora=lora_of(recipe.model),
            bits=quantization_of(recipe.model),
        )

    return parsed


# A test for each option: the recipe, the command line, the object with the effect, and the effect.
USED: dict[str, tuple[dict[str, Any], list[str], str, Any]] = {
    "model_name_or_path": (ADAPTER, ["other"], "model.model_name_or_path", "other"),
    "model_revision": (ADAPTER, ["v2"], "loading.revision", "v2"),
    "dtype": ({}, ["bfloat16"], "loading.dtype", "bfloat16"),
    "attn_implementation": ({}, ["eager"], "loading.attn_implementation", "eager"),
    "use_peft": (ADAPTER, ["true"], "lora.peft_type", "LORA"),
    "lora_r": (ADAPTER, ["4"], "lora.r", 4),
    "lora_alpha": (ADAPTER, ["3"], "lora.lora_alpha", 3),
    "lora_dropout": (BITS, ["0.3"], "lora.lora_dropout", 0.3),
    "lora_target_modules": (ADAPTER, ["q_proj", "v_proj"], "lora.target_modules", {"q_proj", "v_proj"}),
    "lora_target_parameters": (ADAPTER, ["experts.w"], "lora.target_parameters", ["experts.w"]),
    "lora_modules_to_save": (ADAPTER, ["lm_head"], "lora.modules_to_save", ["lm_head"]),
    "use_rslora": (ADAPTER, ["true"], "lora.use_rslora", True),
    "use_dora": (ADAPTER, ["true"], "lora.use_dora", True),
    "load_in_4bit": (BITS, ["true"], "bits.load_in_4bit", True),
    "load_in_8bit": (BITS, ["true", "--load_in_4bit", "false"], "bits.load_in_8bit", True),
    "bnb_4bit_quant_type": (BITS, ["fp4"], "bits.bnb_4bit_quant_type", "fp4"),
    "use_bnb_nested_quant": (BITS, ["true"], "bits.bnb_4bit_use_double_quant", True),
    "bnb_4bit_quant_storage": (BITS, ["uint8"], "bits.bnb_4bit_quant_storage.itemsize", 1),
}
# The command line, and the error.
REFUSED: list[tuple[dict[str, Any], list[str], str]] = [
    (
        {},
        ["--lora_r", "8", "--use_dora"],
        "lora_r=8, use_dora=True has no effect without an adapter: add use_peft=true",
    ),
    ({}, ["--load_in_4bit", "true"], "load_in_4bit=True: quantized weights cannot be trained: add use_peft=true"),
    ({}, ["--load_in_8bit", "true"], "load_in_8bit=True: quantized weights cannot be trained"),
    (ADAPTER, ["--use_peft", "false", "--lora_r", "8"], "lora_r=8 has no effect without an adapter"),
    (ADAPTER, ["--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type=fp4 has no effect without load_in_4bit=true"),
    (ADAPTER, ["--lora_task_type", "SEQ_CLS"], "lora_task_type=SEQ_CLS is not supported, only CAUSAL_LM"),
    (
        BITS,
        ["--load_in_8bit", "--load_in_4bit=0", "--bnb_4bit_quant_type=fp4"],
        "quant_type=fp4 has no effect without load_in",
    ),
    (BITS, ["--load_in_8bit", "true"], "load_in_8bit=True and load_in_4bit=True: choose one"),
    (ADAPTER, ["--ignore_bias_buffers", "true"], "ignore_bias_buffers=True has no effect: leave it out"),
    (ADAPTER, ["--do_predict", "true"], "do_predict=True has no effect"),
    (ADAPTER, ["--fp16", "true"], "fp16=True has no effect on a CPU: leave it out"),
    (ADAPTER, ["--model_init_kwargs", '{"dtype": "bfloat16"}'], "has dtype: set it by its own option, --dtype bf"),
]


def test_options_and_defaults_are_those_of_trl():
    """YAML files of TRL can be used; `load_in_4bit` and similar options become the same objects as in TRL."""
    for ours, theirs in ((ModelOptions, ModelConfig), (DataOptions, ScriptArguments)):
        defaults = {field.name: field.default for field in fields(ours)}
        assert {field.name: field.default for field in fields(theirs)}.items() <= defaults.items()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_peft": True, "lora_r": 8, "lora_target_modules": ["all-linear"], "use_rslora": True},
        {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"], "load_in_4bit": True},
        {"use_peft": True, "load_in_8bit": True, "lora_modules_to_save": ["lm_head"]},
        {},
    ],
)
def test_adapter_and_quantization_are_those_of_trl(settings):
    ours, theirs = ModelOptions(**settings), ModelConfig(**settings)
    for made, expected in (
        (lora_of(ours), get_peft_config(theirs)),
        (quantization_of(ours), get_quantization_config(theirs)),
    ):
        assert (made and made.to_dict()) == (expected and expected.to_dict())


def test_every_option_of_a_model_is_used_or_refused():
    assert {field.name for field in fields(ModelOptions)} == {*USED, "lora_task_type"}


@pytest.mark.parametrize("option", USED)
def test_an_option_of_a_model_has_its_effect(option, parse):
    recipe, typed, where, expected = USED[option]
    found: Any = parse(recipe, f"--{option}", *typed)
    for name in where.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == expected


@pytest.mark.parametrize(("recipe", "typed", "message"), REFUSED, ids=[" ".join(typed) for _, typed, _ in REFUSED])
def test_an_option_without_effect_is_refused(recipe, typed, message, parse):
    with pytest.raises(ValueError, match=message):
        parse(recipe, *typed)


def test_the_adapter_on_the_upper_half_of_the_layers(parse):
    """The adapter is on seven linear modules in each of the layers 15 to 29 of a model as deep as SmolLM2-135M."""
    lora = parse(ADAPTER, "--config", str(RECIPES / "dpo_lora_upper.yaml")).lora
    model = get_peft_model(tiny_model(num_hidden_layers=30), lora)
    adapted = [name.split(".layers.")[1] for name, _ in model.named_parameters() if "lora_A" in name]
    assert Counter(int(name.split(".")[0]) for name in adapted) == dict.fromkeys(range(15, 30), 7)


def test_further_arguments_of_loading_are_kept(parse):
    typed = ["--model_init_kwargs", '{"trust_remote_code": true, "num_hidden_layers": 2}', "--model_revision", "v2"]
    loading = parse({}, *typed).loading
    assert loading == {"trust_remote_code": True, "num_hidden_layers": 2, "revision": "v2", "dtype": "float32"}


# The command line, and the arguments of `datasets.load_dataset` or the rows that are read.
DATA: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dataset_name": (["other"], {"path": "other"}),
    "dataset_config": (["easy"], {"name": "easy"}),
    "dataset_streaming": (["true"], {"streaming": True}),
    "dataset_train_split": (["other"], {"train": "other"}),
    "dataset_test_split": (["held_out"], {"test": "held_out"}),
}


@pytest.mark.parametrize("option", DATA)
def test_an_option_of_the_data_has_its_effect(option, parse, monkeypatch):
    typed, expected = DATA[option]
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **others: Any) -> DatasetDict:
        asked.update(others, path=path)
        names = "train", "test", "other", "held_out"
        return DatasetDict({name: Dataset.from_dict({"from": [name]}) for name in names})

    monkeypatch.setattr("hf_prefopt.data.files.load_dataset", load_dataset)
    parsed = parse(ADAPTER, f"--{option}", *typed)
    train, test = load_pairs(parsed.recipe.data, parsed.training)
    assert test is not None
    asked.update(train=train["from"][0], test=test["from"][0])
    assert asked == {"path": "d", "name": None, "streaming": False, "train": "train", "test": "test", **expected}


FILES = ("dpo_lora.yaml", "configs/dpo.yaml", "configs/simpo.yaml", "configs/sft.yaml", "configs/cal_dpo.yaml")


@pytest.mark.parametrize("loss", ["simpo", "sft", "cal_dpo", "dpo"])
@pytest.mark.parametrize("file", FILES)
def test_another_loss_than_the_files_has_its_own_hyperparameters(file, loss, parse, capsys):
    """`--config configs/dpo.yaml --loss_type simpo` uses SimPO's β, and a message lists the dropped hyperparameters."""
    parsed = parse(ADAPTER, "--config", str(RECIPES / file), "--loss_type", loss)
    (term,) = parsed.training.build_objective().terms
    assert term.spec is get_loss(loss) and term.hyperparameters == get_loss(loss).defaults
    written = yaml.safe_load((RECIPES / file).read_text())
    is_said = f"; {loss} has its own" in capsys.readouterr().out
    assert is_said == (written["loss_type"] != [loss] and "beta" in written)


def test_hyperparameters_on_the_command_line_are_the_losses(parse):
    """If the command line names the file's loss by an alias, the hyperparameters of the file stay."""
    file = ["--config", str(RECIPES / "configs" / "dpo.yaml")]
    (term,) = parse(ADAPTER, *file, "--loss_type", "simpo", "--beta", "3.0").training.build_objective().terms
    assert term.params["beta"] == 3.0
    (term,) = parse(ADAPTER, *file, "--loss_type=sigmoid").training.build_objective().terms
    assert term.params == {"beta": 0.1, "label_smoothing": 0.0}
