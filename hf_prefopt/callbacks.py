"""A callback for downstream evaluation: generate answers at every evaluation and score them.

By default, the problems are those of GSM8K, and the score is exact match. Users can pass other problems and another
scoring function. Under plain data parallelism, the problems are divided among the ranks. Sampling is not supported,
because only greedy answers are reproducible. Sharded parameters are not supported, because it is faster to evaluate the
saved model afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from hf_prefopt.evaluation.gsm8k import exact_match, load_gsm8k_problems
from hf_prefopt.generation import PictureCallback, SampleGenerationsCallback, WinRateCallback
from hf_prefopt.generation.answers import Problem, generate_answers, prompt_ids

__all__ = [
    "GenerationEvalCallback",
    "PictureCallback",
    "SampleGenerationsCallback",
    "WinRateCallback",
]


class GenerationEvalCallback(TrainerCallback):
    """A callback that logs the mean score of greedy answers and the number of problems at every evaluation.

    Example:
        ```python
        trainer.add_callback(GenerationEvalCallback(trainer, limit=50))
        ```

    Args:
        trainer: Trainer that the callback is added to. Its model generates the answers.
        problems: Rows with a column `prompt` (text or messages) or `question`. Default: GSM8K.
        score: Function `(problem, generated text) -> number`. Default: GSM8K exact match.
        name: Name of the metric, which is logged as `eval_<name>`. The number of problems is logged as
            `eval_<part of the name before the slash>/problems`.
        limit: Number of problems to use, starting with the first. Default: all.
        max_new_tokens: Maximum number of tokens per answer.
        batch_size: Number of answers per batch on each rank.
    """

    def __init__(
        self,
        trainer: Trainer,
        problems: Sequence[Problem] | None = None,
        score: Callable[[Problem, str], float] = exact_match,
        name: str = "gsm8k/exact_match",
        limit: int | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 16,
    ):
        self.trainer = trainer
        self.problems = list(load_gsm8k_problems() if problems is None else problems)[:limit]
        if not self.problems:
            raise ValueError("there is no problem to answer: pass at least one problem, and a limit of at least 1")
        self.score, self.name = score, name
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Generate and score the answers, log the result, and add it to the metrics of `trainer.evaluate()`."""
        scores = self._score_all()
        mean = sum(scores.values()) / len(scores)
        count_name = f"eval_{self.name.split('/')[0]}/problems"
        result = {f"eval_{self.name}": mean, count_name: len(scores)}
        if metrics is not None:
            metrics.update(result)
        self.trainer.log(result)

    def _score_all(self) -> dict[int, float]:
        """Return the score of every problem, keyed by its index, on every rank."""
        state = PartialState()
        # Padding repeats problems so that every rank has the same number of them. The dict removes repeated indices.
        with state.split_between_processes(list(range(len(self.problems))), apply_padding=True) as own:
            scores = self._score_own(list(own))
        return dict(gather_object(list(scores.items()))) if state.num_processes > 1 else scores

    def _score_own(self, indices: list[int]) -> dict[int, float]:
        """Return the scores of this rank's problems. Prompts are sorted by length, because this reduces padding."""
        processing_class: Any = self.trainer.processing_class
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        prompts = {index: prompt_ids(self.problems[index], tokenizer) for index in indices}
        ordered = sorted(indices, key=lambda index: -len(prompts[index]))
        scores = {}
        label = f"Generating ({self.name})"
        silent = not self.trainer.is_world_process_zero() or self.trainer.args.disable_tqdm
        with tqdm(total=len(ordered), desc=label, unit="problem", leave=False, disable=silent) as progress:
            for start in range(0, len(ordered), self.batch_size):
                batch = ordered[start : start + self.batch_size]
                answers = self._generate([prompts[index] for index in batch], tokenizer)
                scores.update({i: float(self.score(self.problems[i], a)) for i, a in zip(batch, answers, strict=True)})
                progress.update(len(batch))
        return scores

    def _generate(self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Generate greedy answers to a batch of prompts, without changing the model."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return generate_answers(model, tokenizer, prompts, settings, self.trainer.accelerator.autocast())
