"""For each field of `TrainingArguments`, this table has the test of the field, or the reason why none is needed.

A field of a new version of transformers is in neither table, and fails a test: check whether our data path, loss, step,
logs, evaluation, checkpoints or layouts change its meaning or its effect.
"""

import ast
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

TESTS = Path(__file__).parent
# Fields that some supported versions do not have.
NOT_IN_ALL = {"activation_checkpointing", "activation_checkpointing_kwargs"}
HERE, HABITS, EXACT = "test_trainer_settings.py", "test_trainer_habits.py", "test_trainer_exactness.py"
WRAPPING = "training/test_wrapping.py"
REFUSED = f"{HERE}::test_settings_without_their_effect_are_refused"
ALIKE = f"{HERE}::test_settings_that_change_no_number"
COVERED = {
    "output_dir": f"{HABITS}::test_what_is_saved_loads_without_us",
    # Batches and steps
    "per_device_train_batch_size": f"{EXACT}::test_accumulation_changes_nothing",
    "gradient_accumulation_steps": f"{EXACT}::test_accumulation_changes_nothing",
    "num_train_epochs": "test_trainer_unpaired.py::test_each_epoch_of_a_run_has_its_own_mismatches",
    "max_steps": f"{HABITS}::test_a_stream_trains_for_a_number_of_steps",
    "auto_find_batch_size": f"{HERE}::test_an_attempt_that_ran_out_of_memory_leaves_nothing_behind",
    "average_tokens_across_devices": REFUSED,
    "label_smoothing_factor": REFUSED,
    "torch_empty_cache_steps": ALIKE,
    "include_num_input_tokens_seen": f"{HERE}::test_input_tokens_are_the_positions_of_the_forward",
    "optim": REFUSED,
    "optim_args": REFUSED,
    "optim_target_modules": REFUSED,
    "learning_rate": f"{HERE}::test_changed_defaults",
    "lr_scheduler_type": f"{HERE}::test_a_scheduler_that_watches_a_metric_is_told_its_direction",
    "lr_scheduler_kwargs": f"{HERE}::test_a_scheduler_that_watches_a_metric_is_told_its_direction",
    # Precision, memory and speed
    "bf16": f"{HERE}::test_autocast_is_in_the_forward_and_weights_stay_as_they_are",
    "fp16": REFUSED,
    "bf16_full_eval": REFUSED,
    "fp16_full_eval": REFUSED,
    "use_cpu": f"{HERE}::test_a_cpu_is_used_where_there_is_nothing_else_or_it_is_asked_for",
    "full_determinism": ALIKE,
    "activation_checkpointing": f"{HABITS}::test_gradient_checkpointing_changes_no_number",
    "activation_checkpointing_kwargs": "test_trainer_layouts.py::test_activation_checkpointing_changes_nothing",
    "gradient_checkpointing": f"{HABITS}::test_gradient_checkpointing_changes_no_number",
    "gradient_checkpointing_kwargs": "test_trainer_layouts.py::test_activation_checkpointing_changes_nothing",
    "torch_compile": f"{HERE}::test_a_compiled_model_trains_alike",
    "torch_compile_backend": f"{HERE}::test_a_compiled_model_trains_alike",
    "use_liger_kernel": f"{HABITS}::test_liger_kernels_leave_the_losses_as_they_are",
    "liger_kernel_config": "test_config.py::test_liger_keeps_off_the_models_forward",
    "use_cache": ALIKE,
    "neftune_noise_alpha": "test_trainer_layouts.py::test_noise_on_embeddings_needs_the_padded_layout",
    "skip_memory_metrics": ALIKE,
    "debug": ALIKE,
    "ddp_find_unused_parameters": f"{WRAPPING}::test_ddp_looks_for_unused_parameters_where_there_may_be_some",
    "dataloader_pin_memory": "test_config.py::test_batches_are_copied_without_waiting_where_they_are_pinned",
    # Data
    "seed": f"{HABITS}::test_a_resumed_run_is_the_uninterrupted_one",
    "data_seed": f"{HERE}::test_the_order_of_the_rows_is_the_data_seeds",
    "train_sampling_strategy": f"{HERE}::test_rows_are_drawn_in_their_order_where_that_is_asked_for",
    "length_column_name": "data/test_by_length.py::test_a_column_of_lengths_is_used_or_missed",
    "label_names": REFUSED,
    "remove_unused_columns": ALIKE,
    "dataloader_drop_last": f"{HERE}::test_only_training_drops_a_last_batch_that_is_not_full",
    "dataloader_num_workers": f"{HABITS}::test_worker_processes_feed_the_same_batches",
    "dataloader_persistent_workers": f"{HERE}::test_persistent_workers_evaluate_the_data_set_that_is_given",
    "dataloader_prefetch_factor": ALIKE,
    "dataloader_in_order": ALIKE,
    "ignore_data_skip": f"{HERE}::test_a_resumed_run_may_begin_with_the_first_rows",
    # Logs
    "logging_strategy": "test_trainer_finite.py::test_a_loss_of_one_example_stops_the_run",
    "logging_steps": f"{EXACT}::test_logged_metrics_are_means_over_the_examples_since_the_last_log",
    "logging_nan_inf_filter": "test_trainer_finite.py::test_the_filter_of_the_trainer_is_off",
    "disable_tqdm": "test_console.py::test_short_progress_replaces_the_trainers_bars_where_there_are_any",
    "report_to": f"{HABITS}::test_tensorboard_gets_trl_names",
    # Evaluation
    "per_device_eval_batch_size": f"{EXACT}::test_evaluation_is_of_the_rows",
    "eval_strategy": f"{HABITS}::test_callbacks_see_steps_logs_and_evaluations",
    "eval_steps": f"{HABITS}::test_callbacks_see_steps_logs_and_evaluations",
    "eval_on_start": "test_console.py::test_a_run_is_finished_with_card_curves_and_report",
    "prediction_loss_only": f"{HERE}::test_predictions_whole_in_parts_or_batch_by_batch",
    "eval_do_concat_batches": f"{HERE}::test_predictions_whole_in_parts_or_batch_by_batch",
    "batch_eval_metrics": f"{HERE}::test_predictions_whole_in_parts_or_batch_by_batch",
    "eval_accumulation_steps": f"{HERE}::test_what_an_evaluation_keeps_moves_to_the_cpu",
    "eval_use_gather_object": REFUSED,
    "include_for_metrics": REFUSED,
    # Checkpoints
    "save_strategy": f"{HABITS}::test_a_resumed_run_is_the_uninterrupted_one",
    "save_steps": f"{HABITS}::test_a_resumed_run_is_the_uninterrupted_one",
    "save_only_model": "training/test_checkpoints.py::test_a_resumed_bco_keeps_its_delta",
    "restore_callback_states_from_checkpoint": "training/test_checkpoints.py::test_a_resumed_bco_keeps_its_delta",
    "enable_jit_checkpoint": f"{HERE}::test_a_checkpoint_when_the_machine_is_taken_away_is_resumed",
    "resume_from_checkpoint": "resume/test_spoken.py::test_the_newest_whole_checkpoint_is_taken",
    "load_best_model_at_end": f"{HABITS}::test_the_best_model_is_loaded_at_the_end",
    "metric_for_best_model": f"{HERE}::test_the_best_model_by_one_of_several_losses",
    "greater_is_better": f"{HERE}::test_less_of_a_loss_is_better",
    "push_to_hub": "e2e/test_recipes.py::test_an_adapter_is_pushed_with_its_card_and_curves",
    "hub_model_id": "e2e/test_recipes.py::test_an_adapter_is_pushed_with_its_card_and_curves",
    # Several devices
    "accelerator_config": "test_config.py::test_what_gives_ranks_other_rows_than_are_counted_is_refused",
    "parallelism_config": f"{HERE}::test_tensor_parallelism_is_refused",
    "fsdp": "distributed/test_engines.py::test_two_processes_do_what_one_does",
    "fsdp_config": "distributed/test_engines.py::test_two_processes_do_what_one_does",
    "deepspeed": "distributed/test_engines.py::test_two_processes_do_what_one_does",
    # Scripts
    "do_predict": "e2e/test_recipe_options.py::test_an_option_without_effect_is_refused",
}
# Only the Trainer and accelerate read these fields; our code has no effect on them.
THE_TRAINERS = {
    "warmup_steps": "the schedule of the learning rate",
    "weight_decay": "handed to the optimizer",
    "adam_beta1": "handed to the optimizer",
    "adam_beta2": "handed to the optimizer",
    "adam_epsilon": "handed to the optimizer",
    "max_grad_norm": "gradients are summed over a step before they are clipped",
    "tf32": "a switch of PyTorch's, also for the reference",
    "torch_compile_mode": "handed to the compiler",
    "logging_first_step": "when to log; a log has the means since the last one",
    "log_on_each_node": "which ranks log",
    "log_level": "of transformers' loggers",
    "log_level_replica": "of transformers' loggers",
    "run_name": "of the reporting integrations",
    "project": "of the reporting integrations",
    "trackio_space_id": "of the reporting integrations",
    "trackio_bucket_id": "of the reporting integrations",
    "trackio_static_space_id": "of the reporting integrations",
    "eval_delay": "when to evaluate",
    "save_on_each_node": "which ranks save; a moving reference follows it",
    "save_total_limit": "which checkpoints are deleted, whole folders",
    "hub_token": "of uploads",
    "hub_private_repo": "of uploads",
    "hub_strategy": "of uploads",
    "hub_always_push": "of uploads",
    "hub_revision": "of uploads",
    "dataloader_multiprocessing_context": "how worker processes start",
    "ddp_bucket_cap_mb": "of DDP",
    "ddp_broadcast_buffers": "of DDP",
    "ddp_static_graph": "of DDP",
    "ddp_backend": "of the process group",
    "ddp_timeout": "of the process group",
    "local_rank": "set by the launcher",
    "do_train": "for scripts; the recipes train",
    "do_eval": "for scripts; the recipes evaluate where there is a split",
}


