"""Settings of the Trainer have their effect on a preference run, or raise an error; some must not change any number."""

import logging
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_prefopt import PreferenceConfig
from hf_prefopt.objective.build import build_objective
from hf_prefopt.reporting.metrics import Evaluation
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

SMALL = {"train_dataset": pairs(7), "eval_dataset": pairs(5, seed=3), "gradient_accumulation_steps": 2}
SMALL |= {"eval_strategy": "epoch", "num_train_epochs": 2}


def config(**settings):
    return PreferenceConfig("unused", **{"use_cpu": True, "bf16": False, "report_to": "none", **settings})


def run(folder, **settings):
    """Run two epochs of uneven steps with an adapter, with an evaluation after each epoch."""
    trainer = make_trainer(folder, with_lora(tiny_model()), **{**SMALL, **settings})
    trainer.train()
    return trainer


def figures(trainer):
    return [logged(trainer, name) for name in ("loss", "grad_norm", "logps/chosen", "eval_loss", "eval_logps/chosen")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return figures(run(tmp_path_factory.mktemp("plain")))


@pytest.fixture
def deterministic_kernels_off() -> Iterator[None]:
    """Disable deterministic kernels, which `full_determinism` enables for the process."""
    yield
    torch.use_deterministic_algorithms(False)


ALIKE = {
    "columns are kept": {"remove_unused_columns": False},
    "caches are emptied": {"torch_empty_cache_steps": 1},
    "memory is measured": {"skip_memory_metrics": False},
    "full determinism": {"full_determinism": True},
    "activations are watched": {"debug": "underflow_overflow"},
    "a cache of keys and values": {"use_cache": True},
    "worker processes": {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "dataloader_in_order": True,
    },
    "copies do not block": {"accelerator_config": {"non_blocking": True}},
    "every batch is synchronized": {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    "accumulation as accelerate says it": {
        "gradient_accumulation_steps": 1,
        "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}},
    },
    "labels as they are named": {"label_names": ["labels"]},
    "evaluations move to the CPU": {"eval_accumulation_steps": 1},
    "evaluations in parts": {"eval_do_concat_batches": False},
    "tokens are counted": {"include_num_input_tokens_seen": "all"},
    "a batch size that fits": {"auto_find_batch_size": True},
    "a checkpoint when told": {"enable_jit_checkpoint": True},
    "tokens on all devices": {"average_tokens_across_devices": True},
}


@pytest.mark.parametrize("settings", ALIKE.values(), ids=ALIKE)
def test_settings_that_change_no_number(settings, plain, tmp_path, deterministic_kernels_off):
    """Losses, gradients and metrics of steps and evaluations are equal, bit for bit."""
    handler = signal.getsignal(signal.SIGTERM)
    assert figures(run(tmp_path, **settings)) == plain
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.nightly
def test_a_compiled_model_trains_alike(tmp_path):
    """A step and its gradient agree. Graphs are captured and run; without fused kernels, they compute the same."""
    from torch._dynamo.utils import counters

    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "eval_strategy": "no", "layout": "padded"}
    expected = figures(run(tmp_path, **settings))
    counters.clear()
    found = figures(run(tmp_path, **settings, torch_compile=True, torch_compile_backend="eager"))
    assert counters["stats"]["unique_graphs"] > 0
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_compiled_layers_train_alike(layout, tmp_path, monkeypatch):
    """With accelerate's regional compilation, which replaces layers by compiled ones, a step and its gradient agree."""
    from torch._dynamo.utils import counters

    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "eval_strategy": "no", "layout": layout}
    expected = figures(run(tmp_path, **settings))
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    counters.clear()
    found = figures(run(tmp_path, **settings, torch_compile=True, torch_compile_backend="eager"))
    assert counters["stats"]["unique_graphs"] > 0
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "counted"), [("shared", "all"), ("padded", "all"), ("padded", "non_padding"), ("shared", "non_padding")]
)
def test_input_tokens_are_the_positions_of_the_forward(layout, counted, tmp_path):
    """In "shared", a prompt counts once; in "padded", it counts twice, and padding counts unless it is excluded."""
    rows = pairs(4)
    settings = {"layout": layout, "include_num_input_tokens_seen": counted, "per_device_train_batch_size": 1}
    trainer = make_trainer(tmp_path, train_dataset=rows, **settings)
    trainer.train()
    prompts = [len(row["prompt_ids"]) for row in rows]
    responses = [[len(ids) for ids in row["response_ids"]] for row in rows]
    copies = 1 if layout == "shared" else 2
    expected = sum(copies * p + sum(r) for p, r in zip(prompts, responses, strict=True))
    if (layout, counted) == ("padded", "all"):
        expected = sum(2 * (p + max(r)) for p, r in zip(prompts, responses, strict=True))
    assert trainer.state.num_input_tokens_seen == expected


