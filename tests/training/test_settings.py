"""`hyperparameter_search` over our own settings: each trial equals a run that has its values from the start."""

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from hf_prefopt import PreferenceTrainer
from hf_prefopt.loading import load_model
from hf_prefopt.training.settings import SETTLED, own_names
from tests.quick import at_least
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import examples, logged, make_config, make_trainer, pairs

pytest.importorskip("optuna", reason="searches need optuna")

SIMPO, TWO = {"loss_type": "simpo"}, {"loss_type": ["dpo", "ipo"], "loss_weights": [1.0, 1.0]}
LD, MOVING = {"ld_alpha": 0.5}, {"sync_ref_model": True, "ref_model_sync_steps": 1}
HUMANLINE = {"humanline": True, "humanline_log_eps_p": -0.1, "humanline_log_eps_r": 0.1}
ALPHA = {"f_divergence_type": "alpha_divergence"}
# For each setting, the values of consecutive trials, and other settings of the configuration.
SEARCHES = {
    "beta": ([0.01, 1.0], {}),
    "beta, whole numbers before others": ([1, 0.5], {}),
    "beta, back to the loss's own": ([1.0, None, 0.5], {}),
    "label_smoothing": ([0.0, 0.3], {}),
    "loss_type": (["dpo", "ipo"], {}),
    "loss_type, without and with a reference": (["simpo", "dpo"], {}),
    "loss_type, several": (["dpo", ["dpo", "sft"], "hinge"], {}),
    "loss_type, with what it keeps": (["bco_pair", "beta_dpo"], {}),
    "loss_weights": ([[1.0, 0.5], [0.5, 1.0]], TWO),
    "loss_params": ([{"gamma": 0.2}, {"gamma": 1.0}, None], SIMPO),
    "sft_weight": ([0.0, 1.0], {}),
    "use_weighting": ([False, True, False], {}),
    "reference_free": ([True, False], {}),
    "temperature": ([0.5, 2.0], {}),
    "f_divergence_type": (["reverse_kl", "forward_kl"], {}),
    "f_alpha_divergence_coef": ([0.3, 0.8], ALPHA),
    "ld_alpha": ([None, 0.3, None, 1], {}),
    "ld_policy_only": ([False, True], LD),
    "humanline": ([False, True], {"reference": "adapter_off"}),
    "humanline_log_eps_p": ([-0.01, -0.5], HUMANLINE),
    "humanline_log_eps_r": ([0.01, 0.5], HUMANLINE),
    "use_token_weights": ([False, True], {"loss_type": "dpo"}),
    "use_win_rates": ([False, True, False], {"loss_type": "dpo"}),
    "reference": (["adapter_off", "copy"], {}),
    "disable_dropout": ([True, False, True], {}),
    "ref_model_mixup_alpha": ([0.1, 1.0], MOVING),
    "ref_model_sync_steps": ([1, 2], MOVING),
    "layout": (["padded", "shared"], {}),
    "group_by_prompt": ([False, True], {}),
    "max_tokens_per_batch": ([None, 20, None], {}),
    "router_aux_loss_coef": ([0.0, 2.0], {"model_init": lambda: experts()}),
    "learning_rate": ([1e-3, 1e-2], {}),
}


def model():
    """Return a model with a trained adapter, so that references differ, and with dropout."""
    return perturbed(with_lora(tiny_model(attention_dropout=0.2), lora_dropout=0.1), scale=0.05)


