"""Common uses of a `Trainer` work with ours: resuming, callbacks, logging, evaluating, saving."""

import math
from types import MethodType

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

from hf_prefopt import PreferenceTrainer
from tests.data.helpers import chat_pair, text_pair
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged, make_config, make_trainer, pairs, weights

TEXTS = Dataset.from_list([text_pair(), text_pair(chosen=" Paris it is."), text_pair(rejected=" Berlin."), text_pair()])
RAW = {"train_dataset": TEXTS, "processing_class": tiny_tokenizer()}


def raw_model():
    return tiny_model(vocab_size=600)


RUNS = {
    "full": (tiny_model, {}),
    "full, attention dropout": (lambda: tiny_model(attention_dropout=0.2), {"layout": "padded"}),
    "LoRA with dropout": (lambda: with_lora(tiny_model(), lora_dropout=0.3), {}),
    "trained adapter": (lambda: perturbed(with_lora(tiny_model(), lora_dropout=0.3)), {}),
    "kto_pair, accumulated": (
        lambda: with_lora(tiny_model(), lora_dropout=0.3),
        {"loss_type": "kto_pair", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ),
}


@pytest.mark.parametrize(("make", "settings"), RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(make, settings, tmp_path):
    """A run that stops after step 2 of 6 (in the middle of an epoch) is resumed by a new trainer: losses, metrics and
    final weights are bit-equal, including dropout.
    """
    settings = {"num_train_epochs": 2, "train_dataset": pairs(6), "save_strategy": "steps", "save_steps": 2, **settings}
    whole = make_trainer(tmp_path / "whole", make(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "again", make(), **settings)
    torch.rand(100)  # another random state, so that the checkpoint must restore it
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == whole.state.global_step == 6
    for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        assert logged(resumed, name)[2:] == logged(whole, name)[2:], name
    final = weights(whole.model)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed.model).items())


class Recorder(TrainerCallback):
    def __init__(self):
        self.events, self.logs = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(sorted(name for name in metrics if "rewards" in name))


def test_callbacks_see_steps_logs_and_evaluations(tmp_path):
    """A callback gets each step, each log with its metrics, and each evaluation with its own metrics."""
    recorder = Recorder()
    settings = {"eval_dataset": pairs(3), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, callbacks=[recorder], **settings).train()
    names = [f"eval_rewards/{name}" for name in ("accuracies", "chosen", "margins", "rejected")]
    assert recorder.events == [1, 2, names]
    assert {"loss", "rewards/chosen", "rewards/margins", "logps/rejected", "learning_rate"} <= recorder.logs[0].keys()


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_compute_metrics_gets_a_score_per_response_and_which_was_chosen(loss, tmp_path):
    """Predictions `[N, 2]` are the implicit rewards, or log-probs if the loss has
    none; labels are (1, 0) in every row.
    """
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mean_chosen": prediction.predictions[:, 0].mean().item()}

    settings = {"loss_type": loss, "eval_dataset": pairs(5), "compute_metrics": compute_metrics}
    trainer = make_trainer(tmp_path, perturbed(tiny_model()), **settings)
    metrics = trainer.evaluate()
    assert seen[0].predictions.shape == seen[0].label_ids.shape == (5, 2)
    assert seen[0].label_ids.tolist() == [[1.0, 0.0]] * 5
    own = "eval_rewards/chosen" if loss == "dpo" else "eval_logps/chosen"
    assert metrics["eval_mean_chosen"] == pytest.approx(metrics[own], rel=1e-5, abs=1e-9)


def test_scores_are_preprocessed_before_compute_metrics(tmp_path):
    """`preprocess_logits_for_metrics` gets the scores and labels of each batch, as tensors; metrics of ours do not."""
    given = []

    def signs(scores, labels):
        given.append((scores, labels))
        return scores.sign()

    settings = {"ref_model": tiny_model(), "eval_dataset": pairs(5), "processing_class": tiny_tokenizer()}
    trainer = PreferenceTrainer(
        perturbed(tiny_model()),
        args=make_config(tmp_path),
        compute_metrics=lambda prediction: {"signs": prediction.predictions},
        preprocess_logits_for_metrics=signs,
        **settings,
    )
    plain = make_trainer(tmp_path, perturbed(tiny_model()), train_dataset=None, **settings)
    metrics, expected = trainer.evaluate(), plain.predict(pairs(5))
    assert [scores.shape for scores, _ in given] == [(2, 2), (2, 2), (1, 2)]
    assert torch.cat([scores for scores, _ in given]).tolist() == expected.predictions.tolist()
    assert torch.cat([labels for _, labels in given]).tolist() == expected.label_ids.tolist()
    assert (metrics["eval_signs"] == np.sign(expected.predictions)).all()
    assert metrics["eval_rewards/margins"] == expected.metrics["test_rewards/margins"]


@pytest.mark.parametrize("way", ["optimizer_cls_and_kwargs", "optimizers"])
def test_an_optimizer_of_the_users_trains(way, tmp_path):
    """Plain SGD at a constant rate, given as a class or as an object, makes the steps of `optim="sgd"`."""
    rate = {"learning_rate": 0.1, "lr_scheduler_type": "constant"}
    named = make_trainer(tmp_path, tiny_model(), optim="sgd", **rate)
    named.train()
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}), "optimizers": (optimizer, None)}
    trainer = PreferenceTrainer(
        model,
        args=make_config(tmp_path, **rate),
        train_dataset=pairs(8),
        processing_class=tiny_tokenizer(),
        **{way: given[way]},
    )
    trainer.train()
    expected = weights(named.model)
    assert logged(trainer, "loss") == logged(named, "loss")
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer.model).items())


