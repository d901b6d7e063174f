"""Print the environment for a bug report: versions, devices and installed packages, without paths or names.

hf_prefopt env
"""

import os
import platform
from argparse import ArgumentParser, Namespace
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from hf_prefopt.version import __version__

# Environment variables that affect a run. Their values contain no paths, names or secrets.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "ACCELERATE_MIXED_PRECISION",
    "DS_ACCELERATOR",
    "WORLD_SIZE",
)


def add_options(parser: ArgumentParser) -> None:
    """Do nothing, because `env` has no options of its own."""


def run(options: Namespace) -> int:
    """Print one line for each version, device, package and environment variable."""
    facts = {"hf_prefopt": __version__, "Python": platform.python_version(), "system": _system(), **_devices()}
    facts |= {name: _version(name) for name in _packages()}
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _system() -> str:
    return f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"


def _devices() -> dict[str, str]:
    """Return the accelerators, the CUDA version, and whether the GPU supports bf16, keyed by the words to print."""
    if not torch.accelerator.is_available():
        return {"device": "CPU alone"}
    if not torch.cuda.is_available():
        return {"device": str(torch.accelerator.current_accelerator())}
    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "device": ", ".join(f"{found.name} ({found.total_memory / 2**30:.0f} GiB)" for found in names),
        "CUDA": f"{torch.version.cuda or torch.version.hip}, bf16: {torch.cuda.is_bf16_supported()}",
    }


def _packages() -> list[str]:
    """Return the names of the required and optional packages, and of a few others that affect a run.

    Packages that are needed only for development are left out.
    """
    found = [Requirement(line) for line in requires("hf_prefopt") or ()]
    names = [one.name for one in found if one.name != "hf_prefopt" and "dev" not in str(one.marker)]
    return list(dict.fromkeys([*names, "trl", "flash-attn", "liger-kernel", "wandb", "tensorboard"]))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
