"""An error of a command as one readable message, on the first rank, with what to do about it where that is known."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable

import torch

# Errors that say what is wrong in their own words; of others the type is printed, too.
_SPOKEN = (ValueError, OSError, ImportError, TypeError)
# What other libraries say, and what to do about it.
CURES: dict[str, str] = {
    r"DeepSpeed is not installed|No module named 'deepspeed'": "DeepSpeed is not installed: pip install "
    '--no-build-isolation "hf_prefopt[deepspeed]", after torch',
    r"bitsandbytes": "bitsandbytes, which 4 and 8 bits need, is missing or too old: pip install "
    '"hf_prefopt[quantization]"',
    r"TensorBoardCallback requires": "report_to=tensorboard, which is not installed: pip install tensorboard, or "
    "--report_to none",
    r"(\w+)Callback requires (\S+) to be installed": r"report_to=\2, which is not installed: pip install \2, or "
    "--report_to none",
    r"flash_attn|FlashAttention2? .*not installed|flash-attn": "attn_implementation=flash_attention_2, and flash-attn "
    "is not installed: leave it out for sdpa, or pip install flash-attn --no-build-isolation",
}
_OUT_OF_MEMORY = (
    "out of memory on the device: set --max_tokens_per_batch (it bounds the positions of a forward, and the step stays "
    "the same), --gradient_checkpointing true, or --use_peft true"
)
_SECONDS_BEHIND_THE_FIRST_RANK = 5.0


def reported(run: Callable[[], int], with_traceback: bool) -> int:
    """The exit code of `run()`; an error is printed, and is 1.

    Of several ranks the first one speaks. The others wait: the launcher ends them if the first one fails, too, and if
    it does not, the error is theirs alone.

    Args:
        with_traceback: whether to raise the error as it is.
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
    """What to print of an error."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return _OUT_OF_MEMORY
    if isinstance(error, ImportError):
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
