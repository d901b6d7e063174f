"""A callback that logs the win rate of the policy against the reference at every evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_prefopt.generation.answers import Problem, generation_settings, messages_of
from hf_prefopt.generation.partners import answers_of, policy_of, reference_of, refuse_sharded
from hf_prefopt.generation.trackers import log_table
from hf_prefopt.reporting.intervals import wilson_interval

Judge = Callable[[Any, str, str], float]


class WinRateCallback(TrainerCallback):
    """A callback that logs the win rate of the policy against the reference, with a 95 % interval, at every evaluation.

    The judge compares the two answers to a prompt x in both orders, so that position bias leads to a tie. The policy's
    score is w = (judge(x, policy, reference) + 1 − judge(x, reference, policy)) / 2. The win rate is the mean of w over
    the different prompts. If a prompt is repeated, its scores are averaged first, because its answers are not
    independent. The interval is the Wilson interval, with the number of different prompts as the sample size. If there
    are ties, it is wider than necessary.

    The callback works in any `transformers.Trainer` of a causal language model. With several ranks (data parallelism
    without sharded parameters), each rank answers a part of the prompts. If the policy has an adapter, the reference is
    the model with its adapter disabled.

    Logged metrics: `eval_win_rate`, `eval_win_rate/low`, `eval_win_rate/high`, `eval_win_rate/prompts`, and
    `eval_win_rate/consistent`, the share of prompts with the same verdict in both orders.

    Example:
        ```python
        def shorter(prompt, first, second):  # any Python function, for example a call of a language model
            return 0.5 if len(first) == len(second) else float(len(first) < len(second))

        trainer.add_callback(WinRateCallback(trainer, prompts, shorter))
        ```

    Args:
        trainer: Trainer that the callback is added to.
        prompts: Texts, or rows with a column `prompt` (text or messages).
        judge: Function of `(prompt, first answer, second answer)` that returns a number from 0 to 1: 1 if the first
            answer is better, 0 if the second answer is better, 0.5 for a tie. `prompt` is an element of `prompts`.
        reference: Reference model. Required if the policy has no adapter and the trainer has no reference.
        max_new_tokens: Maximum number of tokens per answer.
        temperature: Sampling temperature; 0 selects the most likely token.
        batch_size: Number of answers per batch.
        name: Name of the metric.

    Raises:
        ValueError: If there is no reference or no prompt; when training begins, if the engine shards the parameters;
            at an evaluation, if a verdict is not a number from 0 to 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Problem | str],
        judge: Judge,
        reference: nn.Module | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        batch_size: int = 16,
        name: str = "win_rate",
    ):
        if not prompts:
            raise ValueError("there is no prompt to answer: pass at least one")
        reference_of(trainer, reference)
        self._trainer, self._prompts, self._judge, self._given = trainer, list(prompts), judge, reference
        self._settings, self._batch_size = generation_settings(max_new_tokens, temperature), batch_size
        self._name = name

    def on_train_begin(self, args, state, control, **_):
        """Raise an error if the engine shards the parameters."""
        refuse_sharded(self._trainer)

    def on_evaluate(self, args, state, control, metrics=None, **_):
        """Generate and judge the answers, log the result, and add it to the metrics of `trainer.evaluate()`."""
        refuse_sharded(self._trainer)
        judged = self._judge_all()
        result = self._metrics(judged)
        if metrics is not None:
            metrics.update(result)
        self._trainer.log(result)
        rows = [{key: row[key] for key in ("prompt", "reference", "policy", "win")} for row in judged.values()]
        log_table(self._trainer, self._name, rows)

    def _metrics(self, judged: dict[int, dict[str, Any]]) -> dict[str, float]:
        by_prompt: dict[str, list[float]] = {}
        for index, row in judged.items():
            by_prompt.setdefault(str(messages_of(self._prompts[index])), []).append(row["win"])
        rate = sum(sum(wins) / len(wins) for wins in by_prompt.values()) / len(by_prompt)
        low, high = wilson_interval(rate, len(by_prompt))
        consistent = sum(row["consistent"] for row in judged.values()) / len(judged)
        found = {"": rate, "/low": low, "/high": high, "/prompts": len(by_prompt), "/consistent": consistent}
        return {f"eval_{self._name}{suffix}": value for suffix, value in found.items()}

    def _judge_all(self) -> dict[int, dict[str, Any]]:
        """Return, on every rank, the answers and the score for every prompt, keyed by the index of the prompt."""
        state = PartialState()
        # Padding repeats indices, so that all ranks have the same number of batches. The dict removes repeated indices.
        with state.split_between_processes(list(range(len(self._prompts))), apply_padding=True) as own:
            judged = self._judge_own(list(own))
        return dict(gather_object(list(judged.items()))) if state.num_processes > 1 else judged

    def _judge_own(self, indices: list[int]) -> dict[int, dict[str, Any]]:
        trainer, prompts = self._trainer, [self._prompts[index] for index in indices]
        reference, policy = (
            answers_of(trainer, partner, prompts, self._settings, self._batch_size)
            for partner in (reference_of(trainer, self._given), policy_of(trainer))
        )
        return {
            index: {
                "prompt": messages_of(prompt)[-1]["content"],
                "reference": r,
                "policy": p,
                **self._win(prompt, p, r),
            }
            for index, prompt, r, p in zip(indices, prompts, reference, policy, strict=True)
        }

    def _win(self, prompt: Problem | str, policy: str, reference: str) -> dict[str, Any]:
        """Return the policy's score w, and whether both orders agree.

        If the two answers are equal, the result is a tie, and the judge is not called.
        """
        if policy == reference:
            return {"win": 0.5, "consistent": True}
        before, after = self._verdict(prompt, policy, reference), 1 - self._verdict(prompt, reference, policy)
        return {"win": (before + after) / 2, "consistent": before == after}

    def _verdict(self, prompt: Problem | str, first: str, second: str) -> float:
        verdict = self._judge(prompt, first, second)
        if not isinstance(verdict, bool | int | float) or not 0 <= verdict <= 1:
            raise ValueError(
                f"the judge returned {verdict!r}, but must return a number from 0 to 1: 1 if the first answer is "
                "better, 0 if the second answer is better, 0.5 for a tie"
            )
        return float(verdict)
