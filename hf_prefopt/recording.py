"""Build the record of a finished run: facts, evaluations, the tokens of a few pairs, and answers."""

import logging
import platform
import shlex
import sys
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.data.group import prompt_keys
from hf_prefopt.data.prompt_text import PromptText
from hf_prefopt.folders import name_of
from hf_prefopt.reference.choose import is_fresh_adapter
from hf_prefopt.reference.live import LiveReference, adapter_off
from hf_prefopt.reporting.answers import greedy_answers, token_texts
from hf_prefopt.reporting.card import CardFacts
from hf_prefopt.reporting.evaluated import Examples
from hf_prefopt.reporting.inspected import EVENTS
from hf_prefopt.reporting.intervals import accuracy_of
from hf_prefopt.reporting.observed import Responses, correct
from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.run_facts import untrained
from hf_prefopt.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)


class BeforeAndAfter(TrainerCallback):
    """A callback that generates greedy answers to a few prompts before and after training.

    The prompts are the first distinct prompts of the evaluation data or, without evaluation data, of the training
    data. In a run that resumes from a checkpoint, the untrained model is available only if the adapter was untrained
    when the callback was created. In this case, the model with the adapter disabled generates the answers from before
    training. In all other resumed runs, no answers are generated.

    Args:
        trainer: Trainer that the callback is added to.
        prompts: Number of prompts.
        max_new_tokens: Maximum number of tokens per answer.
        longest: Maximum number of tokens per prompt. Longer prompts are skipped.

    Attributes:
        answers: One dict per prompt, with the `prompt` and the answers `before` and `after` training; empty until
            training has ended.
    """

    def __init__(self, trainer: PreferenceTrainer, prompts: int = 3, max_new_tokens: int = 64, longest: int = 256):
        self._trainer, self._max_new_tokens = trainer, max_new_tokens
        self._prompts = _first_prompts(trainer, prompts, longest)
        self._before: list[str] = []
        self.answers: list[dict[str, str]] = []
        # If the adapter is untrained now, disabling it later restores the initial model, even after resuming.
        model = trainer.model
        self._base = adapter_off(model) if isinstance(model, PeftModel) and is_fresh_adapter(model) else None

    def on_train_begin(self, args, state, control, **_):
        """Generate the answers from before training. A checkpoint may already have been loaded."""
        self._before, self.answers = [], []
        if _is_sharded(self._trainer):
            logger.warning("no answers before and after training are generated: the engine shards the parameters")
        elif state.global_step == 0:
            self._before = self._generate()
        elif self._base is not None:
            with self._base.switch():
                self._before = self._generate()

    def on_train_end(self, args, state, control, **_):
        """Generate the answers after the last step. With `load_best_model_at_end`, the best model generates them."""
        if self._before:
            asked = map(_prompt_text(self._trainer), self._prompts)
            both = zip(asked, self._before, self._generate(), strict=True)
            self.answers = [{"prompt": prompt, "before": b, "after": a} for prompt, b, a in both]

    def _generate(self) -> list[str]:
        trainer = self._trainer
        if not self._prompts or not trainer.is_world_process_zero():
            return []
        model = trainer.accelerator.unwrap_model(trainer.model)
        autocast = trainer.accelerator.autocast()
        return greedy_answers(model, trainer.data.tokenizer, self._prompts, self._max_new_tokens, autocast)


def record_run(trainer: PreferenceTrainer, facts: CardFacts, shown_pairs: int = 4) -> RunRecord:
    """Build the record of a finished run. Call it on every rank.

    Args:
        facts: Facts of the model card.
        shown_pairs: Maximum number of pairs with the largest positive margins, and maximum number of pairs with the
            most negative margins, that are recorded with their tokens. Pairs with different prompts are preferred.
    """
    record = RunRecord(_facts(trainer, facts), [dict(log) for log in trainer.state.log_history])
    for name, dataset in _evaluation_sets(trainer).items():
        if name not in trainer.evaluated.last:
            continue
        _, examples = trainer.evaluated.last[name]
        prompts = _prompts(dataset, examples)
        for step, margins in trainer.evaluated.margins[name].items():
            if (accuracy := accuracy_of(correct(margins), prompts)) is not None:
                record.accuracies.append({"set": name, "step": step, **accuracy.as_dict()})
        record.examples += _example_lines(trainer, name, examples, prompts)
        if not record.pairs:
            record.pairs = _shown_pairs(trainer, dataset, examples, prompts, shown_pairs)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, BeforeAndAfter):
            record.answers = callback.answers
    return record