def test_predict_gives_rewards_labels_and_metrics(tmp_path):
    prediction = make_trainer(tmp_path, train_dataset=None).predict(pairs(5))
    assert prediction.predictions.shape == prediction.label_ids.shape == (5, 2)
    assert prediction.metrics["test_rewards/accuracies"] == 0.5


def test_model_init_starts_over(tmp_path):
    """Every train() has a new policy and a new reference, so two runs of one trainer are equal."""
    trainer = make_trainer(tmp_path, model_init=lambda: with_lora(tiny_model()), max_steps=2)
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert all(torch.equal(value, first[name]) for name, value in weights(trainer.model).items())
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931472, abs=1e-6)


def test_several_evaluation_sets_by_name(tmp_path):
    """The metrics of each set are under its name, and equal those of evaluating it alone."""
    sets = {"small": pairs(3, seed=1), "large": pairs(5, seed=2)}
    trainer = make_trainer(tmp_path, perturbed(tiny_model()), ref_model=tiny_model(), eval_dataset=sets)
    together = trainer.evaluate()
    for name, data in sets.items():
        alone = trainer.evaluate(data)
        assert together[f"eval_{name}_loss"] == alone["eval_loss"]
        assert together[f"eval_{name}_rewards/margins"] == alone["eval_rewards/margins"]


def test_a_raw_data_set_can_be_evaluated_at_any_time(tmp_path):
    """Text or messages that are passed to evaluate() or predict() are prepared as at construction."""
    raw = Dataset.from_list([chat_pair(), chat_pair(chosen="It is Paris.")])
    given = make_trainer(tmp_path, raw_model(), eval_dataset=raw, **RAW).evaluate()
    later = make_trainer(tmp_path, raw_model(), **{**RAW, "train_dataset": None})
    assert later.evaluate(raw)["eval_logps/chosen"] == given["eval_logps/chosen"]
    assert later.predict(raw).metrics["test_logps/chosen"] == given["eval_logps/chosen"]


def test_tensorboard_gets_trl_names(tmp_path, monkeypatch):
    """`report_to="tensorboard"` writes train/ and eval/ curves with TRL's names."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    settings = {"report_to": "tensorboard", "eval_dataset": pairs(2), "eval_strategy": "steps", "eval_steps": 2}
    make_trainer(tmp_path, max_steps=2, **settings).train()
    events = accumulator.EventAccumulator(str(next((tmp_path / "curves").rglob("events.*")).parent))
    events.Reload()
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
    names += ["logps/chosen", "logps/rejected", "loss"]
    assert {f"{split}/{name}" for split in ("train", "eval") for name in names} <= {*events.Tags()["scalars"]}
    assert len(events.Scalars("train/rewards/margins")) == 2


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """The learning rate ruins the policy, so the first checkpoint has the best evaluation loss, and is restored."""
    settings = {"eval_dataset": pairs(4, seed=3), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "load_best_model_at_end": True, "max_steps": 3, "learning_rate": 0.5}
    trainer = make_trainer(tmp_path, with_lora(tiny_model()), **settings)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = losses.index(min(losses))
    assert best < 2
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_training_stops_early_by_a_metric_of_ours(tmp_path):
    """`metric_for_best_model` accepts the name of a reward metric."""
    settings = {"eval_dataset": pairs(2), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"}
    settings |= {"learning_rate": 0.0, "max_steps": 4, "callbacks": [EarlyStoppingCallback(1)]}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_stream_trains_for_a_number_of_steps(tmp_path):
    """The raw dataset is a stream, whose length the trainer does not know."""
    settings = {**RAW, "train_dataset": TEXTS.to_iterable_dataset()}
    trainer = make_trainer(tmp_path, raw_model(), max_steps=3, **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("adapt", [False, True], ids=["full", "lora"])
def test_what_is_saved_loads_without_us(adapt, tmp_path):
    """`save_model` writes a plain transformers model or PEFT adapter with the
    tokenizer; loading gives the same logits.
    """
    trainer = make_trainer(tmp_path, with_lora(raw_model()) if adapt else raw_model(), max_steps=2, **RAW)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    if adapt:
        loaded = PeftModel.from_pretrained(raw_model(), tmp_path / "saved")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_gradient_checkpointing_changes_no_number(tmp_path):
    """Recomputed activations are bit-equal, and so are the steps."""
    runs = []
    for settings in ({}, {"gradient_checkpointing": True}):
        trainer = make_trainer(tmp_path, with_lora(tiny_model()), max_steps=2, **settings)
        trainer.train()
        runs.append((logged(trainer, "loss"), logged(trainer, "grad_norm")))
    assert runs[0] == runs[1]


def test_worker_processes_feed_the_same_batches(tmp_path):
    """The run with data loader workers is equal."""
    runs = []
    for workers in (0, 1):
        trainer = make_trainer(tmp_path, max_steps=2, dataloader_num_workers=workers)
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[0] == runs[1]


def test_hyperparameters_are_searched(tmp_path):
    """Each trial trains a new policy at its learning rate: DPO's first loss is log 2 in both."""
    pytest.importorskip("optuna")
    rates, first_losses = [], []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs and state.global_step == 1:
                rates.append(args.learning_rate)
                first_losses.append(logs["loss"])

    settings = {"eval_dataset": pairs(2), "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, model_init=lambda: with_lora(tiny_model()), callbacks=[Watch()], **settings)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2
    )
    assert first_losses == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert len(set(rates)) == 2 and best.hyperparameters["learning_rate"] in rates


