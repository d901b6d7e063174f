"""Every setting is used, off or rejected: any loss accepts values that mean "off", and no other value is ignored."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import TrainingArguments

from hf_prefopt import PreferenceConfig, PreferenceTrainer, register_loss
from hf_prefopt.config_checks import READ_WITH
from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.losses.registry import _split_signature
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import examples, logged, make_config, make_trainer

RECIPES = Path(__file__).parents[1] / "recipes"
OFF = {
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "sft_weight": 0.0,
    "use_weighting": False,
    "reference_free": False,
    "humanline": False,
    "use_token_weights": False,
    "use_win_rates": False,
    "sync_ref_model": False,
    "precompute_ref_log_probs": False,
    "f_divergence_type": "reverse_kl",
    "temperature": 1.0,
    "loss_params": {},
    "label_smoothing_factor": 0.0,
}


@pytest.mark.parametrize("name", list_losses())
def test_what_is_off_goes_with_every_loss(name):
    """Each value is tested alone and with all others, also `ld_alpha=1`, and
    hyperparameters of other losses with no effect.

    EXO's target needs ε above 0, so its ε has no value for "off".
    """
    off = {key: value for key, value in OFF.items() if (name, key) != ("exo_pair", "label_smoothing")}
    plain = PreferenceConfig("unused", loss_type=name).build_objective().terms[0].params
    foreign = {key: value for key, value in OFF_PARAMETERS.items() if key not in get_loss(name).defaults}
    tried = [{key: value} for key, value in off.items()] + [off, {"ld_alpha": 1.0}, {"loss_params": foreign}]
    for settings in tried:
        (term,) = PreferenceConfig("unused", loss_type=name, **settings).build_objective().terms
        takes = "label_smoothing" in settings and "label_smoothing" in get_loss(name).defaults
        assert term.params == ({**plain, "label_smoothing": 0.0} if takes else plain)
        assert not term.modifiers and not term.reference_free


OFF_PARAMETERS = {
    "label_smoothing": 0.0,
    "gamma": 0.0,
    "cpo_alpha": 0.0,
    "tpo_alpha": 0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
}


@pytest.mark.parametrize("name", list_losses())
@pytest.mark.parametrize("parameter", ["label_smoothing", "beta"])
def test_what_a_loss_has_not_is_refused_by_name(name, parameter):
    """The error has the loss, the value and the fix."""
    if parameter in get_loss(name).defaults:
        PreferenceConfig("unused", loss_type=name, **{parameter: 0.1})
        return
    message = rf"{parameter}=0\.1 is not used by any loss: {name} takes .*; leave it out"
    with pytest.raises(ValueError, match=message):
        PreferenceConfig("unused", loss_type=name, **{parameter: 0.1})
    with pytest.raises(ValueError, match=message):
        PreferenceConfig("unused", loss_type=name, loss_params={parameter: 0.1})


def test_a_misspelt_off_value_is_no_off_value():
    with pytest.raises(ValueError, match=r"label_smothing=0\.0 is not used by any loss"):
        PreferenceConfig("unused", loss_type="hinge", loss_params={"label_smothing": 0.0})


@pytest.mark.parametrize("alpha", [1.0, 1])
def test_ld_alpha_at_one_is_dpo(alpha, tmp_path):
    """The weights of all tokens are 1: the numbers are exactly those of the plain loss."""
    losses = []
    for settings in ({}, {"ld_alpha": alpha}, {"ld_alpha": alpha, "ld_policy_only": True}):
        trainer = make_trainer(tmp_path, max_steps=2, learning_rate=1e-2, **settings)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(ValueError, match="ld_alpha=7"):
        PreferenceConfig("unused", ld_alpha=7.0)


@pytest.mark.parametrize("value", [0.3, 1e-3])
def test_the_trainers_own_smoothing_is_refused(value):
    with pytest.raises(ValueError, match=f"label_smoothing_factor={value} belongs to .* set label_smoothing"):
        PreferenceConfig("unused", label_smoothing_factor=value)


def test_a_loss_function_is_refused_with_the_way_to_give_one(tmp_path):
    arguments = {"args": make_config(tmp_path), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match=r"compute_loss_func is never called: .*@register_loss .* loss_type"):
        PreferenceTrainer(tiny_model(), compute_loss_func=lambda *_: 0.0, **arguments)
    data = examples(arguments["args"].build_objective())
    PreferenceTrainer(tiny_model(), compute_loss_func=None, train_dataset=Dataset.from_list(list(data)), **arguments)


def test_arguments_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args is a TrainingArguments: PreferenceTrainer takes a PreferenceConfig"):
        PreferenceTrainer(tiny_model(), args=TrainingArguments(str(tmp_path)), processing_class=tiny_tokenizer())


@pytest.mark.parametrize("recipe", ["dpo_lora", "dpo_full", "qlora"])
@pytest.mark.parametrize("name", list_losses())
def test_another_loss_on_a_recipes_settings_has_its_own_hyperparameters(recipe, name):
    """`--loss_type name` on the command line replaces only this line of the file."""
    of_the_file = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    loss = {key: of_the_file[key] for key in ("beta", "label_smoothing", "loss_params") if key in of_the_file}
    (term,) = PreferenceConfig("unused", **{**loss, "loss_type": [name]}).build_objective().terms
    assert term.hyperparameters == get_loss(name).defaults


@pytest.mark.parametrize("name", list_losses())
def test_a_losss_file_has_the_losss_own_hyperparameters(name):
    of_the_file = yaml.safe_load((RECIPES / "configs" / f"{name}.yaml").read_text())
    loss = {
        key: of_the_file[key] for key in ("loss_type", "beta", "label_smoothing", "loss_params") if key in of_the_file
    }
    (term,) = PreferenceConfig("unused", **loss).build_objective().terms
    assert term.spec is get_loss(name) and term.hyperparameters == get_loss(name).defaults


UNREAD = {
    "f_alpha_divergence_coef": ({}, 0.3, {"f_divergence_type": "alpha"}),
    "humanline_log_eps_p": ({}, -0.5, {"humanline": True}),
    "humanline_log_eps_r": ({}, 0.5, {"humanline": True}),
    "reference_cache_dir": ({}, "folder", {"reference": "cache"}),
    "ref_model_mixup_alpha": ({}, 0.5, {"sync_ref_model": True}),
    "ref_model_sync_steps": ({}, 7, {"sync_ref_model": True}),
    "truncation_mode": ({"max_length": None}, "keep_end", {"max_length": 64}),
    "checkpointing_keeps": ({}, "attention", {"gradient_checkpointing": True}),
    "pad_to_multiple_of": ({"layout": "shared"}, 8, {"layout": "padded"}),
}


def test_every_setting_that_is_read_with_another_is_tried():
    assert UNREAD.keys() == READ_WITH.keys()


@pytest.mark.parametrize("name", UNREAD)
def test_a_setting_without_the_one_that_it_goes_with_is_refused(name):
    """The error has the value and the setting that is missing. Together, the two are
    accepted, and so is the default alone.
    """
    without, value, with_it = UNREAD[name]
    with pytest.raises(ValueError, match=rf"{name}={value!r} is only used with .*leave {name} out"):
        PreferenceConfig("unused", **without, **{name: value})
    PreferenceConfig("unused", **without)
    assert getattr(PreferenceConfig("unused", **with_it, **{name: value}), name) == value


def test_what_says_how_to_load_a_model_needs_a_name(tmp_path):
    """These settings only apply to a policy or reference that is loaded by name, not to a model object."""
    with pytest.raises(ValueError, match=r"model_init_kwargs=\{'dtype': 'bfloat16'\} is only used when .* by name"):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="quantization_config is only used when the model is passed by name"):
        make_trainer(tmp_path, quantization_config=object())
    make_trainer(tmp_path, model_init_kwargs={})


@pytest.mark.parametrize(("setting", "value"), [("layout", "padded"), ("pad_to_multiple_of", 8)])
def test_how_batches_are_laid_out_is_a_collators_own_affair(setting, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{setting}.* has no effect, because the data_collator"):
        make_trainer(tmp_path, data_collator=lambda rows: rows, **{setting: value})


def test_a_hyperparameter_of_one_of_several_losses_is_given_to_it():
    """The example in the error message works."""
    with pytest.raises(ValueError, match=r"by loss: loss_params=\{'simpo': \{'gamma': 1\.0\}\}"):
        PreferenceConfig("unused", loss_type=["dpo", "simpo"], loss_params={"gamma": 1.0})
    PreferenceConfig("unused", loss_type=["dpo", "simpo"], loss_params={"simpo": {"gamma": 1.0}})


def misspelt(policy_chosen_logps, policy_rejected_logps, margin=None):
    return policy_chosen_logps - policy_rejected_logps


def one_letter_short(policy_chosen_logps, policy_rejected_logp=0.0):
    return policy_chosen_logps - policy_rejected_logp


def of_the_run(policy_chosen_logps, policy_rejected_logps, epochs=None):
    return policy_chosen_logps - policy_rejected_logps


def with_a_default(policy_chosen_logps, policy_rejected_logps, margins=0.0):
    return policy_chosen_logps - policy_rejected_logps - margins


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (misspelt, "margin is not an input, and its default makes it a hyperparameter: did you mean margins"),
        (one_letter_short, "policy_rejected_logp is not an input.* did you mean policy_rejected_logps"),
        (of_the_run, "epochs is not an input.* did you mean epoch"),
        (with_a_default, "margins=0.0 is an input.* make it None if the input is optional"),
    ],
)
def test_a_misspelt_input_of_a_loss_is_no_hyperparameter(function, message):
    with pytest.raises(ValueError, match=message):
        register_loss("a loss of a test")(function)
    assert "a loss of a test" not in list_losses()


def test_a_number_that_resembles_an_input_is_a_hyperparameter():
    inputs, defaults = _split_signature("a loss of a test", lambda policy_chosen_logps, margin=1.0, weight=2: None)
    assert inputs == ("policy_chosen_logps",) and defaults == {"margin": 1.0, "weight": 2}
