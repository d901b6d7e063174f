"""Errors of a command, printed by the first rank as one readable message, with a known fix if there is one."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable

import torch

# Error types whose message is sufficient. For other errors, the type is printed as well.
_SPOKEN = (ValueError, OSError, ImportError, TypeError)
# Patterns of messages from other libraries, and the message with the fix that is printed instead.
CURES: dict[str, str] = {
    r"DeepSpeed is not installed|No module named 'deepspeed'": (
        'DeepSpeed is not installed: pip install --no-build-isolation "hf_prefopt[deepspeed]", after torch'
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
        "attn_implementation asks for flash attention, which is not installed: leave it out for sdpa, or pip install "
        "flash-attn --no-build-isolation"
    ),
    r"Target modules (.*) not found in the base model": (
        r"lora_target_modules=\1: no layer of the model has such a name; all-linear fits every model"
    ),
    r"Expected a string path to an existing deepspeed config.*Received: (.*)": (
        r"deepspeed=\1: there is no such file; hf_prefopt train --copy zero3 writes one"
    ),
    r"Cannot reach (\S+)/api/repos/create: offline mode": (
        r"push_to_hub=True, and \1 is not in reach, because HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out"
    ),
    r"metric_for_best_model` must be provided": (
        "save_strategy=best: --metric_for_best_model is missing, such as eval_rewards/accuracies"
    ),
    r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'": (
        r"\1 takes no argument '\2': check model_init_kwargs"
    ),
}
_OUT_OF_MEMORY = (
    "out of memory on the device: set --max_tokens_per_batch (it bounds the positions of a forward, and the step stays "
    "the same), --gradient_checkpointing true, or --use_peft true"
)
_SECONDS_BEHIND_THE_FIRST_RANK = 15.0


def reported(run: Callable[[], int], with_traceback: bool) -> int:
    """Run a command and return its exit code. If it fails, print the error and return 1.

    With several ranks, the first rank prints immediately. Other ranks wait before they print: if the first rank also
    failed, the launcher ends them in the meantime. Otherwise the error occurred only on these ranks, and they print it.

    Args:
        with_traceback: If True, raise the error instead of printing it.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # libraries raise errors of any type
        if with_traceback:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(_SECONDS_BEHIND_THE_FIRST_RANK)
        where = f" on rank {rank}" if rank else ""
        print(f"error{where}: {message_of(error)}", file=sys.stderr, flush=True)
        return 1


def message_of(error: BaseException) -> str:
    """Return the message to print for an error."""
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
    return (
        f"{type(error).__name__}: {text} ({os.path.basename(last.filename)}, line {last.lineno}; --traceback has all)"
    )
