"""A downstream check beside the loss: generate answers at every evaluation and score them.

Without further arguments it is GSM8K exact match; any problems and any scoring function may stand in. Ranks share the
problems under plain data parallelism. Left out on purpose: sampling (greedy answers need no repetition to compare), and
generation from parameters that an engine has sharded, which is slower than evaluating the saved model afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from hf_prefopt.evaluation.gsm8k import exact_match, load_gsm8k_problems
from hf_prefopt.generation import PictureCallback, SampleGenerationsCallback, WinRateCallback
from hf_prefopt.generation.answers import Problem, generate_answers, pad_left, prompt_ids

__all__ = [
    "GenerationEvalCallback",
    "PictureCallback",
    "SampleGenerationsCallback",
    "WinRateCallback",
    "pad_left",
    "prompt_ids",
]


class GenerationEvalCallback(TrainerCallback):
    """Logs the mean score of greedily generated answers as `eval_<name>`, beside their count, at every evaluation.

    Example:
        ```python
        trainer.add_callback(GenerationEvalCallback(trainer, limit=50))
        ```

    Args:
        trainer: the trainer that the callback is added to; its model generates, its `log` takes the result.
        problems: rows with a `prompt` (text or messages) or a `question`; GSM8K's by default.
        score: `(problem, generated text) -> number`; GSM8K exact match by default.
        name: the metric's name; the count goes by the part before its slash: `eval_gsm8k/problems`.
        limit: use only the first so many problems.
        max_new_tokens: tokens at most per answer.
        batch_size: answers generated at once, on each rank.
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
            raise ValueError("there is no problem to generate for: pass at least one, and a limit of at least 1")
        self.score, self.name = score, name
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Measures, logs, and adds the result to what `trainer.evaluate()` returns."""
        scores = self._score_all()
        mean = sum(scores.values()) / len(scores)
        count_name = f"eval_{self.name.split('/')[0]}/problems"
        result = {f"eval_{self.name}": mean, count_name: len(scores)}
        if metrics is not None:
            metrics.update(result)
        self.trainer.log(result)

    def _score_all(self) -> dict[int, float]:
        """The score of every problem by its index, on every rank."""
        state = PartialState()
        # Padded, so that every rank generates as many batches as the others; an index that comes twice counts once.
        with state.split_between_processes(list(range(len(self.problems))), apply_padding=True) as own:
            scores = self._score_own(list(own))
        return dict(gather_object(list(scores.items()))) if state.num_processes > 1 else scores

    def _score_own(self, indices: list[int]) -> dict[int, float]:
        """The scores of this rank's problems; longest prompts first, so that a batch's prompts are of like length."""
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
        """Greedy answers to a batch of prompts; the model is left as it was found."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return generate_answers(model, tokenizer, prompts, settings, self.trainer.accelerator.autocast())
