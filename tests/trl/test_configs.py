"""The configurations of `hf_prefopt.trl`: TRL 1.16's fields and defaults, and what each field does."""

import logging
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_prefopt import PreferenceConfig
from hf_prefopt import trl as ours
from hf_prefopt.config_docs import default_of
from hf_prefopt.trl.differences import OTHER_DEFAULTS
from hf_prefopt.trl.fields import TRL_FIELDS
from tests.trl.peers import METHODS, trl_config

TRAINER = {field.name for field in fields(TrainingArguments)}


def config(method: str, folder="unused", **settings):
    return getattr(ours, f"{method}Config")(output_dir=str(folder), use_cpu=True, report_to="none", **settings)


def defaults(config_class) -> dict:
    return {field.name: default_of(field) for field in fields(config_class)}


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_trl_is_a_field_with_its_default(method):
    theirs, mine = defaults(trl_config(method)), defaults(getattr(ours, f"{method}Config"))
    assert theirs.keys() <= mine.keys()
    other = {name: (theirs[name], mine[name]) for name in theirs if mine[name] not in (theirs[name], [theirs[name]])}
    of_kto = {"train_sampling_strategy"} if method != "KTO" else set()
    assert other == {name: (trl, here) for name, (trl, here, _) in OTHER_DEFAULTS.items() if name not in of_kto}


@pytest.mark.parametrize("method", METHODS)
def test_every_field_that_is_trls_alone_has_a_meaning(method):
    """The table has an entry for each of these fields, and no others."""
    known = defaults(PreferenceConfig).keys()
    assert defaults(trl_config(method)).keys() - known <= TRL_FIELDS.keys()
    everywhere = {name for other in METHODS for name in defaults(trl_config(other))}
    assert TRL_FIELDS.keys() <= everywhere - known


@pytest.mark.parametrize("method", METHODS)
def test_all_of_trls_defaults_written_out_are_accepted(method, tmp_path, caplog):
    """A YAML file or a dumped configuration may have every key with TRL's default; no message is logged."""
    own = {name: value for name, value in defaults(trl_config(method)).items() if name not in TRAINER}
    with caplog.at_level(logging.WARNING, "hf_prefopt"):
        assert config(method, tmp_path, **own).beta == own["beta"]
    assert not caplog.records


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line(method, tmp_path):
    """Every field of TRL is an option; a list accepts a single value, too."""
    (args,) = HfArgumentParser(getattr(ours, f"{method}Config")).parse_args_into_dataclasses(
        [
            "--output_dir",
            str(tmp_path),
            "--beta",
            "0.3",
            "--trust_remote_code",
            "--loss_type",
            *config(method).loss_type,
        ]
    )
    assert args.beta == 0.3
    assert args.trust_remote_code


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("DPO", "padding_free", True),
        ("DPO", "precompute_ref_batch_size", 8),
        ("DPO", "pad_token", "<pad>"),
        ("DPO", "ref_model_sync_steps", 64),
        ("DPO", "discopop_tau", 0.2),
        ("KTO", "precompute_ref_batch_size", 8),
        ("CPO", "max_completion_length", 128),
        ("CPO", "simpo_gamma", 1.0),
        ("ORPO", "padding_value", 0),
        ("TPO", "tpo_l_gamma", 1.0),
    ],
)
def test_what_has_no_effect_is_said(method, name, value, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_prefopt"):
        config(method, tmp_path, **{name: value})
    (record,) = caplog.records
    assert f"{name}={value!r}" in record.getMessage()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("CPO", {"generate_during_eval": True}, "GenerationEvalCallback"),
        ("ORPO", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("CPO", {"alpha": 0.5}, "loss_type=simpo or alphapo"),
        ("CPO", {"loss_type": "dpo"}, "not one of sigmoid, hinge, ipo, simpo, alphapo"),
        ("KTO", {"loss_type": "bco"}, "PreferenceConfig"),
        ("DPO", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 is not used by any loss"),
        ("TPO", {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 is not used by any loss"),
        ("DPO", {"loss_type": "sft", "beta": 0.2}, "beta=0.2 is not used by any loss"),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing"),
        ("CPO", {"loss_params": {"gamma": 1.0}}, "not a field of TRL's CPOConfig"),
        ("DPO", {"loss_weights": [1.0, 2.0]}, "give one weight for each of sigmoid"),
        ("DPO", {"f_divergence_type": "js_divergence", "loss_type": "nca_pair"}, "nca_pair"),
    ],
)
def test_what_cannot_be_done_is_refused(method, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(method, tmp_path, **settings)


def test_a_field_of_an_earlier_trl(tmp_path):
    with pytest.raises(TypeError, match="DPOConfig has no field rpo_alpha: use sft_weight"):
        config("DPO", tmp_path, rpo_alpha=1.0)


@pytest.mark.parametrize(("given", "multiple"), [("auto", None), ("64", 64), ("none", None), (8, 8), (None, None)])
def test_pad_to_multiple_of(given, multiple, tmp_path):
    assert config("DPO", tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == multiple
    if isinstance(given, str):
        with pytest.raises(ValueError, match="pad_to_multiple_of"):
            PreferenceConfig(output_dir=str(tmp_path), pad_to_multiple_of=given)


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_survives_a_round_trip(method, tmp_path):
    """The dump of a configuration has TRL's values, and gives the same losses again."""
    first = config(method, tmp_path)
    (again,) = HfArgumentParser(type(first)).parse_dict(
        {name: value for name, value in first.to_dict().items() if name not in TRAINER}
        | {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    )
    assert again.losses() == first.losses()
