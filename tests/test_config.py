"""`PreferenceConfig`: each setting is used or rejected at construction, in Python, in YAML and on the command line."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

from hf_prefopt import PreferenceConfig
from hf_prefopt.config import _is_pinned
from hf_prefopt.config_docs import default_of, settings_by_group, settings_page
from hf_prefopt.losses import get_loss

ROOT = Path(__file__).parents[1]


def config(**settings):
    return PreferenceConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)


REFUSALS = {
    "an unknown loss": ({"loss_type": "simp0"}, "did you mean simpo"),
    "no loss": ({"loss_type": []}, "name at least one"),
    "a loss twice": ({"loss_type": ["dpo", "sigmoid"]}, "is listed twice"),
    "weights that do not match": ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0]}, "one weight for each of dpo"),
    "an unknown parameter": ({"loss_type": "dpo", "loss_params": {"gamma": 1.0}}, "dpo takes beta, "),
    "a parameter out of range": ({"loss_type": "simpo", "loss_params": {"gamma": -1.0}}, "gamma=-1.0 must be"),
    "two margins": (
        {"loss_type": "simpo", "loss_params": {"gamma": 1.0, "gamma_beta_ratio": 0.5}},
        "both set the margin",
    ),
    "parameters that are no mapping": ({"loss_params": [1]}, "must be a dict"),
    "beta at 0": ({"beta": 0.0}, "beta=0.0 must be"),
    "beta that no loss takes": ({"loss_type": "sft", "beta": 0.1}, "sft takes no hyperparameters"),
    "smoothing that no loss takes": ({"loss_type": "hinge", "label_smoothing": 0.1}, "not used by any loss"),
    "smoothing of one half": ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be"),
    "a negative sft_weight": ({"sft_weight": -1.0}, "sft_weight=-1.0"),
    "weighting what has no pairs": ({"loss_type": "sft", "use_weighting": True}, "sft does not compare pairs"),
    "no reference to leave out": ({"loss_type": "simpo", "reference_free": True}, "uses no reference"),
    "an unknown reference": ({"reference": "frozen"}, "reference='frozen' is not one of"),
    "an adapter without a name": ({"reference": "adapter:"}, "reference='adapter:'"),
    "an unknown truncation": ({"truncation_mode": "middle"}, "truncation_mode='middle' is not one of"),
    "an unknown layout": ({"layout": "packed"}, "layout='packed' is not one of"),
    "an unknown way with bad rows": ({"on_bad_rows": "ignore"}, "on_bad_rows='ignore' is not one of"),
    "no temperature": ({"temperature": 0.0}, "temperature=0.0"),
    "a negative temperature": ({"temperature": -1.0}, "temperature=-1.0"),
    "an infinite temperature": ({"temperature": float("inf")}, "temperature=inf"),
    "no room": ({"max_length": 1}, "max_length=1"),
    "batches cut by accelerate": ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    "a width of nothing": ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
    "a truth in quotes": ({"unpair": "false"}, "unpair='false' must be True or False, without quotes"),
    "a truth of the Trainer's in quotes": ({"bf16": "false"}, "bf16='false' must be True or False"),
    "a number in quotes": ({"beta": "0.1"}, "beta='0.1' must be a number, without quotes"),
    "a truth for a number": ({"max_length": True}, "max_length=True must be a whole number"),
    "half a step": ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps=1.5 must be a whole number"),
    "a text for a list": ({"remove_columns": "extra"}, "remove_columns='extra' must be a list of texts"),
    "one weight for all": ({"loss_weights": 1.0}, "loss_weights=1.0 must be a list of numbers"),
    "weights that are no numbers": ({"loss_weights": [float("nan")]}, "must be finite"),
    "no weight at all": ({"loss_weights": [0.0]}, "not all 0"),
    "a rate that is none": ({"learning_rate": float("nan")}, "learning_rate=nan must be at least 0"),
    "a hyperparameter in quotes": ({"loss_params": {"beta": "0.1"}}, "beta='0.1' of dpo must be a number"),
    "a hyperparameter without a default in quotes": (
        {"loss_type": "simpo", "loss_params": {"gamma": "1"}},
        "check its formula and its hyperparameters",
    ),
    "two values for one": ({"beta": 0.3, "loss_params": {"beta": 0.5}}, "beta=0.3 has no effect"),
    "a loss by two names": (
        {"loss_type": ["sigmoid", "ipo"], "loss_params": {"sigmoid": {"beta": 0.3}, "dpo": {"beta": 0.7}}},
        "names dpo twice",
    ),
    "objects to gather": ({"eval_use_gather_object": True}, "eval_use_gather_object=True has no effect"),
    "no steps": ({"max_steps": 0}, "max_steps=0 trains nothing: .*call trainer.evaluate"),
    "fewer than no steps": (
        {"max_steps": -5},
        "max_steps=-5 must be at least 1, or -1 to train for num_train_epochs=3",
    ),
    "no epochs": ({"num_train_epochs": 0}, "num_train_epochs=0 trains nothing"),
    "fewer than no epochs": ({"num_train_epochs": -1.0}, "num_train_epochs=-1.0 must be above 0, and finite"),
    "epochs without end": ({"num_train_epochs": float("inf")}, "num_train_epochs=inf must be above 0, and finite"),
    "epochs that are no number": ({"num_train_epochs": float("nan")}, "num_train_epochs=nan must be above 0"),
    "a rate that is no number": ({"learning_rate": float("nan")}, "learning_rate=nan must be at least 0"),
    "evaluations less than every step": ({"eval_steps": -5, "eval_strategy": "steps"}, "eval_steps=-5 must be at"),
    "no checkpoints to keep": ({"save_total_limit": 0}, "save_total_limit=0 must be at least 1"),
    "inputs for metrics": ({"include_for_metrics": ["inputs"]}, "'inputs' would be rows of the batch layout"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused_at_construction(settings, message):
    """Every value that could not be used raises an error before a model is loaded; the error names it."""
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_whole_numbers_and_names_in_other_forms():
    """1e3 is a whole number, a path is a text, and `loss_params` may name one loss by an alias."""
    made = config(max_steps=1e3, max_length=64.0, reference_cache_dir=Path("cache"), precompute_ref_log_probs=True)
    assert made.max_steps == 1000 and made.max_length == 64 and isinstance(made.max_length, int)
    (term,) = config(loss_type="sigmoid", loss_params={"sigmoid": {"beta": 0.3}}).build_objective().terms
    assert term.params == {"beta": 0.3}


def test_the_defaults_are_each_losses_own():
    """beta=None is the published default of the loss, and any other value is passed to the loss."""
    for name in ("dpo", "simpo", "hinge", "dpo_norm"):
        (term,) = config(loss_type=name).build_objective().terms
        assert "beta" not in term.params and "beta" in get_loss(name).defaults
        (term,) = config(loss_type=name, beta=0.33).build_objective().terms
        assert term.params["beta"] == 0.33


FULL = {
    "loss_type": ["simpo", "sft"],
    "loss_weights": [1.0, 0.5],
    "loss_params": {"simpo": {"gamma": 0.7}},
    "beta": 1.5,
    "reference": "auto",
    "max_length": 77,
    "temperature": 0.9,
    "model_init_kwargs": {"dtype": "bfloat16"},
    "learning_rate": 3e-5,
}


def test_a_dict_and_back():
    """to_dict() is valid JSON, and its settings give an equal configuration."""
    first = config(**FULL)
    stored = json.loads(json.dumps(first.to_dict()))
    assert {name: stored[name] for name in FULL} == FULL
    again = config(**{name: stored[name] for name in FULL})
    assert again.to_dict() | {"logging_dir": None} == first.to_dict() | {"logging_dir": None}
    json.loads(first.to_json_string())


def test_the_command_line():
    """HfArgumentParser reads lists separated by spaces, and loss_params and model_init_kwargs as JSON."""
    line = ["--output_dir", "unused", "--use_cpu", "true", "--report_to", "none", "--loss_type", "simpo", "sft"]
    line += ["--loss_weights", "1.0", "0.5", "--loss_params", '{"simpo": {"gamma": 0.7}}', "--beta", "1.5"]
    line += ["--max_length", "77", "--temperature", "0.9", "--model_init_kwargs", '{"dtype": "bfloat16"}']
    (parsed,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses([*line, "--learning_rate", "3e-5"])
    assert {name: getattr(parsed, name) for name in FULL} == FULL


def test_flat_parameters_on_the_command_line():
    """With one loss, its parameters need no loss name."""
    line = ["--output_dir", "unused", "--use_cpu", "true", "--loss_type", "simpo", "--loss_params", '{"gamma": 0.7}']
    (parsed,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses(line)
    (term,) = parsed.build_objective().terms
    assert term.params == {"gamma": 0.7}


@pytest.mark.parametrize("overridden", [False, True])
def test_yaml_by_trl_parser(overridden, tmp_path):
    """A YAML file gives the same settings as Python; the command line overrides the file."""
    trl = pytest.importorskip("trl")
    text = """
        output_dir: unused
        use_cpu: true
        report_to: none
        loss_type: [simpo, sft]
        loss_weights: [1.0, 0.5]
        loss_params: {simpo: {gamma: 0.7}}
        beta: 1.5
        max_length: 77
        temperature: 0.9
        model_init_kwargs: {dtype: bfloat16}
        learning_rate: 3.0e-5
    """
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(line.strip() for line in text.strip().splitlines()))
    extra = ["--max_length", "99", "--loss_params", '{"simpo": {"gamma": 0.1}}'] if overridden else []
    (parsed,) = trl.TrlParser([PreferenceConfig]).parse_args_and_config(["--config", str(file), *extra])
    changed = {"max_length": 99, "loss_params": {"simpo": {"gamma": 0.1}}} if overridden else {}
    assert {name: getattr(parsed, name) for name in FULL} == FULL | changed


def test_one_name_is_a_list_of_one():
    """A YAML scalar and a Python string are the same as a list with one entry."""
    assert config(loss_type="ipo").loss_type == ["ipo"]


def test_each_setting_is_documented_once_and_everywhere():
    """`--help`, the docstring and docs/settings.md contain the help text of each field."""
    own = {name for name in PreferenceConfig.__annotations__ if not name.startswith("_")}
    listed = {field.name: field for group in settings_by_group(PreferenceConfig).values() for field in group}
    assert listed.keys() == own
    docstring = " ".join(PreferenceConfig.__doc__.split())
    for name, field in listed.items():
        assert len(field.metadata["help"]) > 10
        assert f"{name}: {field.metadata['help']} Default: {default_of(field)!r}." in docstring
    assert settings_page(PreferenceConfig) == (ROOT / "docs" / "settings.md").read_text(), "run: make docs"


def test_the_import_is_light():
    """In a new interpreter, `import hf_prefopt` imports neither trl nor matplotlib nor tensorboard."""
    heavy = "trl", "matplotlib", "tensorboard", "deepspeed", "wandb"
    code = f"import sys, hf_prefopt; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_import_is_quiet():
    """Importing prints nothing: no messages of libraries about the machine, also if
    DeepSpeed is imported afterwards.
    """
    code = "import hf_prefopt, deepspeed, bitsandbytes, logging; logging.getLogger('DeepSpeed').warning('heard')"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    heard = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    assert len(heard) == 1 and heard[0].endswith("heard")


def test_sequence_parallelism_is_refused(tmp_path):
    """With sequence parallelism, a rank has a part of a row, but scored tokens are
    located by their position in the whole row.
    """
    from accelerate.parallelism_config import ParallelismConfig

    with pytest.raises(ValueError, match="sp_size or cp_size above 1"):
        PreferenceConfig(str(tmp_path), parallelism_config=ParallelismConfig(cp_size=2))


@pytest.mark.parametrize(
    ("setting", "cure"), [({"split_batches": True}, "by the 2 ranks"), ({"even_batches": False}, "leave it out")]
)
def test_what_gives_ranks_other_rows_than_are_counted_is_refused(setting, cure, tmp_path, monkeypatch):
    """With several ranks, settings that change which rows a rank gets raise an error; one rank always gets all rows."""
    settings = {"output_dir": str(tmp_path), "accelerator_config": setting}
    assert PreferenceConfig(**settings).accelerator_config is not None
    monkeypatch.setattr(PreferenceConfig, "world_size", 2)
    with pytest.raises(ValueError, match=f"accelerator_config.{next(iter(setting))}=.*{cure}"):
        PreferenceConfig(**settings)


def test_liger_keeps_off_the_models_forward(tmp_path):
    """Liger's fused head is disabled whatever else is selected, also in JSON; selecting it raises an error."""
    off = {"fused_linear_cross_entropy": False}
    assert PreferenceConfig(str(tmp_path)).liger_kernel_config is None
    assert PreferenceConfig(str(tmp_path), use_liger_kernel=True).liger_kernel_config == off
    for chosen in ({"rope": False}, '{"rope": false}', {"rope": False, **off}):
        config = PreferenceConfig(str(tmp_path), use_liger_kernel=True, liger_kernel_config=chosen)
        assert config.liger_kernel_config == {"rope": False, **off}
    with pytest.raises(ValueError, match=r"'fused_linear_cross_entropy': True.*leave it out"):
        PreferenceConfig(str(tmp_path), use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


@pytest.mark.parametrize("has_gpu", [True, False])
def test_batches_are_copied_without_waiting_where_they_are_pinned(has_gpu, monkeypatch, tmp_path):
    """The user can change this; a run on the CPU of a machine with a GPU does not use it."""
    monkeypatch.setattr("hf_prefopt.config._is_pinned", lambda args: has_gpu)
    of_user = {"use_seedable_sampler": False}
    for given, expected in ((None, has_gpu), (of_user, has_gpu), ({"non_blocking": False}, False)):
        config = PreferenceConfig(str(tmp_path), use_cpu=True, accelerator_config=given)
        assert config.accelerator_config.non_blocking == expected
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pinned = {
        (pin, cpu): _is_pinned(SimpleNamespace(dataloader_pin_memory=pin, use_cpu=cpu))
        for pin, cpu in itertools.product((True, False), repeat=2)
    }
    assert pinned == {(True, False): True, (True, True): False, (False, False): False, (False, True): False}