def _facts(trainer: PreferenceTrainer, facts: CardFacts) -> dict[str, Any]:
    """Return the content of the record's line of the kind "run"."""
    args, history = trainer.args, trainer.state.log_history
    runtime = next((log["train_runtime"] for log in reversed(history) if "train_runtime" in log), None)
    return {
        "name": name_of(args.output_dir),
        "base_model": facts.base_model,
        "losses": [
            {
                "name": loss.name,
                "formula": loss.formula,
                "paper": loss.paper,
                "weight": loss.weight,
                "hyperparameters": dict(loss.hyperparameters),
            }
            for loss in facts.losses
        ],
        "reference": facts.reference,
        "summary": trainer.summary.as_dict(),
        "data": dict(facts.data),
        "events": _events(trainer),
        "hyperparameters": dict(facts.hyperparameters),
        "versions": dict(facts.versions),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(trainer.args.device, args.world_size),
        "seconds": runtime,
        "steps": trainer.state.global_step,
        "warnings": [*untrained(trainer.state), *trainer.record.alarms.said],
        "sets": list(trainer.evaluated.last),
    }


def hardware(device: torch.device, processes: int) -> str:
    """Describe the hardware of the run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type.upper()} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return f"{processes} × {name}" if processes > 1 else name


def _events(trainer: PreferenceTrainer) -> list[str]:
    """Describe for each dataset how many rows were cut, dropped or changed, and why, in one text per reason."""
    datasets = {"train": trainer.train_dataset, **_evaluation_sets(trainer)}
    return [
        f"{name}: {text}: {counts[event]:,}"
        for name, dataset in datasets.items()
        if isinstance(dataset, Dataset) and (counts := trainer.data.counts.get(dataset))
        for event, text in EVENTS.items()
        if counts.get(event)
    ]


def _evaluation_sets(trainer: PreferenceTrainer) -> dict[str, Any]:
    """Return the evaluation datasets, keyed by the prefix of their metrics."""
    given = trainer.eval_dataset
    if isinstance(given, dict):
        return {f"eval_{name}": dataset for name, dataset in given.items()}
    return {} if given is None else {"eval": given}


def _prompts(dataset: Any, examples: Examples) -> np.ndarray:
    """Return a prompt id for each example, `[B]`.

    For a stream, it is the number of the example's row, because the rows of a stream cannot be read again.
    """
    if not isinstance(dataset, Dataset):
        return examples.rows
    of_row = dict(zip(dataset["row"], prompt_keys(dataset).tolist(), strict=True))
    return np.array([of_row.get(row, -1 - row) for row in examples.rows.tolist()])


def _example_lines(
    trainer: PreferenceTrainer, name: str, examples: Examples, prompts: np.ndarray
) -> list[dict[str, Any]]:
    """Return the content of the record's lines of the kind "example" for one evaluation dataset."""
    change = trainer.evaluated.change(name) or examples.responses
    first_step, first = trainer.evaluated.first[name]
    nothing = np.full(len(examples.rows), np.nan)
    before = first.margins if first_step == 0 and first is not examples else None

    def sides(seen: Responses, values: np.ndarray | None) -> np.ndarray:
        if values is None:
            return np.stack([nothing, nothing], 1)
        return np.stack([seen.side(values, seen.chosen), seen.side(values, seen.rejected)], 1)

    columns: dict[str, np.ndarray] = {
        "row": examples.rows,
        "pair": examples.pair_in_row,
        "prompt": prompts,
        "margin": _or(examples.margins, nothing),
        "margin_before": _or(before, nothing),
        "reference_margin": _or(examples.responses.reference_margins, nothing),
        "lengths": sides(change, change.lengths),
        "log_ratios": sides(change, change.log_ratios),
    }
    lists = [column.tolist() for column in columns.values()]
    return [{"set": name, **dict(zip(columns, values, strict=True))} for values in zip(*lists, strict=True)]


