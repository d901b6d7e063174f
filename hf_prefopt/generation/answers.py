"""Generate answers to a batch of prompts. The model, the tokenizer and the random states are not changed."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_prefopt.scoring.agreement import device_of
from hf_prefopt.scoring.modes import evaluation_mode

Problem = Mapping[str, Any]


def messages_of(problem: Problem | str) -> list[dict[str, Any]]:
    """Convert a prompt to messages: a text, or a row with the column `prompt` (text or messages) or `question`."""
    if isinstance(problem, str):
        prompt: Any = problem
    else:
        prompt = problem["prompt"] if "prompt" in problem else problem["question"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def prompt_ids(problem: Problem | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the prompt as token ids. If the tokenizer has a chat template, they end with its generation prompt."""
    messages = messages_of(problem)
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pad_left(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad sequences on the left, whatever the tokenizer's padding side is.

    Returns:
        The token ids and the attention mask, `[B, T]` int64 each.
    """
    width = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return input_ids, attention_mask


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: Mapping[str, Any],
    autocast: AbstractContextManager | None = None,
) -> list[str]:
    """Generate an answer to each prompt, in one batch and in evaluation mode.

    The mode of each module, gradient checkpointing, the model's cache settings, and the random states of Python, NumPy
    and PyTorch are restored afterwards.

    Args:
        model: Model without the wrapper of a training engine, such as DDP or DeepSpeed.
        tokenizer: Tokenizer of the model.
        prompts: Token ids of each prompt.
        settings: Arguments of `generate`, such as `max_new_tokens` and `do_sample`.
        autocast: Autocast context for the forward passes. `None` adds no context.
    """
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids, attention_mask = pad_left(list(prompts), pad_id)
    device = device_of(model)
    # With PEFT, `generate` calls the inner model, but the engine's autocast wraps only the outer one.
    with torch.no_grad(), evaluation_mode(model), random_states_kept(), autocast or nullcontext():
        output = cast(Any, model).generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            use_cache=True,
            pad_token_id=pad_id,
            **settings,
        )
    return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


def generation_settings(max_new_tokens: int, temperature: float = 0.0) -> dict[str, Any]:
    """Return arguments of `generate`.

    A temperature of 0 selects greedy decoding. Any other temperature selects sampling without top-k and top-p.

    Raises:
        ValueError: If the temperature is negative or `max_new_tokens` is less than 1.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(
            f"temperature must be at least 0 and max_new_tokens at least 1, got temperature={temperature}, "
            f"max_new_tokens={max_new_tokens}"
        )
    sampled = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return {"max_new_tokens": max_new_tokens, **(sampled if temperature else {"do_sample": False})}


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