def test_every_field_is_in_one_of_the_tables():
    known = {field.name for field in fields(TrainingArguments)}
    assert not known - {*COVERED, *THE_TRAINERS}, "new in transformers: see the docstring"
    assert not COVERED.keys() & THE_TRAINERS.keys()


def test_no_field_of_the_tables_has_gone():
    known = {field.name for field in fields(TrainingArguments)}
    assert not {*COVERED, *THE_TRAINERS} - known - NOT_IN_ALL


@cache
def names_in(file: str) -> set[str]:
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", sorted(set(COVERED.values())))
def test_the_tests_of_the_table_are_there(test):
    file, name = test.split("::")
    assert name in names_in(file)


@pytest.mark.parametrize("field", [name for name, test in COVERED.items() if test in (REFUSED, ALIKE)])
def test_a_field_of_a_table_of_cases_is_among_them(field):
    """In a test with many cases, one case sets the field."""
    cases = ast.parse((TESTS / HERE).read_text()).body
    names = {
        key.value
        for node in cases
        if isinstance(node, ast.Assign) and node.targets[0].id in ("ALIKE", "REFUSED")
        for part in ast.walk(node.value)
        if isinstance(part, ast.Dict)
        for key in part.keys
        if isinstance(key, ast.Constant)
    }
    assert field in names


@pytest.mark.parametrize(("field", "reason"), THE_TRAINERS.items(), ids=THE_TRAINERS)
def test_nothing_of_ours_reads_what_is_the_trainers(field, reason):
    """A field that our code reads by its name needs a test of ours."""
    readers = [
        path
        for path in (TESTS.parent / "hf_prefopt").rglob("*.py")
        if f"args.{field}" in path.read_text().replace(f"args.{field}_", "")
        and path.parent.name != "reporting"  # shown as information about the run
    ]
    assert reason and not readers
