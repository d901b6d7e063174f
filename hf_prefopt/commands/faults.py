"""Errors of a command, printed by the first rank as one readable message, with a known fix if there is one."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection

from hf_prefopt.config_names import as_option, rewritten

# Types of errors whose message is printed without the name of the type.
_SPOKEN = (ValueError, OSError, ImportError, TypeError)
# Patterns of error messages, most of them from other libraries. Each is mapped to the message that is printed instead,
# which says how to fix the error.
CURES: dict[str, str] = {
    r"DeepSpeed is not installed|No module named 'deepspeed'": (
        'DeepSpeed is not installed: pip install --no-build-isolation "hf_prefopt[deepspeed]", after torch'
    ),
    r"No module named 'mpi4py'": (
        "deepspeed needs a launcher: type accelerate launch -m hf_prefopt train ..., also for one device; without "
        "DeepSpeed, leave out --deepspeed"
    ),
    r"Couldn't instantiate the backend tokenizer": (
        "the model has no tokenizer: copy its tokenizer.json and tokenizer_config.json into the model's "
        "folder, or save the base model's tokenizer there (tokenizer.save_pretrained)"
    ),
    r"requires bitsandbytes|bitsandbytes.*install|install.*bitsandbytes": (
        'bitsandbytes, which 4 and 8 bits need, is missing or too old: pip install "hf_prefopt[quantization]"'
    ),
    r"TensorBoardCallback requires": (
        "report_to=tensorboard, which is not installed: pip install tensorboard, or --report_to none"
    ),
    r"(\w+)Callback requires (\S+) to be installed": (
        r"report_to=\2, which is not installed: pip install \2, or --report_to none"
    ),
    r"package for (FlashAttention\d?) doesn't seem|flash.attn.*not installed": (
        "attn_implementation needs flash attention, which is not installed: remove the setting to use sdpa, or pip "
        "install flash-attn --no-build-isolation"
    ),
    r"(?s)^target_modules: (.*)target_modules=('all-linear'.*)": r"--lora_target_modules: \1lora_target_modules=\2",
    r"(reference='adapter.*') needs a PEFT model": r"\1 needs an adapter: pass use_peft=True, or remove --reference",
    r"the model already has an adapter, so peft_config": (
        "the model already has an adapter, so use_peft=True cannot put another on it: remove --use_peft to train that "
        "adapter further, or merge it first: `hf_prefopt merge`"
    ),
    r"Expected a string path to an existing deepspeed config.*Received: (.*)": (
        r"deepspeed=\1: there is no such file; `hf_prefopt train --copy zero3` writes one"
    ),
    r"Cannot reach (\S+)/api/repos/create: offline mode": (
        r"push_to_hub=True needs \1, but HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE, or pass push_to_hub=False"
    ),
    r"^(\w+) is not supported, only (.*) are supported": (
        r"report_to=\1: there is no such tracker; choose from \2, or none"
    ),
    r"logging strategy .* requires non-zero": "logging_steps=0 must be at least 1; to log nothing: logging_strategy=no",
    r"At most one of fp16 and bf16": "fp16=True and bf16=True: choose one of them",
    r"Got warmup_steps = (\S+), Expected": r"warmup_steps=\1 must be at least 0 steps, or a share of all steps below 1",
    r"metric_for_best_model` must be provided": (
        "save_strategy=best needs a metric: pass metric_for_best_model=eval_rewards/accuracies, or another metric"
    ),
    r"requires the save and eval strategy to match": (
        "load_best_model_at_end=True needs an evaluation at every save: pass the same strategy for both, such as "
        "eval_strategy=steps save_strategy=steps"
    ),
    r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'": (
        r"\1 takes no argument '\2': remove it from --model_init_kwargs"
    ),
}
_OUT_OF_MEMORY = (
    "out of memory on the device: set --max_tokens_per_batch (it bounds the positions of a forward, and the step stays "
    "the same), --gradient_checkpointing true, or --use_peft true"
)
_SECONDS_BEHIND_THE_FIRST_RANK = 15.0


def reported(run: Callable[[], int], with_traceback: bool, options: Collection[str] = ()) -> int:
    """Call `run` and return its exit code. An error is printed, and the exit code is 1.

    With several ranks, the first rank prints immediately. Other ranks wait before they print: if the first rank also
    failed, the launcher ends them in the meantime. Otherwise the error occurred only on these ranks, and they print it.

    Args:
        with_traceback: whether to raise the error instead of printing it.
        options: the settings that the command takes. Messages show them as options, such as --max_length.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `main` handles it
        raise
    except Exception as error:  # libraries raise errors of any type
        if with_traceback:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(_SECONDS_BEHIND_THE_FIRST_RANK)
        where = f" on rank {rank}" if rank else ""
        print(f"error{where}: {rewritten(message_of(error), as_option, options)}", file=sys.stderr, flush=True)
        return 1


def message_of(error: BaseException) -> str:
    """Return the message to print for an error: a message from `CURES` if one applies, otherwise the error's own."""
    import torch  # not at the top, because commands start ten times faster without PyTorch

    text = str(error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return _OUT_OF_MEMORY
    for pattern, cure in CURES.items():
        if found := re.search(pattern, text):
            return found.expand(cure)
    if isinstance(error, KeyError):
        text = f"the key {text} is missing"
    if isinstance(error, _SPOKEN):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(last.filename)}, line {last.lineno}"
    return f"{type(error).__name__}: {text} ({place}; --traceback shows the rest)"
