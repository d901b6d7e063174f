"""Check the output of a loss: one number per example, with the dtype and device of the inputs."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from hf_prefopt.kinds import ExampleKind
from hf_prefopt.losses.base import LossOutput


class NamedLoss(Protocol):
    """The properties of a loss that error messages use; `losses.registry.LossSpec` has them."""

    @property
    def name(self) -> str:
        """The registered name."""

    @property
    def function(self) -> Callable[..., Any]:
        """The formula."""

    @property
    def kind(self) -> ExampleKind:
        """The kind of examples that the loss compares."""


def check_returned(spec: NamedLoss, output: LossOutput, given: Mapping[str, Tensor]) -> None:
    """Check that a loss has returned one number per example. The trainer takes the mean of these numbers.

    Args:
        spec: the loss.
        output: what the loss returned.
        given: the inputs of the loss, keyed by name. The first floating-point tensor, which is `[B]`, `[B, K]` or
            `[B, T]`, defines B, the dtype and the device. Without such a tensor, nothing is checked.

    Raises:
        ValueError: the losses are not a floating-point tensor `[B]`, have a less precise dtype than the inputs, or have
            no gradient although an input requires one; the rewards are not `[B, K]`; a component is not `[B]`; or a
            tensor is on another device than the inputs.
    """
    like = next((tensor for tensor in given.values() if tensor.is_floating_point()), None)
    if like is None:
        return
    size, losses = len(like), output.losses
    _check_tensor(spec, like, "losses", losses, (size,))
    if not losses.is_floating_point() or torch.promote_types(losses.dtype, like.dtype) != losses.dtype:
        _refuse(spec, like, "losses", losses, f"{like.dtype} like its inputs", "keep the dtype of the log-probs")
    asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values())
    if asked and not losses.requires_grad:
        _refuse(spec, like, "losses without a gradient", losses, "a gradient", "remove detach(), item() and no_grad()")
    if output.rewards is not None:
        _check_tensor(spec, like, "rewards", output.rewards, (size, spec.kind.count_rewards(given)))
    for part, values in output.components.items():
        _check_tensor(spec, like, f"the component {part!r}", values, (size,))


def _check_tensor(spec: NamedLoss, like: Tensor, what: str, returned: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(returned, Tensor):
        _refuse(spec, like, what, returned, f"shape {list(shape)}", "return a tensor")
    if returned.shape != shape:
        cure = (
            "remove mean() or sum(): the trainer takes the mean over the examples of a step"
            if returned.dim() == 0
            else "look for an operand that broadcasts, such as x[:, None], or for a missing sum"
        )
        _refuse(spec, like, what, returned, f"shape {list(shape)}", cure)
    if returned.device != like.device:
        needed = f"tensors on {like.device} like its inputs"
        _refuse(spec, like, what, returned, needed, "create tensors with zeros_like() or new_tensor()")


def _refuse(spec: NamedLoss, like: Tensor, what: str, returned: Any, needed: str, cure: str) -> NoReturn:
    raise ValueError(
        f"loss {spec.name!r} ({_place(spec.function)}) returned {what} {_description(returned, like)}. Given "
        f"{len(like)} examples, it must return {needed}: {cure}"
    )


def _description(returned: Any, like: Tensor) -> str:
    """Describe a returned value: the type if it is not a tensor, otherwise the shape.

    The dtype and the device of a tensor are added if they differ from those of `like`.
    """
    if not isinstance(returned, Tensor):
        return f"of type {type(returned).__name__}"
    dtype = f" in {returned.dtype}" if returned.dtype != like.dtype else ""
    device = f" on {returned.device}" if returned.device != like.device else ""
    return f"of shape {list(returned.shape)}{dtype}{device}"


def _place(function: Callable) -> str:
    """Return the file and line of a function, or the type of a callable object."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__
