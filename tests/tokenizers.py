"""Tiny tokenizers for tests, built offline: a byte-level BPE trained on the sentences below."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The capital of France is Paris. The capital of Italy is Rome.",
    "What is the capital of France? Answer with one word.",
    "Dean bought 6 toy cars and 5 teddy bears; each toy car cost $2 and each teddy bear cost $1.",
    "unbelievable stories, believable story, under the sea, once upon a time",
    "I'm sorry, I can't help with that. Of course! I can help you with that.",
    "Some popular careers for students include social science, research and consultancy.",
    "system user assistant tool think",
)

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '<tool_call>' + call['function'] | tojson + '</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# The same without tool calls, like many templates.
CHATML_WITHOUT_TOOLS = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# The assistant's words and the end of turn are marked, but not the line break after it.
CHATML_WITH_MARKERS = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# Like Qwen3's: thinking is only written in the last assistant turn, if no user turn follows.
CHATML_THINKING_LAST = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' and loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@lru_cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    chat_template: str | None = CHATML, *, bos: bool = False, pad_is_eos: bool = False, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Return a new tokenizer.

    Args:
        chat_template: one of the templates above, or None.
        bos: whether the tokenizer itself adds `<s>` before texts.
        pad_is_eos: whether the pad token is the EOS.
        eos: the EOS token: ChatML's end of turn, as in instruction-tuned models, or `<|endoftext|>`.
    """
    backend = Tokenizer.from_str(_backend())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token=eos if pad_is_eos else "<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
