"""What changes after a trainer was made acts, or is an error: settings, trained parameters, resumed adapters."""

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from hf_prefopt import PreferenceTrainer
from tests.tiny_models import tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged, make_config, make_trainer, pairs, weights


def when(event, action):
    """A callback that calls `action(args, **others)` at the first of these events."""

    class Once(TrainerCallback):
        def __init__(self):
            self.done = False

    def call(self, args, state, control, **others):
        if not self.done:
            self.done = True
            action(args, **others)

    setattr(Once, event, call)
    return Once()


class TestSettings:
    @pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_evaluate"])
    @pytest.mark.parametrize(("name", "value"), [("beta", 5.0), ("loss_type", ["ipo"])])
    def test_a_setting_that_a_callback_changes_is_refused(self, name, value, event, tmp_path):
        """It has no effect any more: before the next step, or the next batch of an evaluation."""
        callback = when(event, lambda args, **_: setattr(args, name, value))
        settings = {"eval_dataset": pairs(2), "eval_strategy": "steps", "eval_steps": 1, "callbacks": [callback]}
        trainer = make_trainer(tmp_path, max_steps=3, **settings)
        with pytest.raises(ValueError, match=f"{name}=.* was set after .* so it has no effect"):
            trainer.train()

    def test_the_trainers_own_settings_may_change(self, tmp_path):
        callback = when("on_step_end", lambda args, **_: setattr(args, "logging_steps", 2))
        make_trainer(tmp_path, max_steps=3, callbacks=[callback]).train()

    def test_an_evaluation_with_another_setting_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_dataset=pairs(2))
        trainer.evaluate()
        trainer.args.temperature = 0.5
        with pytest.raises(ValueError, match=r"temperature=0\.5 was set after"):
            trainer.evaluate()

    def test_with_model_init_the_settings_of_a_run_are_those_at_its_beginning(self, tmp_path):
        trainer = make_trainer(tmp_path, model_init=lambda: with_lora(tiny_model()), max_steps=1)
        trainer.args.beta = 0.5
        trainer.train()
        trainer.args.beta = 0.7
        with pytest.raises(ValueError, match=r"beta=0\.7 was set after"):
            trainer.evaluate(pairs(2))
        trainer.train()
        trainer.evaluate(pairs(2))


def frozen_below(**_):
    model = tiny_model().requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    return model