def experts():
    """Return a mixture of experts with a trained adapter."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return perturbed(with_lora(tiny_model("qwen3_moe", **sizes), target_modules=["q_proj", "v_proj"]), scale=0.05)


def rows():
    """Return rows with token weights and win rates, and with every prompt twice."""
    weighted = examples(make_config("unused", use_token_weights=True, use_win_rates=True).build_objective(), count=3)
    return [{**row, "row": number} for number, row in enumerate([*weighted, *weighted])]


def trainer_for(folder, **settings):
    data = Dataset.from_list(rows())
    fixed = {"num_train_epochs": 1, "learning_rate": 5e-3, "train_dataset": data, "eval_dataset": data}
    return make_trainer(folder, **{"model_init": model, **fixed, **settings})


def figures(trainer):
    """Return the losses of the steps, and the evaluation after them."""
    measured = trainer.evaluate()
    steps = [*logged(trainer, "loss"), *logged(trainer, "logps/chosen")]
    return [*steps, *(measured[name] for name in ("eval_loss", "eval_logps/chosen"))]


def search(trainer, spaces):
    """Return the losses and evaluations of consecutive trials with these settings."""
    found = []

    def objective(metrics):
        found.append(figures(trainer))
        return metrics["eval_loss"]

    trainer.hyperparameter_search(
        hp_space=lambda trial: spaces[trial.number],
        compute_objective=objective,
        n_trials=len(spaces),
        direction="minimize",
        backend="optuna",
    )
    return found


OFTEN = (
    "beta, back to the loss's own",
    "loss_type, without and with a reference",
    "loss_type, with what it keeps",
    "loss_params",
    "use_weighting",
    "reference",
    "disable_dropout",
    "ref_model_sync_steps",
    "layout",
    "max_tokens_per_batch",
)


@pytest.mark.parametrize("what", at_least(OFTEN, SEARCHES))
def test_each_trial_is_the_direct_run_with_its_value(what, tmp_path):
    """The results are bit-equal: model, data and seeds are the same, and every setting is as in a new configuration."""
    name = what.split(",")[0]
    values, beside = SEARCHES[what]
    trials = search(trainer_for(tmp_path / "search", **beside), [{name: value} for value in values])
    for value, trial in zip(values, trials, strict=True):
        direct = trainer_for(tmp_path / "direct", **{**beside, name: value})
        direct.train()
        assert trial == figures(direct), f"{name}={value!r}"
    # Every setting has an effect; those that do not change an expected value change the draws of dropout.
    assert trials[0] != trials[1]


def test_every_setting_is_searched_or_settled():
    assert {what.split(",")[0] for what in SEARCHES} - {"learning_rate"} == own_names() - set(SETTLED)


LATE = {
    "column_mapping": {"prompt": "question"},
    "remove_columns": ["margin"],
    "hub_base_model": "someone/base",
    "text_as": "messages",
    "chat_template_kwargs": {"enable_thinking": False},
    "max_length": 64,
    "truncation_mode": "keep_end",
    "on_bad_rows": "drop",
    "dataset_num_proc": 2,
    "pad_to_multiple_of": 8,
    "show_first_batch": True,
    "model_init_kwargs": {"dtype": "bfloat16"},
    "precompute_ref_log_probs": True,
    "reference_cache_dir": "elsewhere",
    "sync_ref_model": True,
    "checkpointing_keeps": "attention",
    "activation_offloading": True,
}


@pytest.mark.parametrize("name", LATE)
def test_a_setting_that_comes_too_late_is_refused(name, tmp_path):
    beside = {
        "reference_cache_dir": {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")},
        "checkpointing_keeps": {"gradient_checkpointing": True},
    }
    trainer = trainer_for(tmp_path / "run", **beside.get(name, {}))
    with pytest.raises(ValueError, match=f"{name}=.* comes too late: .* create a trainer for each value"):
        search(trainer, [{name: LATE[name]}])
    assert getattr(trainer.args, name) != LATE[name]
    # The unchanged value may be in a space.
    assert len(search(trainer, [{name: getattr(trainer.args, name), "beta": 0.5}])) == 1


def test_every_settled_setting_is_tried():
    """`unpair` is missing, because it needs another loss than the pairs of these tests."""
    assert {*LATE, "unpair"} == set(SETTLED)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"beta": -1.0}, "beta=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"loss_type": "dop"}, "there is no loss dop; did you mean dpo"),
        ({"loss_type": "sft", "beta": 0.5}, "beta=0.5 is not used by any loss"),
        ({"loss_type": "kto"}, "the train dataset holds pairs, but kto needs"),
        ({"reference": "none"}, "a loss needs a reference"),
        ({"reference": "cache"}, "precompute_ref_log_probs=True comes too late"),
        ({"unpair": True}, "unpair=True makes unpaired examples"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 belongs to the Trainer's"),
        ({"loss_params": {"gama": 1.0}}, "gama=1.0 is not used by any loss"),
    ],
)
def test_what_a_configuration_refuses_a_trial_refuses(space, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        search(trainer_for(tmp_path), [space])


def test_a_bare_hyperparameter_is_refused(tmp_path):
    """Without the error, the Trainer would only warn that it is not a setting, and run equal trials."""
    with pytest.raises(
        ValueError, match=r"gamma=0.5, which is a hyperparameter of simpo.* search over loss_params=\{'gamma'"
    ):
        search(trainer_for(tmp_path, loss_type="simpo"), [{"gamma": 0.5}])


def test_a_trial_starts_from_the_configuration_and_so_does_what_follows(tmp_path):
    """The spaces name different settings in each trial, and the Trainer does not
    reset the values of the trial before.
    """
    trainer = trainer_for(tmp_path / "search")
    trials = search(trainer, [{"loss_type": "simpo", "beta": 2.0}, {"sft_weight": 0.5}, {}])
    for settings, trial in zip([{"loss_type": "simpo", "beta": 2.0}, {"sft_weight": 0.5}, {}], trials, strict=True):
        direct = trainer_for(tmp_path / "direct", **settings)
        direct.train()
        assert trial == figures(direct)
    assert (trainer.args.loss_type, trainer.args.beta, trainer.args.sft_weight) == (["dpo"], None, 0.0)


def test_the_best_settings_set_by_hand_are_those_of_the_next_run(tmp_path):
    """transformers recommends this after a search: `setattr(trainer.args, name, value)`, then `train()`."""
    trainer = trainer_for(tmp_path / "search")
    search(trainer, [{"beta": 0.01}, {"beta": 1.0}])
    for name, value in {"beta": 0.7, "temperature": 0.5}.items():
        setattr(trainer.args, name, value)
    trainer.train()
    direct = trainer_for(tmp_path / "direct", beta=0.7, temperature=0.5)
    direct.train()
    assert figures(trainer) == figures(direct)


def test_a_space_is_asked_once(tmp_path):
    """The function of a search space may draw at random, or count its calls, so it is called once."""
    asked = []

    def space(trial):
        asked.append(trial.number)
        return {"beta": 0.1 * len(asked)}

    trainer = trainer_for(tmp_path)
    loss = {"compute_objective": lambda metrics: metrics["eval_loss"], "direction": "minimize"}
    trainer.hyperparameter_search(hp_space=space, n_trials=2, backend="optuna", **loss)
    assert asked == [0, 1]


def test_a_cache_is_of_the_trials_temperature(tmp_path):
    cached = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    trials = search(trainer_for(tmp_path / "search", **cached), [{"temperature": 0.5}, {"temperature": 2.0}])
    for temperature, trial in zip((0.5, 2.0), trials, strict=True):
        direct = trainer_for(tmp_path / "direct", temperature=temperature)
        direct.train()
        assert trial == pytest.approx(figures(direct), abs=1e-4)
    assert trials[0] != trials[1]


@pytest.mark.parametrize("arguments", [0, 1])
def test_a_model_init_of_the_trial_without_a_tokenizer(arguments, tmp_path):
    """The tokenizer is the one next to the model's weights."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    seen = []

    def of_a_trial(trial):
        seen.append(trial)
        return load_model(str(tmp_path / "base"), None)

    trainer = PreferenceTrainer(
        model_init=of_a_trial if arguments else (lambda: of_a_trial("none")),
        args=make_config(tmp_path / "run"),
        train_dataset=pairs(4),
        eval_dataset=pairs(4),
    )
    assert trainer.processing_class.name_or_path == str(tmp_path / "base")
    search(trainer, [{"beta": 0.5}])
    assert (seen[-1].number == 0) if arguments else (seen[-1] == "none")


