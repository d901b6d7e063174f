"""Log-probs of scored tokens from plain forward passes in float32. Each pass has one sequence.

This code does not use the scoring code of the training. It can therefore show that a saved model equals the trained
model, even if that scoring code has an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_prefopt.scoring.agreement import device_of
from hf_prefopt.scoring.modes import evaluation_mode

_HALF = (torch.bfloat16, torch.float16)


class TokenLogps(NamedTuple):
    """The log-probs of N scored tokens.

    Attributes:
        logps: `[N]`. Log-probs in nats.
        sizes: `[N]`. |z_token| + Σ_v p_v |z_v|, where z are the logits, and p_v is the probability of vocabulary
            entry v. Rounding errors of log-probs are proportional to it.
    """

    logps: Tensor
    sizes: Tensor


@torch.no_grad()
def token_logps(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> TokenLogps:
    """Compute the log-probs of the scored tokens of all responses, in the order of the rows.

    Args:
        rows: Prepared rows, with the columns `prompt_ids`, `response_ids` and `scored_masks`.

    Raises:
        ValueError: If the rows have no scored token.
    """
    with evaluation_mode(model):
        try:
            with products_in_float32(model):
                parts = _of_rows(model, rows)
        except RuntimeError:  # some modules read the weights of other modules, such as those that call Mamba's kernels
            with weights_in_float32(model):
                parts = _of_rows(model, rows)
    logps, sizes = (torch.cat(each) for each in zip(*parts, strict=True))
    if not len(logps):
        raise ValueError("the rows have no scored token, so there is nothing to compare")
    return TokenLogps(logps, sizes)


def _of_rows(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    return [
        _of_response(model, [*row["prompt_ids"], *ids], mask)
        for row in rows
        for ids, mask in zip(row["response_ids"], row["scored_masks"], strict=True)
    ]


def _of_response(model: nn.Module, ids: list[int], mask: list[int]) -> tuple[Tensor, Tensor]:
    """Compute the log-probs and sizes (see `TokenLogps`) of the scored tokens of one response.

    Args:
        ids: Token ids of the prompt and the response.
        mask: 1 for scored tokens of the response, 0 for its other tokens.
    """
    input_ids = torch.tensor([ids], device=device_of(model))
    outputs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False, return_dict=True)
    places = len(ids) - len(mask) + torch.tensor(mask).nonzero().squeeze(1)
    logits = outputs.logits[0].float().cpu()[places - 1]  # position t − 1 predicts token t
    targets = torch.tensor(ids)[places, None]
    sizes = logits.gather(1, targets).abs().squeeze(1) + (logits.softmax(-1) * logits.abs()).nansum(1)
    return logits.log_softmax(-1).gather(1, targets).squeeze(1), sizes


@contextmanager
def products_in_float32(model: nn.Module) -> Iterator[None]:
    """Within this context, compute modules with half-precision weights in float32.

    The weights of a module are cast only while it runs, so the forward pass needs additional memory for one module in
    float32. The weights keep their rounding to half precision, but the computation adds no such rounding.
    """
    handles = []
    for module in model.modules():
        if any(p.dtype in _HALF for p in _layer(module).parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(_widen, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(_narrow, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def weights_in_float32(model: nn.Module) -> Iterator[None]:
    """Within this context, cast all half-precision weights to float32.

    This needs additional memory of twice the size of these weights.
    """
    narrow = {parameter: parameter.data for parameter in model.parameters() if parameter.dtype in _HALF}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in narrow.items():
            parameter.data = data


def _widen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    own = {name: p for name, p in _layer(module).named_parameters(recurse=False) if p.dtype in _HALF}
    vars(module)["_narrow_data"] = {name: parameter.data for name, parameter in own.items()}
    for parameter in own.values():
        parameter.data = parameter.data.float()
    return tuple(map(_float32, args)), {name: _float32(value) for name, value in kwargs.items()}


def _narrow(module: nn.Module, *_: Any) -> None:
    for name, data in vars(module).pop("_narrow_data").items():
        _layer(module).get_parameter(name).data = data


def _layer(module: nn.Module) -> nn.Module:
    """Return the base layer if the module is an adapter layer, otherwise the module itself.

    PEFT's adapter layers read the dtype of their base layer before they call it.
    """
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