def _or(values: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    return other if values is None else values


def _shown_pairs(
    trainer: PreferenceTrainer, dataset: Any, examples: Examples, prompts: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """Return the pairs with the largest positive and the most negative margins, with the log-ratios of their tokens."""
    margins = examples.margins
    if margins is None or not isinstance(dataset, Dataset) or not trainer.criterion.kind.has_preferences:
        return []
    order = [place for place in np.argsort(-margins, kind="stable").tolist() if not np.isnan(margins[place])]
    right = _different([place for place in order if margins[place] > 0], prompts)[:count]
    wrong = _different([place for place in order[::-1] if margins[place] < 0], prompts)[:count]
    place_of = {row: place for place, row in enumerate(dataset["row"])}
    shown, prompt_text = [], _prompt_text(trainer)
    for place in right + wrong:
        row = dataset[place_of[examples.rows[place].item()]]
        responses = _scored_tokens(trainer, row, int(examples.pair_in_row[place]))
        if not responses:
            return []
        shown.append(
            {
                "row": int(examples.rows[place]),
                "margin": float(margins[place]),
                "is_right": bool(margins[place] > 0),
                "prompt": prompt_text(row["prompt_ids"]),
                "responses": responses,
            }
        )
    return shown


def _different(places: list[int], prompts: np.ndarray) -> list[int]:
    """Reorder indices of examples: the first index of each prompt comes before all other indices.

    Otherwise, the order does not change.
    """
    firsts = set({prompts[place].item(): place for place in reversed(places)}.values())
    return sorted(places, key=lambda place: place not in firsts)


def _scored_tokens(trainer: PreferenceTrainer, row: dict[str, Any], example: int) -> list[dict[str, Any]]:
    """Return the responses of one example of a row, each with its name and its tokens, and the log-ratio of each token.

    Return [] if there is no reference to which log-ratios can be computed.
    """
    batch = trainer.scorer.collated([row])
    with trainer.accelerator.autocast():
        policy, reference = trainer.scorer.both_scores(batch)
        reference = reference or _scores_of_base(trainer, batch)
    if reference is None:
        return []
    log_ratios = (policy.token_logps - reference.token_logps).double()
    kind, responses = trainer.criterion.kind, []
    for name in kind.rewarded:
        for number in batch[kind.responses[name]][example].reshape(-1).tolist():  # type: ignore[literal-required]
            mine = batch["response_index"] == number
            tokens = token_texts(trainer.data.tokenizer, batch["targets"][mine].tolist(), log_ratios[mine].tolist())
            responses.append({"name": name or "response", "tokens": tokens})
    return responses


def _scores_of_base(trainer: PreferenceTrainer, batch: PreferenceBatch) -> ResponseScores | None:
    """Compute the scores of the base model, which serve as a reference if the losses have none.

    Return `None` if the policy has no adapter, or if an engine shards it.
    """
    model = trainer.scorer.model
    if not isinstance(model, PeftModel) or _is_sharded(trainer):
        return None
    base: LiveReference = adapter_off(model)
    return base.score(batch)


def _first_prompts(trainer: PreferenceTrainer, count: int, longest: int) -> list[list[int]]:
    """Return the first `count` distinct prompts with at most `longest` tokens."""
    datasets = [*_evaluation_sets(trainer).values(), trainer.train_dataset]
    dataset = next((rows for rows in datasets if isinstance(rows, Dataset)), None)
    found: dict[tuple[int, ...], None] = {}
    for row in dataset.select_columns(["prompt_ids"]) if dataset is not None else ():
        if 0 < len(row["prompt_ids"]) <= longest:
            found[tuple(row["prompt_ids"])] = None
        if len(found) >= count:
            break
    return [list(prompt) for prompt in found]


def _prompt_text(trainer: PreferenceTrainer) -> PromptText:
    kwargs = cast("Mapping[str, Any] | None", trainer.args.chat_template_kwargs)  # JSON was parsed at construction
    return PromptText(trainer.data.tokenizer, kwargs)


def _is_sharded(trainer: PreferenceTrainer) -> bool:
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
