"""A small trainer for tests: prepared random pairs, a tiny model, quiet settings on the CPU in fp32."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_prefopt import PreferenceConfig, PreferenceTrainer
from hf_prefopt.kinds import LISTS, PAIRS, SCORED, TRIPLES, UNPAIRED
from hf_prefopt.objective.objective import Objective
from tests.tiny_models import random_rows, tiny_model
from tests.tokenizers import tiny_tokenizer


def examples(objective: Objective, count: int = 8, seed: int = 0) -> Dataset:
    """Return prepared random rows of the kind that an objective compares, with the optional columns that it needs."""
    rows = ROWS[objective.kind](count, seed)
    if "chosen_token_weights" in objective.inputs:
        rows = rows.map(lambda row: {"token_weights": token_weights(row["response_ids"])})
    for name in objective.inputs:
        if name in objective.kind.optional_columns:
            rows = with_column(rows, name, OPTIONAL_COLUMNS[name])
    return rows


def token_weights(responses: list[list[int]]) -> list[list[float]]:
    """Return a weight between ½ and 2 for each token, depending on its id and position."""
    return [[0.5 + (7 * place + token) % 13 / 8 for place, token in enumerate(ids)] for ids in responses]


OPTIONAL_COLUMNS = {
    "chosen_scores": lambda row: 2.0 + row % 3,
    "rejected_scores": lambda row: 0.25 + row % 2,
    "chosen_win_rates": lambda row: (3 + row % 5) / 8,
}


def with_column(rows: Dataset, name: str, value: Callable[[int], float]) -> Dataset:
    """Return the rows with a prepared column, computed from the number of the row."""
    return rows.add_column(name, [[float(value(row))] for row in rows["row"]])


def unpaired(count: int = 8, seed: int = 0) -> Dataset:
    """Return the first responses of random pairs: two desirable ones, then an undesirable one, and so on."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "response_ids": row["response_ids"][:1],
                "scored_masks": row["scored_masks"][:1],
                "labels": [row["row"] % 3 < 2],
                "row": row["row"],
            }
            for row in random_rows(count, seed, longest=10)
        ]
    )


def scored(count: int = 8, seed: int = 0) -> Dataset:
    """Return the first responses of random pairs, with quantiles 0, 3/8, 6/8, 1/8, …"""
    rows = unpaired(count, seed).remove_columns("labels")
    return rows.add_column("quantiles", [[3 * row % 8 / 8] for row in rows["row"]])


def lists(count: int = 8, seed: int = 0) -> Dataset:
    """Return lists of 2, 3, 4, 2, … random responses, with scores in [0, 1] in random order."""
    rows = []
    for number, row in enumerate(random_rows(count, seed, longest=10)):
        extra = [ids for other in random_rows(2, 100 + number, longest=10) for ids in other["response_ids"]]
        responses = [*row["response_ids"], *extra][: number % 3 + 2]
        scores = [(7 * k + 3 * number) % 10 / 10 for k in range(len(responses))]
        rows.append(
            {
                "prompt_ids": row["prompt_ids"],
                "response_ids": responses,
                "scored_masks": [[1] * len(ids) for ids in responses],
                "ranks": [1.0 + sum(other > score for other in scores) for score in scores],
                "scores": scores,
                "row": number,
            }
        )
    return Dataset.from_list(rows)


def pairs(count: int = 8, seed: int = 0, longest: int = 10) -> Dataset:
    """Return prepared random pairs as a dataset."""
    return Dataset.from_list(random_rows(count, seed, longest))


def triples(count: int = 8, seed: int = 0) -> Dataset:
    """Return random pairs with a third response."""
    rows = []
    for row, other in zip(random_rows(count, seed, longest=10), random_rows(count, seed + 1, longest=10), strict=True):
        responses = [*row["response_ids"], other["response_ids"][0]]
        rows.append({**row, "response_ids": responses, "scored_masks": [[1] * len(ids) for ids in responses]})
        rows[-1]["golds"] = [2]
    return Dataset.from_list(rows)


ROWS = {PAIRS: pairs, TRIPLES: triples, UNPAIRED: unpaired, SCORED: scored, LISTS: lists}


# Every step is logged; nothing is saved, evaluated or reported.
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
}


def make_config(folder: str | Path, **settings: Any) -> PreferenceConfig:
    """Return these settings, with changes."""
    return PreferenceConfig(output_dir=str(folder), **{**QUIET, **settings})


def make_trainer(folder: str | Path, model: nn.Module | None = None, **settings: Any) -> PreferenceTrainer:
    """Return a trainer of `model` (a tiny Llama by default); other options than the
    trainer's arguments are settings.
    """
    given = {
        name: settings.pop(name)
        for name in (
            "ref_model",
            "data_collator",
            "train_dataset",
            "eval_dataset",
            "processing_class",
            "peft_config",
            "quantization_config",
            "model_init",
            "compute_metrics",
            "callbacks",
        )
        if name in settings
    }
    if model is None and "model_init" not in given:
        model = tiny_model()
    config = make_config(folder, **settings)
    given = {"train_dataset": examples(config.build_objective()), "processing_class": tiny_tokenizer(), **given}
    return PreferenceTrainer(model, args=config, **given)


def logged(trainer: PreferenceTrainer, name: str) -> list[float]:
    """Return the values of a metric in the logs of a run, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def first_batch(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    """Return the first training batch, as the step gets it."""
    (piece,) = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))["pieces"]
    return piece


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter, keyed by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Methods that wait for the device on a GPU.
SYNCHRONIZING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")


def values_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record from now on the calls with which the package's own code reads values
    from a tensor: the method and the module.
    """
    seen = []

    def watched(name, method):
        def call(tensor, *args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("hf_prefopt"):
                seen.append((name, caller))
            return method(tensor, *args, **kwargs)

        return call

    for name in SYNCHRONIZING:
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    return seen