def evaluated(folder, compute_metrics, **settings):
    model = perturbed(with_lora(tiny_model()))
    data = {"ref_model": tiny_model(), "eval_dataset": pairs(5, seed=3)}
    trainer = make_trainer(folder, model, compute_metrics=compute_metrics, **data, **settings)
    return trainer.evaluate(), trainer


def test_predictions_whole_in_parts_or_batch_by_batch(tmp_path):
    """`compute_metrics` gets the same numbers in each way, and is not called if only the loss is needed."""
    seen: dict[str, list] = {"whole": [], "parts": [], "batches": []}
    calls: list[bool] = []

    def by_batch(prediction, compute_result):
        seen["batches"].append(prediction.predictions.numpy())
        calls.append(compute_result)
        return {"batches": len(calls)}

    whole, _ = evaluated(tmp_path, lambda p: seen["whole"].append(p.predictions) or {})
    evaluated(tmp_path, lambda p: seen["parts"].extend(p.predictions) or {}, eval_do_concat_batches=False)
    metrics, _ = evaluated(tmp_path, by_batch, batch_eval_metrics=True)
    assert len(seen["parts"]) == len(seen["batches"]) == metrics["eval_batches"] == 3 and calls == [False, False, True]
    for parts in seen.values():
        assert np.array_equal(np.concatenate(parts), seen["whole"][0])
    loss_only, trainer = evaluated(tmp_path, None, prediction_loss_only=True)
    assert loss_only["eval_loss"] == metrics["eval_loss"] == whole["eval_loss"]
    assert trainer.predict(pairs(5)).predictions is None


def test_what_an_evaluation_keeps_moves_to_the_cpu(monkeypatch):
    """Results are moved after every two of five batches."""
    moved: list[int] = []
    monkeypatch.setattr("hf_prefopt.reporting.metrics._on_cpu", lambda part: moved.append(int(part["rows"][0])) or part)
    inputs = {f"{m}_{w}_logps": torch.zeros(1) for m in ("policy", "ref") for w in ("chosen", "rejected")}
    evaluation = Evaluation(build_objective(["dpo"]), steps_on_device=2)
    for row in range(5):
        evaluation.add({"rows": torch.tensor([row])}, inputs)
    assert moved == [0, 1, 0, 1, 2, 3]


def test_persistent_workers_evaluate_the_data_set_that_is_given(tmp_path):
    """Another dataset may be evaluated between two evaluations of the trainer's own set, whose workers persist."""
    own, other = pairs(5, seed=3), pairs(4, seed=9)
    losses = {}
    for workers in (0, 1):
        settings = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        settings |= {"ref_model": tiny_model(), "eval_dataset": own}
        trainer = make_trainer(tmp_path, perturbed(with_lora(tiny_model())), **settings)
        first = trainer.get_eval_dataloader()
        losses[workers] = [trainer.evaluate(data)["eval_loss"] for data in (None, other, None)]
        assert (trainer.get_eval_dataloader() is first) == (workers > 0)
    assert losses[0] == losses[1] and losses[0][0] == losses[0][2] != losses[0][1]


class MemoryRunsOut(TrainerCallback):
    """A callback that raises an out-of-memory error at a step if batches have more than two rows."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == self.step and self.trainer._train_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def run_out(folder, step=0, **settings):
    callback = MemoryRunsOut(step)
    settings = {"train_dataset": pairs(8), "train_sampling_strategy": "sequential", "logging_steps": 2, **settings}
    trainer = make_trainer(folder, with_lora(tiny_model()), callbacks=[callback], **settings)
    callback.trainer = trainer
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss", ["dpo", "bco_pair"])
@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_an_attempt_that_ran_out_of_memory_leaves_nothing_behind(loss, cached, tmp_path):
    """Neither metrics nor the state of the loss contain it: the run equals one with batches that fit."""
    settings = {"loss_type": loss}
    if cached:
        settings |= {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}
    found = run_out(tmp_path / "a", auto_find_batch_size=True, per_device_train_batch_size=4, **settings)
    fitting = run_out(tmp_path / "b", per_device_train_batch_size=found._train_batch_size, **settings)
    for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
        assert logged(found, name) == logged(fitting, name), name
    assert found.criterion.state_dict() == fitting.criterion.state_dict()


def test_steps_before_memory_ran_out_are_told(tmp_path, caplog):
    """The Trainer does not revert these steps."""
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        run_out(tmp_path / "first", auto_find_batch_size=True, per_device_train_batch_size=4)
        assert "training restarts" not in caplog.text
        run_out(tmp_path / "second", 1, auto_find_batch_size=True, per_device_train_batch_size=4)
    assert "restarts from the weights of step 1" in caplog.text


@pytest.mark.parametrize(
    ("metric", "given", "expected"),
    [
        ("loss", None, False),
        ("loss/dpo", None, False),
        ("eval_loss/sft", None, False),
        ("eval_easy_loss/sft", None, False),
        ("loss/dpo", True, True),
        ("rewards/margins", None, True),
        ("eval_easy_loss", None, False),
        ("rewards/rejected", None, False),
        ("eval_easy_logps/rejected", None, False),
        ("logps_per_token/rejected", True, True),
        ("ref_kl", False, False),
    ],
)
def test_less_of_a_loss_is_better(metric, given, expected):
    """Lower is better for a loss (one of several has a name without "loss" at its end) and for rejected responses."""
    assert config(metric_for_best_model=metric, greater_is_better=given).greater_is_better is expected


@pytest.mark.parametrize("metric", ["ref_kl", "eval_lengths/chosen", "easy_lengths/rejected"])
def test_a_metric_without_a_direction_needs_one(metric):
    with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}': set greater_is_better"):
        config(metric_for_best_model=metric)


def test_the_best_model_by_one_of_several_losses(tmp_path):
    """The learning rate ruins the policy, so the first checkpoint is the best."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "loss/sft", "loss_type": ["dpo", "sft"], "max_steps": 3, "learning_rate": 0.5}
    trainer = run(tmp_path, **settings)
    losses = logged(trainer, "eval_loss/sft")
    assert trainer.state.best_metric == min(losses) and losses.index(min(losses)) < 2


