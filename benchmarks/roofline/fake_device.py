"""A CUDA device without memory or arithmetic, for a CPU build of PyTorch.

Tensors on this device are fake: they have shapes, dtypes and `is_cuda`, so that code takes the same path as on a GPU.
Call `load_device` before `import torch`; `fake_gpu` is a context in which `torch.cuda` reports a GPU.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

SOURCE = Path(__file__).with_name("device.cpp")
BUILT = Path(__file__).resolve().parents[2] / "build"
COMPILERS = ("c++", "g++", "clang++")
_LOADED: list[ctypes.CDLL] = []


def compiler() -> str | None:
    """Return the C++ compiler for the device: $CXX, or an installed one."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)


def load_device() -> None:
    """Build the device, once for each version of PyTorch, and load it.

    Raises:
        RuntimeError: torch was imported before, or there is no C++ compiler.
    """
    if _LOADED:
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the device: call load_device first, or in a separate process")
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations
    key = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode() + torch.encode()).hexdigest()[:16]
    library = BUILT / f"fake_device_{key}.so"
    if not library.exists():
        _build(library, Path(torch))
    _LOADED.append(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL))


def _build(library: Path, torch: Path) -> None:
    if compiler() is None:
        raise RuntimeError(f"{SOURCE.name} needs a C++ compiler: install one, or name it in $CXX")
    BUILT.mkdir(exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    options = ["-shared", "-fPIC", "-std=c++20", "-O0", f"-I{torch / 'include'}"]
    subprocess.run([compiler(), *options, str(SOURCE), "-o", str(unfinished), *libraries], check=True)
    unfinished.rename(library)


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Return a context with fake tensors, in which `torch.cuda` has one device with this compute capability.

    Without a device, autocast for "cuda" would disable itself, and accelerate would choose the CPU.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    class WithoutDevice(FakeTensorMode):
        # torch.tensor(list, device="cuda") creates a CPU tensor; its copy to the device is counted as one copy.
        avoid_device_init = True

    properties = SimpleNamespace(name="fake", major=capability[0], minor=capability[1], total_memory=80 << 30)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "manual_seed_all": None,
        "is_current_stream_capturing": False,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "is_bf16_supported": capability >= (8, 0),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        # `module.to` would swap two tensors, which PyTorch does not allow if there is a weak reference to one of them.
        stack.enter_context(patch.object(torch.utils, "swap_tensors", lambda old, new: setattr(old, "data", new)))
        stack.enter_context(WithoutDevice(allow_non_fake_inputs=True))
        yield