def by_itself(trainer, spaces, **options):
    return trainer.hyperparameter_search(
        hp_space=lambda trial: spaces[trial.number], n_trials=len(spaces), backend="optuna", **options
    )


class Evaluations(TrainerCallback):
    """A callback that records the losses of each evaluation, by dataset."""

    def __init__(self):
        self.losses = []

    def on_evaluate(self, args, state, control, metrics=None, **_):
        self.losses.append({name: value for name, value in metrics.items() if name.endswith("_loss")})


def test_what_is_searched_for_by_default_is_the_loss(tmp_path):
    """By default, the Trainer would add up rewards and log-probs, and so prefer a model that has collapsed."""
    seen = Evaluations()
    trainer = trainer_for(tmp_path, callbacks=[seen])
    found = by_itself(trainer, [{"learning_rate": rate} for rate in (1e-5, 1e-2, 3.0)])
    losses = [evaluation["eval_loss"] for evaluation in seen.losses]
    assert len(set(losses)) == 3 and found.objective == min(losses)
    assert found.run_id == str(losses.index(min(losses)))


def test_of_several_evaluation_sets_it_is_the_mean_loss(tmp_path):
    sets, seen = {"a": pairs(2, seed=1), "b": pairs(2, seed=2)}, Evaluations()
    found = by_itself(trainer_for(tmp_path, eval_dataset=sets, callbacks=[seen]), [{"learning_rate": 1e-3}])
    losses = {name: value for losses in seen.losses for name, value in losses.items()}
    assert found.objective == pytest.approx((losses["eval_a_loss"] + losses["eval_b_loss"]) / 2)


def test_the_loss_is_not_maximized(tmp_path):
    with pytest.raises(ValueError, match="direction='maximize' needs compute_objective"):
        by_itself(trainer_for(tmp_path), [{"beta": 0.2}], direction="maximize")


@pytest.mark.parametrize(
    ("space", "refusal"),
    [
        ({"loss_type": ["simpo"], "gamma": 0.3}, "gamma=0.3, which is a hyperparameter of simpo"),
        ({"betaa": 0.3}, "betaa=0.3, but PreferenceConfig has no such field"),
    ],
)
def test_what_would_not_act_is_refused_in_the_first_trial(space, refusal, tmp_path):
    with pytest.raises(ValueError, match=refusal):
        by_itself(trainer_for(tmp_path), [space])


@pytest.mark.parametrize(("name", "value"), [("beta", 5.0), ("loss_type", ["ipo"]), ("temperature", 0.5)])
def test_a_setting_changed_by_hand_is_refused(name, value, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"{name}=.* was set after the trainer was created"):
        trainer.train()


def test_the_trainers_own_settings_still_act_on_the_next_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.state.global_step == 2