def layer(model):
    return (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers[0]


MODELS = {"full": (frozen_below, {}), "adapter switched off": (lambda: with_lora(tiny_model()), {})}
MODELS["adapter, copy"] = (MODELS["adapter switched off"][0], {"reference": "copy"})


class TestTrainedParameters:
    """The reference has copies of what was trained when it was made; what is unfrozen later would move with it."""

    @pytest.mark.parametrize(("make", "settings"), MODELS.values(), ids=MODELS)
    def test_layers_unfrozen_before_training(self, make, settings, tmp_path):
        trainer = make_trainer(tmp_path, make(), **settings)
        layer(trainer.model).requires_grad_(True)
        with pytest.raises(ValueError, match="were made trainable after the trainer was created"):
            trainer.train()
        assert trainer.state.global_step == 0

    @pytest.mark.parametrize(("make", "settings"), MODELS.values(), ids=MODELS)
    def test_layers_unfrozen_while_training(self, make, settings, tmp_path):
        def unfreeze(args, model, optimizer, **_):
            frozen = [p for p in layer(model).parameters() if not p.requires_grad]
            layer(model).requires_grad_(True)
            optimizer.add_param_group({"params": frozen})

        trainer = make_trainer(tmp_path, make(), callbacks=[when("on_step_end", unfreeze)], max_steps=3, **settings)
        with pytest.raises(ValueError, match="were made trainable after the trainer was created"):
            trainer.train()
        assert trainer.state.global_step == 1

    def test_a_reference_of_its_own_stays(self, tmp_path):
        trainer = make_trainer(tmp_path, frozen_below(), ref_model=tiny_model(), max_steps=1)
        layer(trainer.model).requires_grad_(True)
        trainer.train()
        assert len(logged(trainer, "loss")) == 1

    def test_parameters_that_are_frozen_later_are_no_change_of_the_reference(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_model(), max_steps=2)
        layer(trainer.model).requires_grad_(False)
        trainer.train()
        assert len(logged(trainer, "loss")) == 2


OTHER = {
    "scale": ({"lora_alpha": 64}, r"lora_alpha=8 \(now 64\)"),
    "rank-stabilized": ({"use_rslora": True}, r"use_rslora=false \(now true\)"),
    "layers": ({"target_modules": ["q_proj"]}, "target_modules="),
    "rank": ({"r": 2}, r"r=4 \(now 2\)"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with an adapter and a checkpoint after one step."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, with_lora(tiny_model()), max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder


class TestResumedAdapters:
    @pytest.mark.parametrize(("config", "said"), OTHER.values(), ids=OTHER)
    def test_another_configuration_is_refused(self, config, said, run):
        trainer = make_trainer(run, with_lora(tiny_model(), **config), max_steps=2)
        with pytest.raises(ValueError, match=f"checkpoint-1 has the adapter 'default' with .*{said}"):
            trainer.train(resume_from_checkpoint=True)

    def test_another_dropout_is_not(self, run):
        trainer = make_trainer(run, with_lora(tiny_model(), lora_dropout=0.1), max_steps=2)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2


class AddsOne(PreferenceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss + 1, outputs) if return_outputs else loss + 1


class DropsInLoss(PreferenceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class DropsInStep(PreferenceTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs)


class IgnoresUs(PreferenceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = next(iter(model.parameters())).sum()
        return (loss, {}) if return_outputs else loss


def of(trainer_class, folder, **settings):
    data = {"train_dataset": pairs(7), "eval_dataset": pairs(5, seed=3), "processing_class": tiny_tokenizer()}
    return trainer_class(tiny_model(), args=make_config(folder, **settings), **data)


class TestSubclasses:
    """What people override in a `Trainer`."""

    @pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}, {"max_tokens_per_batch": 40}])
    @pytest.mark.parametrize("trainer_class", [DropsInLoss, DropsInStep])
    def test_a_count_that_is_not_passed_on_changes_no_number(self, trainer_class, settings, tmp_path):
        runs = []
        for one in (PreferenceTrainer, trainer_class):
            trainer = of(one, tmp_path, max_steps=2, learning_rate=1e-2, **settings)
            trainer.train()
            runs.append([logged(trainer, name) for name in ("loss", "grad_norm")])
        assert runs[0] == runs[1]

    def test_what_is_added_to_the_loss_is_in_the_evaluation(self, tmp_path):
        plain, added = (of(one, tmp_path).evaluate() for one in (PreferenceTrainer, AddsOne))
        assert added["eval_loss"] == pytest.approx(plain["eval_loss"] + 1, abs=1e-6)
        assert added["eval_rewards/margins"] == plain["eval_rewards/margins"]

    def test_an_evaluation_without_our_loss_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"does not call super\(\).compute_loss"):
            of(IgnoresUs, tmp_path).evaluate()

    def test_an_optimizer_of_copies_is_refused(self, tmp_path):
        class OfCopies(PreferenceTrainer):
            def create_optimizer(self, model=None):
                copies = [parameter.detach().clone().requires_grad_() for parameter in self.model.parameters()]
                self.optimizer = torch.optim.SGD(copies, lr=0.1)
                return self.optimizer

        with pytest.raises(ValueError, match="has none of the trained parameters"):
            of(OfCopies, tmp_path).train()

    def test_accumulation_that_a_callback_changes_is_refused(self, tmp_path):
        callback = when("on_step_end", lambda args, **_: setattr(args, "gradient_accumulation_steps", 2))
        trainer = make_trainer(tmp_path, max_steps=3, callbacks=[callback])
        with pytest.raises(ValueError, match="gradient_accumulation_steps=2 was set during training"):
            trainer.train()


@pytest.mark.parametrize(
    ("make", "rate", "warns"),
    [
        (lambda: tiny_model(dtype=torch.bfloat16), 1e-6, True),
        (lambda: tiny_model(dtype=torch.bfloat16), 1e-2, False),
        (tiny_model, 1e-6, False),
        (lambda: with_lora(tiny_model(dtype=torch.bfloat16)), 1e-6, False),
    ],
    ids=["bf16", "bf16 at a large rate", "fp32", "an adapter in fp32"],
)
def test_steps_that_rounding_removes_are_told(make, rate, warns, tmp_path, caplog):
    """bf16 has 8 binary digits: a weight of 0.3 is 2⁻¹⁰ from the next, and a step of 10⁻⁶ leaves it where it is."""
    trainer = make_trainer(tmp_path, make(), learning_rate=rate, lr_scheduler_type="constant", max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    assert any("rounding removes a step" in text for text in caplog.messages) == warns
    moved = [
        (values != before[name]).float().mean() for name, values in weights(trainer.model).items() if "norm" not in name
    ]
    assert (max(moved) < 0.5) == warns
