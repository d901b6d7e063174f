"""Names of other libraries raise an error that says what to write instead, wherever a user can write them."""

import inspect
from dataclasses import fields

import pytest
import transformers

from hf_prefopt import PreferenceConfig
from hf_prefopt.config_names import FOREIGN_ARGUMENTS, FOREIGN_SETTINGS, as_option, as_yaml, hint_for, rewritten
from tests.trainers import make_config, make_trainer


@pytest.mark.parametrize("name", FOREIGN_SETTINGS)
def test_a_foreign_setting(name, tmp_path):
    with pytest.raises(TypeError, match=f"PreferenceConfig has no field {name}: ") as raised:
        PreferenceConfig(output_dir=str(tmp_path), **{name: 1.0})
    assert FOREIGN_SETTINGS[name] in str(raised.value)


def test_no_foreign_name_is_a_setting_or_an_argument():
    """If such a name were a setting or an argument, the table would hide it, or the entry would never be used."""
    settings = {field.name for field in fields(PreferenceConfig)}
    arguments = set(inspect.signature(transformers.Trainer.__init__).parameters)
    assert not settings & FOREIGN_SETTINGS.keys()
    assert not (settings | arguments) & FOREIGN_ARGUMENTS.keys()


@pytest.mark.parametrize(
    ("written", "settings"),
    [
        ("rpo_alpha", {"sft_weight": 0.5}),
        ("simpo_gamma", {"loss_type": "simpo", "loss_params": {"gamma": 0.5}}),
        ("tpo_l_gamma", {"loss_type": "tpo_l", "loss_params": {"gamma": 0.5}}),
        ("alpha", {"loss_type": "alphapo", "loss_params": {"alpha": 0.5}}),
        ("cpo_alpha", {"loss_type": "cpo", "loss_params": {"cpo_alpha": 0.5}}),
        ("tpo_alpha", {"loss_type": "tpo", "loss_params": {"tpo_alpha": 0.5}}),
        ("discopop_tau", {"loss_type": "discopop", "loss_params": {"discopop_tau": 0.5}}),
        ("desirable_weight", {"loss_type": "kto", "loss_params": {"desirable_weight": 1.5}}),
        ("undesirable_weight", {"loss_type": "kto", "loss_params": {"undesirable_weight": 1.5}}),
        ("gamma_beta_ratio", {"loss_type": "simpo", "loss_params": {"gamma_beta_ratio": 0.3}}),
        ("trust_remote_code", {"model_init_kwargs": {"trust_remote_code": True}}),
        ("ref_adapter_name", {"reference": "adapter:first"}),
        ("max_prompt_length", {"max_length": 64}),
        ("pref_loss", {"loss_type": "simpo"}),
        ("dpo_label_smoothing", {"label_smoothing": 0.1}),
    ],
)
def test_what_is_to_be_written_is_accepted(written, settings, tmp_path):
    """The setting that the error names exists."""
    make_config(tmp_path, **settings)
    names = {name for key, value in settings.items() for name in (key, *(value if isinstance(value, dict) else ()))}
    assert any(name in FOREIGN_SETTINGS[written] for name in names - {"loss_type"} or names)


@pytest.mark.parametrize("name", FOREIGN_ARGUMENTS)
def test_a_foreign_argument_of_the_trainer(name, tmp_path):
    with pytest.raises(TypeError, match=f"no argument {name}: use "):
        _trainer(tmp_path, **{name: "something"})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("beta", r"args=PreferenceConfig\(beta="), ("learning_rate", "PreferenceConfig"), ("rpo_alpha", "sft_weight")],
)
def test_a_setting_as_an_argument_of_the_trainer(name, hint, tmp_path):
    """TRL's first versions took settings as arguments of the trainer."""
    with pytest.raises(TypeError, match=hint):
        _trainer(tmp_path, **{name: 0.1})


def test_a_foreign_argument_of_the_card(tmp_path):
    """TRL's scripts call push_to_hub(dataset_name=...), which passes its arguments to the card."""
    with pytest.raises(TypeError, match="use dataset="):
        make_trainer(tmp_path).create_model_card(dataset_name="trl-lib/ultrafeedback_binarized")
    with pytest.raises(TypeError):
        make_trainer(tmp_path).create_model_card("a name")


def test_a_hint_is_written_where_it_is_read():
    """The fix in the error has the form for Python, for the command line or for YAML, with the user's value."""
    assert hint_for("rpo_alpha", "{}={}".format) == ": use sft_weight=..."
    assert hint_for("gamma", as_option, "0.5") == """: use --loss_params '{"gamma": 0.5}'"""
    assert hint_for("rpo_alpha", as_yaml, "1.0") == ": use sft_weight: 1.0"
    assert hint_for("beta", as_option) == ""


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("beta=-1.0 must be above 0", "--beta -1.0 must be above 0"),
        ("pass on_bad_rows='drop'.", "pass --on_bad_rows drop."),
        ("loss_type=['dpo', 'sft']: two", "--loss_type dpo sft: two"),
        ("unpair=True, or unpair=False", "--unpair true, or --unpair false"),
        ("loss_params={'simpo': {'gamma': None}}", """--loss_params '{"simpo": {"gamma": null}}'"""),
        ("output_dir='my runs' is a file", "--output_dir 'my runs' is a file"),
        ("dataset_name=a/b.jsonl: gone", "--dataset_name a/b.jsonl: gone"),
        ("other=1, args.beta=2, --beta=3", "other=1, args.beta=2, --beta=3"),
    ],
)
def test_a_setting_in_a_message_as_it_is_typed(text, typed):
    names = ("beta", "on_bad_rows", "loss_type", "unpair", "loss_params", "output_dir", "dataset_name")
    assert rewritten(text, as_option, names) == typed


def _trainer(folder, **arguments):
    from hf_prefopt import PreferenceTrainer
    from tests.tiny_models import tiny_model

    return PreferenceTrainer(tiny_model(), args=make_config(folder), **arguments)
