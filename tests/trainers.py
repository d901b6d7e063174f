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
    """Prepared random rows of the kind that an objective compares, with the further columns that it asks for."""
    rows = ROWS[objective.kind](count, seed)
    if "chosen_token_weights" in objective.inputs:
        rows = rows.map(lambda row: {"token_weights": token_weights(row["response_ids"])})
    for name in objective.inputs:
        if name in objective.kind.optional_columns:
            rows = with_column(rows, name, OPTIONAL_COLUMNS[name])
    return rows


def token_weights(responses: list[list[int]]) -> list[list[float]]:
    """A weight between ½ and 2 for each token, by its id and place."""
    return [[0.5 + (7 * place + token) % 13 / 8 for place, token in enumerate(ids)] for ids in responses]


OPTIONAL_COLUMNS = {
    "chosen_scores": lambda row: 2.0 + row % 3,
    "rejected_scores": lambda row: 0.25 + row % 2,
    "chosen_win_rates": lambda row: (3 + row % 5) / 8,
}


def with_column(rows: Dataset, name: str, value: Callable[[int], float]) -> Dataset:
    """The rows with that prepared column, a function of the row's number."""
    return rows.add_column(name, [[float(value(row))] for row in rows["row"]])


def unpaired(count: int = 8, seed: int = 0) -> Dataset:
    """The first responses of random pairs, two desirable ones and then an undesirable one, and so on."""
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
    """The first responses of random pairs, with quantiles 0, 3/8, 6/8, 1/8, …"""
    rows = unpaired(count, seed).remove_columns("labels")
    return rows.add_column("quantiles", [[3 * row % 8 / 8] for row in rows["row"]])


def lists(count: int = 8, seed: int = 0) -> Dataset:
    """Lists of 2, 3, 4, 2, … random responses, scored in [0, 1] in no order."""
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
    """Prepared random pairs as a data set."""
    return Dataset.from_list(random_rows(count, seed, longest))


def triples(count: int = 8, seed: int = 0) -> Dataset:
    """Random pairs with a third response."""
    rows = []
    for row, other in zip(random_rows(count, seed, longest=10), random_rows(count, seed + 1, longest=10), strict=True):
        responses = [*row["response_ids"], other["response_ids"][0]]
        rows.append({**row, "response_ids": responses, "scored_masks": [[1] * len(ids) for ids in responses]})
        rows[-1]["golds"] = [2]
    return Dataset.from_list(rows)


ROWS = {PAIRS: pairs, TRIPLES: triples, UNPAIRED: unpaired, SCORED: scored, LISTS: lists}


# Every step logged, nothing saved, evaluated or reported.
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
    """Quiet settings, and others in their place."""
    return PreferenceConfig(output_dir=str(folder), **{**QUIET, **settings})


def make_trainer(folder: str | Path, model: nn.Module | None = None, **settings: Any) -> PreferenceTrainer:
    """A trainer of `model` (a tiny Llama by default); what is not an argument of the trainer is a setting."""
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
    """The values of one figure over the logs of a run, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def first_batch(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    """The first training batch, as the step would get it."""
    (piece,) = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))["pieces"]
    return piece


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Methods that on a GPU wait for the device.
SYNCHRONIZING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")


def values_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """From now on, the calls by which the package's own code reads values off a tensor: the method and the module."""
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
