"""Identifiers of cached log-probs. They depend only on the reference and on the tokens that it reads.

A *fingerprint* identifies the reference. It covers the bytes of every tensor that affects the output, the relevant part
of the model's configuration, the temperature, the dtype of autocast, and the precision of fp32 products (TF32 keeps 10
of the 23 mantissa bits). A *key* identifies a response by the token ids of its prompt, its own token ids, and the mask
of scored tokens. Losses, β, seeds, the adapter that is trained, batches, layouts and folders affect neither
fingerprints nor keys.

The fingerprint leaves out settings that only change the last bits of a result, such as the device, the attention
implementation and the layout.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import xxhash
from accelerate.utils import align_module_device
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.collator import Collator
from hf_prefopt.data.group import group_rows
from hf_prefopt.reference.shards import gathered
from hf_prefopt.scoring.forward import base_causal_lm

KEY_BYTES = 16

# Parts of a tensor's name that appear if PEFT, or the activation checkpointing of an engine, wraps a module.
_WRAPPERS = ("base_layer", "original_module", "token_adapter", "_checkpoint_wrapped_module")
# Settings of a configuration that describe where a model came from or how it is used, not what it computes.
_BESIDE_THE_POINT = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
_BESIDE_THE_POINT_OF_ADAPTERS = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type")


def response_keys(prompt_ids: Sequence[int], responses: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[bytes]:
    """Return the 16-byte key of each response to a prompt.

    A key is the BLAKE2b hash of three lists, each preceded by its length: the prompt's ids, the response's ids, and the
    mask of scored tokens.

    Args:
        prompt_ids: token ids of the prompt.
        responses: for each response, its token ids, and its mask with 1 for a scored token and 0 for any other token.
    """
    prompt = hashlib.blake2b(_framed(np.asarray(prompt_ids, dtype="<i4")), digest_size=KEY_BYTES)
    keys = []
    for ids, mask in responses:
        digest = prompt.copy()
        digest.update(_framed(np.asarray(ids, dtype="<i4")))
        digest.update(_framed(np.asarray(mask, dtype="u1")))
        keys.append(digest.digest())
    return keys


def _framed(array: np.ndarray) -> bytes:
    return len(array).to_bytes(8, "little") + array.tobytes()


@dataclass
class KeyedCollator:
    """A wrapper of a layout's collator. It adds `response_keys` to the batch: the keys of its R responses, in order."""

    collator: Collator

    def count_tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of tokens of these rows, as the layout's collator counts them."""
        return self.collator.count_tokens(rows)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """Return the batch of the layout's collator, with `response_keys`."""
        batch = self.collator(rows)
        groups = group_rows(rows).groups
        batch["response_keys"] = tuple(
            key for group in groups for key in response_keys(group.prompt_ids, list(group.responses))
        )
        return batch


def fingerprint(model: nn.Module, temperature: float, autocast_dtype: torch.dtype | None) -> str:
    """Return the fingerprint of the model in its current state, as 32 hexadecimal digits.

    The fingerprint covers the tensors and the configuration of active adapters, and ignores disabled adapters. A base
    model with a disabled adapter, a copy of the base model, and the same weights loaded again therefore have the same
    fingerprint.

    If an engine has sharded the parameters, this function gathers them one by one, so call it on every rank.

    Args:
        model: the reference; call this function inside the context that makes the model the reference.
        temperature: the temperature of the log-probs.
        autocast_dtype: the dtype of autocast; `None` without autocast.
    """
    acting = _acting_adapters(model)
    configs = cast("Mapping[str, PeftConfig]", getattr(model, "peft_config", {}))
    adapters = [_settings(configs[name].to_dict(), _BESIDE_THE_POINT_OF_ADAPTERS) for name in acting]
    facts = {
        "model": _settings(base_causal_lm(model).config.to_dict(), _BESIDE_THE_POINT),
        "adapters": adapters,
        "temperature": temperature,
        "autocast": str(autocast_dtype),
        "fp32_products": fp32_products(model),
        "tensors": dict(_tensor_digests(model)),
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=_plain).encode(), digest_size=16).hexdigest()


