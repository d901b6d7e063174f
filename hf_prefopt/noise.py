"""Messages that libraries log whenever they are imported, and that say nothing about a run, left out."""

import logging

# Where each comes from, and how it begins.
MESSAGES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # also where nothing is quantized
    "DeepSpeed": "Setting accelerator to CPU",  # also where DeepSpeed is only imported, by a library
}


def leave_out_noise() -> None:
    """Drop these messages from the loggers of their libraries; all others stay."""
    for name, beginning in MESSAGES.items():
        logging.getLogger(name).addFilter(lambda record, noise=beginning: not str(record.msg).startswith(noise))
