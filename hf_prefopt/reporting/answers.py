"""Generate greedy answers to a few prompts in one batch, and decode responses token by token."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    autocast: AbstractContextManager | None = None,
) -> list[str]:
    """Generate greedy answers in evaluation mode, and restore the mode of the model afterwards.

    If an answer has not ended after `max_new_tokens` tokens, an ellipsis is added to its text.

    Args:
        prompts: Token ids of each prompt, including the generation prompt of the chat template.
    """
    width = max(map(len, prompts))
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    was_training = model.training
    model.eval()
    try:
        with autocast or nullcontext():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
            )
    finally:
        model.train(was_training)
    stops = model.generation_config.eos_token_id
    stops = torch.tensor([] if stops is None else stops, device=output.device).reshape(-1)
    ended = torch.isin(output[:, width:], stops).any(1).tolist()
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [text if has_ended else f"{text} …" for text, has_ended in zip(texts, ended, strict=True)]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], values: Sequence[float]) -> list[list[Any]]:
    """Return a list `[text, value]` for each token, in the order of the tokens.

    If several tokens encode one character, they become one entry with the sum of their values. Each token is decoded
    together with the four preceding tokens, because its white space may depend on them.

    Args:
        values: A number for each token, such as its log-ratio.
    """
    pieces: list[list[Any]] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        before = list(ids[max(0, begin - 4) : begin])
        seen = _decode(tokenizer, before)
        text = _decode(tokenizer, [*before, *ids[begin:end]])
        # An incomplete character is decoded to the replacement character U+FFFD.
        if text.endswith("\ufffd") and end < len(ids) and end - begin < 4:
            continue
        own = text[len(seen) :] if text.startswith(seen) else _decode(tokenizer, ids[begin:end])
        pieces.append([own, float(sum(values[begin:end]))])
        begin = end
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
