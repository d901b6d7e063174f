"""Count the operators of a step on fake tensors: launches, FLOP, bytes, waits of the host, and memory in use."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline import costs

aten = torch.ops.aten
HERE = str(Path(__file__).parent)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
# The allocator allocates memory in blocks of this number of bytes.
BLOCK = 512


class Work(NamedTuple):
    """The work of one operator, or of one kernel outside PyTorch."""

    operator: str
    phase: str
    part: str
    launches: int
    flop: int
    bytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Batch:
    """Facts that depend on the values of a micro-batch. Fake tensors have no values.

    Attributes:
        attention_pairs: number of (query, key) pairs of all segments.
        scored: share of the positions of a padded batch that a mask selects.
        is_padded: whether some sequence is shorter than another.
    """

    attention_pairs: int = 0
    scored: float = 1.0
    is_padded: bool = False


def is_copy(tensor: Tensor) -> bool:
    """Return whether a tensor is a copy of a fake tensor on the CPU, for which the host has waited; it has no value."""
    return isinstance(tensor, FakeTensor) and tensor.constant is None


class Counting(TorchDispatchMode):
    """A mode that records the operators on the device.

    Args:
        head: widths that identify the tensors of the head: the size of the vocabulary and of its pieces.
        rank: rank of the adapter, which identifies the adapter's products.

    Attributes:
        work: the recorded work, in order. waits: the host's waits for the device, keyed by call site.
        kept: bytes of casts that are kept unnecessarily for the backward pass, keyed by type and call site: fp32 copies
            of half-precision tensors, and copies in a dtype that the tensor had before.
        peak: the most bytes in use. phase: the phase of new work.
    """

    def __init__(self, head: set[int], rank: int | None):
        super().__init__()
        self.work: list[Work] = []
        self.waits: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.batch, self.phase = Batch(), "other"
        self._head, self._rank = head, rank
        self._in_use: dict[int, tuple[weakref.ref, int]] = {}
        # For the memory of each cast: the dtype of the first tensor in a chain of casts, and the key in `kept`.
        self._casts: weakref.WeakKeyDictionary[Any, tuple[torch.dtype, str]] = weakref.WeakKeyDictionary()
        self.memory = self.peak = 0

    def begin(self, batch: Batch) -> None:
        """Reset the counts; memory that is in use stays in use."""
        self.work, self.waits, self.kept, self.batch = [], Counter(), Counter(), batch
        self.peak = self.memory

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Assign the work inside the context to a phase."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

    def launch(self, name: str, part: str, bytes_moved: int, dtype: torch.dtype) -> None:
        """Record a kernel that is not an operator."""
        self.work.append(Work(name, self.phase, part, 1, 0, bytes_moved, dtype))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = costs.name_of(function)
        if name == "_local_scalar_dense" and (args[0].is_cuda or is_copy(args[0])):
            if args[0].is_cuda:
                self._wait("read")
            return self._made_up(args[0].dtype)
        if name == "nonzero" and args[0].is_cuda:
            self._wait("nonzero")
            return args[0].new_empty((self._selected(args[0]), args[0].dim()), dtype=torch.long)
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            args = self._with_places(args)
        result = function(*args, **kwargs)
        self._copies(name, args, kwargs, result)
        self._record(function, args, kwargs, result)
        return result

    def _record(self, function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if costs.is_view(function):
            return
        outputs = costs.tensors_in(result)
        for tensor in outputs:
            self._use(tensor)
        count = costs.launches(function, args, kwargs)
        tensors = costs.tensors_in(args, kwargs) + outputs if count else []
        if not tensors:
            return
        flop = costs.flop(function, args, kwargs, result, self.batch.attention_pairs)
        moved = costs.moved_bytes(function, args, kwargs, result)
        name = costs.name_of(function)
        # The sums of a product may have a wider dtype than its factors.
        dtype = min(
            (tensor.dtype for tensor in tensors), key=lambda dtype: (not dtype.is_floating_point, dtype.itemsize)
        )
        self.work.append(Work(name, self.phase, self._part(name, tensors), count, flop, moved, dtype))

    def _part(self, name: str, tensors: list[Tensor]) -> str:
        if "attn" in name or "attention" in name:
            return "attention"
        if name != "embedding" and any(size in self._head for tensor in tensors for size in tensor.shape):
            return "head"
        if self._rank and any(self._rank in tensor.shape[-1:] for tensor in tensors):
            return "adapter"
        if name in PRODUCTS:
            is_narrow = any(self._rank in tensor.shape for tensor in tensors if tensor.dim() == 2)
            return "adapter" if is_narrow else "products"
        return "elementwise"

    # -- waits ----------------------------------------------------------------------------------------------------

    def _wait(self, kind: str) -> None:
        self.waits[f"{kind}: {call_site()}"] += 1

    def _made_up(self, dtype: torch.dtype) -> bool | int | float:
        """Return a constant for a number for which the host would wait for the GPU."""
        if dtype == torch.bool:  # code that builds masks asks whether the mask is all True
            return not (self.batch.is_padded and "masking_utils" in call_site())
        return 1.0 if dtype.is_floating_point else 1

    def _selected(self, mask: Tensor) -> int:
        return round(self.batch.scored * mask.numel())

    def _with_places(self, args: tuple) -> tuple:
        """Replace boolean masks in the indices by the positions that they select, for which the host waits."""
        places: list[Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype != torch.bool or not index.is_cuda:
                places.append(index)
                continue
            self._wait("mask as index")
            self.launch("nonzero", "elementwise", index.numel(), index.dtype)
            selected = (self._selected(index),)
            places += [index.new_empty(selected, dtype=torch.long) for _ in range(index.dim())]
        return args[0], places, *args[2:]

    def _copies(self, name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Record copies between devices, for which the host waits if they are blocking, and casts."""
        if name not in ("_to_copy", "copy_"):
            return
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
        if costs.is_between_devices(name, args, kwargs):
            if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
                self._wait("copy")
        elif name == "_to_copy" and target.is_cuda and target.dtype != source.dtype:
            self._cast(source, target)

    def _cast(self, source: Tensor, target: Tensor) -> None:
        first = self._casts.get(source.untyped_storage(), (source.dtype,))[0]
        what = ""
        if first == target.dtype:
            what = f"cast there and back: {call_site()}"
        elif source.element_size() == 2 and target.dtype == torch.float32:
            what = f"fp32 copy: {call_site()}"
        self._casts[target.untyped_storage()] = first, what

    # -- memory in use --------------------------------------------------------------------------------------------

    def _use(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._in_use:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._in_use[key] = weakref.ref(storage, lambda _: self._free(key)), size
        self.memory += size
        self.peak = max(self.peak, self.memory)

    def _free(self, key: int) -> None:
        self.memory -= self._in_use.pop(key)[1]

    @contextmanager
    def watching_saved(self) -> Iterator[None]:
        """Record in `kept` which casts autograd keeps."""
        seen: weakref.WeakSet[Any] = weakref.WeakSet()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage() if tensor.is_cuda else None
            _, what = self._casts.get(storage, (None, "")) if storage is not None else (None, "")
            if what and storage not in seen:
                seen.add(storage)
                self.kept[what] += storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def call_site() -> str:
    """Return the file and function that called torch; for autograd nodes, the caller of the backward pass."""
    frame = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename.startswith(HERE)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}" if frame else "backward"