def test_a_scheduler_that_watches_a_metric_is_told_its_direction():
    watching = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=r"waits for metric_for_best_model='rewards/margins' to fall.*'mode': 'max'"):
        config(**watching, metric_for_best_model="rewards/margins")
    config(**watching)
    config(**watching, metric_for_best_model="rewards/margins", lr_scheduler_kwargs={"mode": "max"})


def test_only_training_drops_a_last_batch_that_is_not_full(tmp_path):
    """Of seven rows, two per batch, six are trained on; an evaluation counts every row, also of a small dataset."""
    trainer = make_trainer(tmp_path, **{**SMALL, "num_train_epochs": 1}, dataloader_drop_last=True)
    assert len(trainer.get_train_dataloader()) == 3 and len(trainer.get_eval_dataloader()) == 3
    assert trainer.predict(pairs(5)).predictions.shape == (5, 2)
    assert trainer.predict(pairs(1)).predictions.shape == (1, 2)
    assert trainer.args.dataloader_drop_last


def test_a_data_set_of_less_than_a_batch_that_is_dropped_is_refused(tmp_path):
    settings = {"train_dataset": pairs(3), "per_device_train_batch_size": 4, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match=r"drops all 3 rows .* has 4 rows: set dataloader_drop_last=False"):
        make_trainer(tmp_path, **settings).train()


