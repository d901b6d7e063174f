"""Conversations with a trained model and with its base model. Each of them sees only its own earlier answers."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from hf_prefopt.loading import (
    holds_adapter,
    load_adapter,
    load_checkpoint,
    load_model,
    processing_class_of,
    tokenizer_of,
)
from hf_prefopt.scoring.modes import ModuleTree, adapters_off

Messages = list[dict[str, str]]


@dataclass
class Speaker:
    """The base model or the trained model, with its conversation.

    Attributes:
        name: "base" or "trained".
        model: Model in evaluation mode.
        acting: Function that returns a context manager, within which answers are generated. If the model has an adapter
            and this is the base model, the context manager disables the adapter.
        messages: Messages of the conversation so far.
    """

    name: str
    model: nn.Module
    acting: Callable[[], AbstractContextManager] = nullcontext
    messages: Messages = field(default_factory=list)


class _Parts(TextStreamer):
    """A streamer that calls the function `show` with each new part of an answer during generation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def _missing(folder: Path) -> str:
    """Return the reason why a folder does not hold a model, or "" if it holds one."""
    if not folder.exists():
        return "there is no such folder, and it is not on the Hub or the Hub cannot be reached"
    has_model = any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
    return "" if has_model else "no config.json in it: name the output_dir of a run, or the folder of a model"


def load_speakers(
    run: str, base: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[list[Speaker], PreTrainedTokenizerBase]:
    """Load the trained model, its base model and the tokenizer.

    If `run` is an adapter, both speakers share one model, and the base speaker disables the adapter. If `run` is a full
    model, the base model is `base` or the one that the model card names. If neither is known, only the trained model is
    returned.

    Args:
        run: Folder or Hub name of the trained model or adapter.
        base: Folder or Hub name of the base model. Default: the one that the adapter or the model card names.
        dtype: Dtype of the models.
        trust_remote_code: Whether to run code from the models' repositories.

    Raises:
        ValueError: If a model cannot be loaded.
    """
    kwargs = {"dtype": dtype, **({"trust_remote_code": True} if trust_remote_code else {})}
    try:
        if holds_adapter(run):
            policy = load_adapter(load_checkpoint(base, kwargs)[0], run) if base else load_model(run, kwargs)
            tree = ModuleTree(_on_device(policy))
            speakers = [Speaker("base", policy, partial(adapters_off, tree)), Speaker("trained", policy)]
        else:
            trained = _on_device(load_checkpoint(run, kwargs)[0])
            base = base or _base_in_card(run)
            untrained = [_on_device(load_checkpoint(base, kwargs)[0])] if base else []
            speakers = [*(Speaker("base", model) for model in untrained), Speaker("trained", trained)]
        loaded = processing_class_of(run, kwargs, base)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _missing(Path(run)):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{run} cannot be loaded: {_missing(Path(run)) or reason}") from error
    return speakers, tokenizer_of(loaded)


def _on_device(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _base_in_card(run: str) -> str | None:
    card = Path(run, "README.md")
    return ModelCard.load(card).data.base_model if card.is_file() else None


def answer(
    speaker: Speaker,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Mapping[str, Any],
    seed: int,
    show: Callable[[str], None] = lambda part: None,
    template: Mapping[str, Any] | None = None,
) -> str:
    """Generate the speaker's next answer, and add it to the conversation.

    Args:
        sampling: Arguments of `generate`; see `sampling_settings`.
        seed: Random seed. Pass the same seed for all speakers, so that their answers are comparable.
        show: Function that is called with each new part of the answer during generation.
        template: Further arguments of `apply_chat_template`, which it passes to the chat template.
    """
    if tokenizer.chat_template is None:
        inputs = tokenizer("\n".join(message["content"] for message in speaker.messages) + "\n", return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            speaker.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **(template or {})
        )
    device = next(speaker.model.parameters()).device
    inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    torch.manual_seed(seed)
    with torch.no_grad(), speaker.acting():
        output = cast(Any, speaker.model).generate(
            **inputs, **sampling, pad_token_id=pad, streamer=_Parts(tokenizer, show)
        )
    text = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    speaker.messages.append({"role": "assistant", "content": text})
    return text


def sampling_settings(temperature: float, top_p: float, top_k: int, max_new_tokens: int) -> dict[str, Any]:
    """Return arguments of `generate`, which override the checkpoint's generation config.

    With a temperature of 0, decoding is greedy.

    Raises:
        ValueError: If a value is out of range.
    """
    for name, value, is_right in (
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("top_k", top_k, top_k >= 0),
        ("max_new_tokens", max_new_tokens, max_new_tokens > 0),
    ):
        if not is_right:
            raise ValueError(
                f"{name}={value} is out of range: temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0 (0: all tokens), "
                "max_new_tokens ≥ 1"
            )
    common = {"max_new_tokens": max_new_tokens, "use_cache": True}
    if temperature == 0:
        return {**common, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {**common, "do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