def test_a_trainer_without_a_model_is_refused(tmp_path):
    from hf_prefopt import PreferenceTrainer

    with pytest.raises(ValueError, match="no model: pass model, or model_init"):
        PreferenceTrainer()


def stand_in_for_liger(model, kernel_config):
    """Do what transformers' `apply_liger_kernel` does, which needs a GPU: replace the same functions."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    if (kernel_config or {}).get("fused_linear_cross_entropy", True):

        def forward(input_ids=None, attention_mask=None, **_):
            hidden = causal_lm.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return CausalLMOutputWithPast(logits=causal_lm.lm_head(hidden))

        causal_lm.forward = forward


def normed(self, hidden):
    """Compute the norm as Liger's function, which is bound to each instance: the formula is the same."""
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (wide * scale).to(hidden.dtype)


def gated(self, hidden):
    """Compute the gated unit with the same formula."""
    return self.down_proj(torch.nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def rotated(query, key, cos, sin, unsqueeze_dim=1):
    """Compute the rotation of queries and keys, which Liger replaces in the model's module."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turn = modeling_llama.rotate_half
    return query * cos + turn(query) * sin, key * cos + turn(key) * sin


@pytest.mark.parametrize("layout", ["shared", "around", "padded"])
@pytest.mark.parametrize("adapt", ["full", "all layers", "upper layers"])
def test_liger_kernels_leave_the_losses_as_they_are(adapt, layout, tmp_path, monkeypatch):
    """When training begins, transformers replaces norms, gated units and the rotation. This is tested with
    checkpointing, and with lower layers that run once. Without the fused head, the run equals one without Liger.
    """
    called = []

    def liger(model, kernel_config):
        stand_in_for_liger(model, kernel_config)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
        for module in model.modules():
            for part, forward in ((modeling_llama.LlamaRMSNorm, normed), (modeling_llama.LlamaMLP, gated)):
                if isinstance(module, part):
                    module.forward = MethodType(
                        lambda self, x, forward=forward: called.append(1) or forward(self, x), module
                    )

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", liger)
    losses = []
    for use_liger_kernel in (False, True):
        torch.manual_seed(0)
        model = tiny_model(num_hidden_layers=2)
        if adapt != "full":
            upper = {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}
            model = with_lora(model, **(upper if adapt == "upper layers" else {}))
        settings = {"use_liger_kernel": use_liger_kernel, "layout": layout, "gradient_checkpointing": adapt == "full"}
        trainer = make_trainer(tmp_path, model, max_steps=2, **settings)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert bool(called) == use_liger_kernel
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_forward_replaced_in_train_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, _: stand_in_for_liger(model, None))
    trainer = make_trainer(tmp_path, use_liger_kernel=True)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM does not accept scored_rows"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("bf16", "by_autocast", "casting"), [(True, True, False), (True, False, True), (False, False, True)]
)
def test_adapters_leave_their_casts_to_autocast_alone(bf16, by_autocast, casting, tmp_path, monkeypatch):
    """PEFT's casts are needed if an engine such as DeepSpeed computes in bf16 without autocast."""
    trainer = make_trainer(tmp_path, with_lora(tiny_model()), bf16=bf16, max_steps=1)
    assert trainer.accelerator.native_amp == bf16
    trainer.accelerator.native_amp = by_autocast
    seen, compute_loss = [], trainer.compute_loss

    def watched(model, *arguments, **options):
        seen.extend(m.cast_input_dtype_enabled for m in model.modules() if hasattr(m, "cast_input_dtype_enabled"))
        return compute_loss(model, *arguments, **options)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    assert set(seen) == {casting} and len(seen) > 5
