"""Prevent bitsandbytes' 4-bit layers on CPUs from packing weights for inference, which stops gradients.

On CPUs with AVX-512-BF16, a 4-bit layer packs its weight for a faster kernel in its first forward pass in evaluation
mode without gradients, and then always uses this kernel. The kernel has no backward pass, and its scales are rounded to
bf16: gradients would silently flow only through residual connections. ZeRO-3 and FSDP2 gather the weight for each
forward pass, so the kernel would also read weights that are not packed.
"""

from torch import nn

# Layer attribute that enables packing.
_PACKS = "support_avx512bf16_for_cpu"


def keep_unpacked(model: nn.Module) -> None:
    """Disable weight packing in a model's 4-bit layers; inference on a CPU becomes slower."""
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)


def refuse_packed(model: nn.Module) -> None:
    """Raise `ValueError` if a model to be trained has packed weights, which stop gradients."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed the 4-bit weights of {name} for inference on the CPU, which stops gradients: "
                "load the model again, and create the trainer before you use the model (generate, evaluate)"
            )
