"""How often a judge prefers the policy's answers to the reference's, at every evaluation."""

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
    """Logs the win rate against the reference at every evaluation: `eval_win_rate`, with a 95 % interval.

    Each pair of answers is judged in both orders, so a judge that prefers a place gives a tie:
    w = (judge(x, policy, reference) + 1 − judge(x, reference, policy)) / 2. The rate is the mean of w over prompts; of
    a prompt that comes several times, the mean counts once, because its answers are not independent. The interval is
    Wilson's with n = the number of different prompts, which is cautious where there are ties: they vary less.

    It works in any `transformers.Trainer` of a causal language model. Ranks share the prompts under plain data
    parallelism. Under an adapter, the reference is the adapter switched off.

    Logged: `eval_win_rate`, `eval_win_rate/low`, `eval_win_rate/high`, `eval_win_rate/prompts`, and
    `eval_win_rate/consistent`, the share of prompts whose verdict is the same in both orders.

    Example:
        ```python
        def shorter(prompt, first, second):  # any Python function; a language model, too
            return 0.5 if len(first) == len(second) else float(len(first) < len(second))

        trainer.add_callback(WinRateCallback(trainer, prompts, shorter))
        ```

    Args:
        trainer: the trainer that the callback is added to.
        prompts: texts, or rows with a `prompt` (text or messages).
        judge: `(prompt, first answer, second answer)` to 1 if the first is better, 0 if the second is, 0.5 for a tie,
            or a number between; the prompt is passed as it was given.
        reference: another model to compare with; needed where the policy has no adapter, and the trainer no reference.
        max_new_tokens, temperature, batch_size: as in `SampleGenerationsCallback`.
        name: of the metric.

    Raises:
        ValueError: there is no reference; when training begins: the engine shards the parameters; at an evaluation: a
            verdict is no number from 0 to 1.
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
        """Before the first step."""
        refuse_sharded(self._trainer)

    def on_evaluate(self, args, state, control, metrics=None, **_):
        """Generates, judges, logs, and adds the result to what `trainer.evaluate()` returns."""
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
        """Answers and verdict of every prompt by its index, on every rank."""
        state = PartialState()
        # Padded, so that every rank generates as many batches as the others; an index that comes twice counts once.
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
        """The policy's share of a prompt, and whether both orders say the same; equal answers are not judged."""
        if policy == reference:
            return {"win": 0.5, "consistent": True}
        before, after = self._verdict(prompt, policy, reference), 1 - self._verdict(prompt, reference, policy)
        return {"win": (before + after) / 2, "consistent": before == after}

    def _verdict(self, prompt: Problem | str, first: str, second: str) -> float:
        verdict = self._judge(prompt, first, second)
        if not isinstance(verdict, bool | int | float) or not 0 <= verdict <= 1:
            raise ValueError(
                f"the judge said {verdict!r}: 1 if the first answer is better, 0 if the second is, 0.5 for a tie"
            )
        return float(verdict)
