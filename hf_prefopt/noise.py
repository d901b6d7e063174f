"""Suppress messages that libraries log whenever they are imported and that do not concern the run."""

import logging

# Logger name: beginning of the message.
MESSAGES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # even if nothing is quantized
    "DeepSpeed": "Setting accelerator to CPU",  # even if a library only imports DeepSpeed
}


def leave_out_noise() -> None:
    """Filter these messages, and only these, out of the loggers of their libraries."""
    for name, beginning in MESSAGES.items():
        logging.getLogger(name).addFilter(lambda record, noise=beginning: not str(record.msg).startswith(noise))