def fp32_products(model: nn.Module) -> str:
    """Return the precision of fp32 matrix products on the model's device: "ieee" (full), "tf32" or "bf16"."""
    on_cpu = not torch.cuda.is_available() or all(parameter.device.type == "cpu" for parameter in model.parameters())
    backend = torch.backends.mkldnn if on_cpu else torch.backends.cuda
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


def _acting_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that affect the model's output."""
    if not isinstance(model, PeftModel):
        return []
    layers = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]
    on = [name for name in model.active_adapters if any(name in _acting_in(layer) for layer in layers)]
    return model.active_adapters if model.active_peft_config.is_prompt_learning else on


def _acting_in(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else layer.active_adapters


def _settings(config: Mapping[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of a configuration that affect the model's output, including nested settings."""
    return {
        name: _settings(value, left_out) if isinstance(value, Mapping) else value
        for name, value in ((str(name), value) for name, value in config.items())
        if name not in left_out and not (name.startswith("_") or "dropout" in name or name.endswith("token_id"))
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _tensor_digests(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, digest) for every tensor that affects the model's output. Names omit the wrappers of adapters."""
    renamed = _renaming(model)
    for name, _ in model.named_parameters():
        acting_name = renamed(name)
        if acting_name is None:
            continue
        owner_name, _, own_name = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        # Offloaded weights are on their device inside this context.
        with align_module_device(owner):
            parameter = getattr(owner, own_name)
            with gathered(parameter) as tensor:
                yield acting_name, _digest(tensor)
            for part, tensor in _quantization(parameter, owner):
                yield f"{acting_name}.{part}", _digest(tensor)
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            acting_name = renamed(f"{module_name}.{name}" if module_name else name)
            if acting_name is not None and name not in module._non_persistent_buffers_set:
                yield acting_name, _digest(buffer)


def _renaming(model: nn.Module) -> Any:
    """Return a function that maps a tensor's name to its name without an adapter's wrappers.

    The function returns `None` for a tensor that does not affect the output.
    """
    causal_lm = base_causal_lm(model)
    inside = next(name for name, module in model.named_modules() if module is causal_lm)
    hidden: list[str] = []
    places: dict[str, str] = {}
    for path, layer in model.named_modules():
        if not hasattr(layer, "adapter_layer_names"):
            continue
        acting = _acting_in(layer)
        for container in (*layer.adapter_layer_names, *layer.other_param_names):
            hidden.append(f"{path}.{container}.")
            places |= {f"{path}.{container}.{name}": f"{path}.{container}.#{i}" for i, name in enumerate(acting)}
        if acting and hasattr(layer, "original_module") and hasattr(layer, "modules_to_save"):
            hidden.append(f"{path}.original_module.")

    hidden_prefixes = tuple(hidden)

    def rename(name: str) -> str | None:
        if name.startswith(hidden_prefixes):
            adapter = next((old for old in places if name == old or name.startswith(f"{old}.")), None)
            if adapter is None:
                return None
            name = places[adapter] + name.removeprefix(adapter)
        name = name.removeprefix(f"{inside}.") if inside else name
        return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

    return rename


def _quantization(parameter: nn.Parameter, owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return (name, tensor) for each tensor that bitsandbytes stores in addition to a quantized weight."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        tensors = state.as_dict(packed=True)
    else:
        # The first forward moves the scales of 8-bit weights from the weight to the module's state.
        places = (parameter, getattr(owner, "state", None))
        tensors = {"SCB": next((s for place in places if (s := getattr(place, "SCB", None)) is not None), None)}
    return ((name, tensor) for name, tensor in tensors.items() if tensor is not None)


def _digest(tensor: Tensor) -> str:
    """Return a text with a tensor's dtype, its shape, and the XXH3-128 hash of its bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(data.data)}"
