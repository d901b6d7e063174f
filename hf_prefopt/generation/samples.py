"""Answers of the policy beside the reference's at every evaluation, in the terminal and in the trackers."""

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
    """Shows what policy and reference answer to a few prompts, at every evaluation.

    It works in any `transformers.Trainer` of a causal language model. Under an adapter, the reference is the adapter
    switched off. The first rank generates. Training goes on as if nothing had been generated.

    Example:
        ```python
        trainer.add_callback(SampleGenerationsCallback(trainer, ["What is 12 times 12?"]))
        ```

    Args:
        trainer: the trainer that the callback is added to.
        prompts: texts, or rows with a `prompt` (text or messages).
        reference: another model to compare with; needed where the policy has no adapter, and the trainer no reference.
        max_new_tokens: tokens at most per answer.
        temperature: 0 takes the likeliest token.
        batch_size: answers generated at once.
        name: of the table in the trackers.
        console: where the table is printed; by default on standard output, and nowhere with `disable_tqdm`.

    Attributes:
        rows: the last answers: `prompt`, `reference`, `policy`.

    Raises:
        ValueError: there is no reference; when training begins: the engine shards the parameters.
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
        self._console = console or Console(quiet=trainer.args.disable_tqdm)
        self.rows: list[dict[str, str]] = []

    def on_train_begin(self, args, state, control, **_):
        """Before the first step."""
        refuse_sharded(self._trainer)

    def on_evaluate(self, args, state, control, **_):
        """Generates, prints, and writes to the trackers."""
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
    """The answers for a terminal, a row for each prompt."""
    table = Table(title=f"Answers at step {step}", title_justify="left", show_lines=True)
    for column in rows[0]:
        table.add_column(column, ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(text.strip()) for text in row.values()))
    return table
