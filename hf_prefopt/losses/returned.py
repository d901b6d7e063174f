"""What a loss gives back is checked: one number per example, in the precision and at the place of what it was given."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from hf_prefopt.kinds import ExampleKind
from hf_prefopt.losses.base import LossOutput


class NamedLoss(Protocol):
    """What an error says of a loss; `losses.registry.LossSpec` is one."""

    @property
    def name(self) -> str:
        """As it is registered."""

    @property
    def function(self) -> Callable[..., Any]:
        """The formula."""

    @property
    def kind(self) -> ExampleKind:
        """The examples that it compares."""


def check_returned(spec: NamedLoss, output: LossOutput, given: Mapping[str, Tensor]) -> None:
    """Refuse what would be averaged to another number than the loss of the examples.

    Args:
        spec: the loss.
        given: its inputs; the first floating-point tensor is `[B]`, `[B, K]` or `[B, T]`.

    Raises:
        ValueError: the losses are no floating-point tensor `[B]`, or are less precise than what the loss was given, or
            have lost its gradient; rewards are not `[B, K]`, a component not `[B]`; something is on another device.
    """
    like = next((tensor for tensor in given.values() if tensor.is_floating_point()), None)
    if like is None:
        return
    size, losses = len(like), output.losses
    _check_tensor(spec, like, "losses", losses, (size,))
    if not losses.is_floating_point() or torch.promote_types(losses.dtype, like.dtype) != losses.dtype:
        _refuse(spec, like, "losses", losses, (size,), "keep the dtype of the log-probs")
    asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values())
    if asked and not losses.requires_grad:
        _refuse(spec, like, "losses without a gradient", losses, (size,), "leave out detach(), item() and no_grad()")
    if output.rewards is not None:
        _check_tensor(spec, like, "rewards", output.rewards, (size, spec.kind.count_rewards(given)))
    for part, values in output.components.items():
        _check_tensor(spec, like, f"the component {part!r}", values, (size,))


def _check_tensor(spec: NamedLoss, like: Tensor, what: str, returned: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(returned, Tensor):
        _refuse(spec, like, what, returned, shape, "return a tensor")
    if returned.shape != shape:
        cure = (
            "leave out mean() or sum(): the trainer takes the mean over the examples of a step"
            if returned.dim() == 0
            else "look for an operand that broadcasts, such as x[:, None], and for a sum that is missing"
        )
        _refuse(spec, like, what, returned, shape, cure)
    if returned.device != like.device:
        _refuse(spec, like, what, returned, shape, "make new tensors with zeros_like() or new_tensor()")


def _refuse(spec: NamedLoss, like: Tensor, what: str, returned: Any, shape: tuple[int, ...], cure: str) -> NoReturn:
    raise ValueError(
        f"loss {spec.name!r} ({_place(spec.function)}) returned {what} {_description(returned)}. Given {len(like)} "
        f"examples, it is to return shape {list(shape)}, in {like.dtype} on {like.device} as its inputs are: {cure}"
    )


def _description(returned: Any) -> str:
    if not isinstance(returned, Tensor):
        return f"of type {type(returned).__name__}"
    return f"of shape {list(returned.shape)} in {returned.dtype} on {returned.device}"


def _place(function: Callable) -> str:
    """The file and line of a function, or what kind of object it is."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__
