"""A callback that shows answers of the policy and the reference at every evaluation."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_prefopt.generation.answers import Problem, generation_settings, messages_of
from hf_prefopt.generation.partners import answers_of, policy_of, reference_of, refuse_sharded
from hf_prefopt.generation.trackers import log_table


class SampleGenerationsCallback(TrainerCallback):
    """A callback that shows answers of policy and reference at every evaluation, in the terminal and in trackers.

    The callback works in any `transformers.Trainer` of a causal language model. If the policy has an adapter, the
    reference is the model with its adapter disabled. Only the first rank generates. Training is the same as without
    the callback.

    Example:
        ```python
        trainer.add_callback(SampleGenerationsCallback(trainer, ["What is 12 times 12?"]))
        ```

    Args:
        trainer: Trainer that the callback is added to.
        prompts: Texts, or rows with a column `prompt` (text or messages).
        reference: Reference model. Required if the policy has no adapter and the trainer has no reference.
        max_new_tokens: Maximum number of tokens per answer.
        temperature: Sampling temperature; 0 selects the most likely token.
        batch_size: Number of answers per batch.
        name: Name of the table in the trackers.
        console: Console that prints the table. By default, it is printed to standard output, or not at all if the
            training arguments set `disable_tqdm`.

    Attributes:
        rows: Latest answers, as dicts with `prompt`, `reference` and `policy`.

    Raises:
        ValueError: If there is no reference or no prompt; when training begins, if the engine shards the parameters.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Problem | str],
        reference: nn.Module | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        batch_size: int = 8,
        name: str = "samples",
        console: Console | None = None,
    ):
        if not prompts:
            raise ValueError("there is no prompt to answer: pass at least one")
        reference_of(trainer, reference)
        self._trainer, self._prompts, self._given = trainer, list(prompts), reference
        self._settings, self._batch_size = generation_settings(max_new_tokens, temperature), batch_size
        self._name = name
        self._console = console or Console(quiet=bool(trainer.args.disable_tqdm))
        self.rows: list[dict[str, str]] = []

    def on_train_begin(self, args, state, control, **_):
        """Raise an error if the engine shards the parameters."""
        refuse_sharded(self._trainer)

    def on_evaluate(self, args, state, control, **_):
        """Generate the answers, print them, and log them to the trackers."""
        refuse_sharded(self._trainer)
        trainer = self._trainer
        if not trainer.is_world_process_zero():
            return
        answers = {}
        for who, partner in (("reference", reference_of(trainer, self._given)), ("policy", policy_of(trainer))):
            answers[who] = answers_of(trainer, partner, self._prompts, self._settings, self._batch_size)
        asked = [messages_of(prompt)[-1]["content"] for prompt in self._prompts]
        both = zip(asked, answers["reference"], answers["policy"], strict=True)
        self.rows = [{"prompt": prompt, "reference": r, "policy": p} for prompt, r, p in both]
        self._console.print(samples_table(self.rows, state.global_step))
        log_table(trainer, self._name, self.rows)


def samples_table(rows: list[dict[str, str]], step: int) -> Table:
    """Build the table of answers for the terminal, with a row for each prompt."""
    table = Table(title=f"Answers at step {step}", title_justify="left", show_lines=True)
    for column in rows[0]:
        table.add_column(column, ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(text.strip()) for text in row.values()))
    return table
