"""Suppress messages that libraries log at every import and that are irrelevant to the run."""

import logging
from functools import partial

# Beginnings of messages, keyed by the name of the logger.
MESSAGES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # even if nothing is quantized
    "DeepSpeed": "Setting accelerator to CPU",  # even if a library only imports DeepSpeed
}


def leave_out_noise() -> None:
    """Filter the messages in `MESSAGES`, and no others, out of the loggers of their libraries."""
    for name, beginning in MESSAGES.items():
        logging.getLogger(name).addFilter(partial(_is_other, beginning))


def _is_other(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)