def test_a_checkpoint_when_the_machine_is_taken_away_is_resumed(tmp_path):
    """A checkpoint is requested after step 2 of 4; the resumed run equals the
    uninterrupted one, including δ of the loss.
    """
    handler = signal.getsignal(signal.SIGTERM)
    settings = {**SMALL, "loss_type": "bco_pair", "eval_strategy": "no"}

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                (callback,) = (c for c in stopped.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
                callback.jit_manager.is_checkpoint_requested = True

    whole = make_trainer(tmp_path / "whole", with_lora(tiny_model()), **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "run", with_lora(tiny_model()), enable_jit_checkpoint=True, **settings)
    stopped.add_callback(Asks())
    stopped.train()
    signal.signal(signal.SIGTERM, handler)
    resumed = make_trainer(tmp_path / "run", with_lora(tiny_model()), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert len(logged(stopped, "loss")) < len(logged(whole, "loss")) == 4
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert resumed.criterion.state_dict() == whole.criterion.state_dict()


def test_a_resumed_run_may_begin_with_the_first_rows(tmp_path):
    """`ignore_data_skip`: a run resumes from step 1 of 6, and its next steps have
    the rows of an epoch from its start.
    """
    settings = {"train_dataset": pairs(6), "train_sampling_strategy": "sequential", "save_strategy": "steps"}
    settings |= {"save_steps": 1, "learning_rate": 0.0, "num_train_epochs": 2}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, ignore_data_skip=True, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 6
    of_the_rows = logged(whole, "logps/chosen")[:3]
    assert logged(resumed, "logps/chosen")[1:4] == of_the_rows


def rows_of_an_epoch(folder, **settings):
    loader = make_trainer(folder, train_dataset=pairs(20), **settings).get_train_dataloader()
    return [row for batch in loader for row in batch["rows"].tolist()]


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_the_order_of_the_rows_is_the_data_seeds(group_by_prompt, tmp_path):
    first, same, other = (
        rows_of_an_epoch(tmp_path, group_by_prompt=group_by_prompt, seed=seed, data_seed=data_seed)
        for seed, data_seed in ((1, 5), (2, 5), (1, 6))
    )
    assert first == same != other


def test_rows_are_drawn_in_their_order_where_that_is_asked_for(tmp_path):
    assert rows_of_an_epoch(tmp_path, train_sampling_strategy="sequential") == [*range(20)]


REFUSED = {
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, "set label_smoothing"),
    "average_tokens_across_devices": ({"average_tokens_across_devices": False}, "False has no effect.*leave it out"),
    "label_names": ({"label_names": ["chosen"]}, r"label_names=\['chosen'\] has no effect"),
    "no label_names": ({"label_names": []}, r"label_names=\[\] has no effect"),
    "bf16_full_eval": ({"bf16_full_eval": True}, "bf16_full_eval=True would round the policy's weights.*bf16=True"),
    "fp16_full_eval": ({"fp16_full_eval": True}, "fp16_full_eval=True would round the policy's weights"),
    "eval_use_gather_object": ({"eval_use_gather_object": True}, "eval_use_gather_object=True has no effect"),
    "an unknown order": ({"train_sampling_strategy": "by_length"}, "'by_length' is unknown: set one of random, "),
    "length_column_name": ({"length_column_name": "size"}, "'size' is only read with .*'group_by_length' or"),
    "prompts and lengths": (
        {"train_sampling_strategy": "batch_rebalance", "group_by_prompt": True},
        "both choose the order",
    ),
    "two orders": ({"train_sampling_strategy": "sequential", "group_by_prompt": True}, "both choose the order"),
    "losses for metrics": ({"include_for_metrics": ["loss"]}, "'loss' would repeat the mean of each batch.*eval_loss"),
    "inputs for metrics": ({"include_for_metrics": ["inputs"]}, "'inputs' would be rows of the batch layout"),
    "fp16 on a CPU": ({"fp16": True}, "fp16=True .*has no effect on a CPU"),
    "lomo, cut": ({"optim": "lomo", "max_tokens_per_batch": 99}, "optim='lomo' .*and max_tokens_per_batch=99"),
    "galore, cut": (
        {"optim": "galore_adamw_layerwise", "gradient_accumulation_steps": 2},
        "optim='galore_adamw_layerwise' .*and gradient_accumulation_steps=2",
    ),
    "optim_args": ({"optim_args": "fused=true"}, "optim_args='fused=true' is not read by optim='adamw_torch"),
    "optim_target_modules": (
        {"optim_target_modules": ["q_proj"], "optim": "sgd", "optim_args": "momentum=0.9"},
        r"optim_target_modules=\['q_proj'\] is not read by optim='sgd': leave it out, or change optim",
    ),
    "an order for batches": ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True would cut"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_without_their_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_precision_by_accelerates_launcher_is_looked_at_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION=fp16"):
        config()


def test_tensor_parallelism_is_refused():
    from accelerate.parallelism_config import ParallelismConfig

    with pytest.raises(ValueError, match=r"parallelism_config\.tp_size=2 gives several ranks the same rows"):
        config(parallelism_config=ParallelismConfig(tp_size=2))


def test_rows_of_a_stream_are_not_drawn_by_prompt(tmp_path):
    stream = pairs(4).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"group_by_prompt=True needs the prompts of all rows.*without streaming"):
        make_trainer(tmp_path, train_dataset=stream, group_by_prompt=True, max_steps=1)


def test_changed_defaults(tmp_path):
    """The defaults are those of the settings page; on a CPU without fast bf16, there is no autocast."""
    made = config(bf16=None)
    assert (made.learning_rate, made.logging_steps, made.logging_nan_inf_filter) == (1e-6, 10, False)
    assert made.bf16 == torch.cpu._is_amx_tile_supported()
    assert config(learning_rate=1e-3, logging_steps=0.5, logging_nan_inf_filter=True).logging_steps == 0.5


def test_autocast_is_in_the_forward_and_weights_stay_as_they_are(tmp_path):
    """In bf16, the losses change by rounding: 2⁻⁹ of log-probs of about 50 nats, times β."""
    trainer = run(tmp_path, bf16=True, eval_strategy="no")
    assert trainer.accelerator.native_amp and {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    plain = run(tmp_path, eval_strategy="no")
    losses, expected = logged(trainer, "loss"), logged(plain, "loss")
    assert losses != expected and losses == pytest.approx(expected, abs=0.1 * 50 * 2**-9 * 2)


def test_a_cpu_is_used_where_there_is_nothing_else_or_it_is_asked_for(monkeypatch):
    """On other machines, the Trainer would reject bf16."""
    assert config(bf16=True).device.type == "cpu"
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert config(use_cpu=False, bf16=True).use_cpu
