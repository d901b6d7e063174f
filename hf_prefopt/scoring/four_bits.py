"""bitsandbytes' 4-bit layers on CPUs: no gradient passes through weights that they have packed for inference.

On CPUs with AVX-512-BF16, a 4-bit layer packs its weight for a faster kernel at its first forward in evaluation mode
without gradients, and uses that kernel from then on. The kernel has no backward, and its scales are rounded to bf16:
gradients would silently pass through residual connections alone. Under ZeRO-3 and FSDP2, which gather the weight anew
for each forward, the kernel would also read weights that are not packed.
"""

from torch import nn

# The attribute of a layer that allows it to pack its weight.
_PACKS = "support_avx512bf16_for_cpu"


def keep_unpacked(model: nn.Module) -> None:
    """Keep the 4-bit layers of a model from packing their weights; it is slower in inference on a CPU."""
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)


def refuse_packed(model: nn.Module) -> None:
    """Raise `ValueError` if a model that is to train has packed weights, which let no gradient through."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed the 4-bit weights of {name} for inference on the CPU, and no gradient passes "
                "through them any more: load the model anew and make the trainer before the model is used (generate, "
                "an evaluation)"
            )
