"""TRL's own configuration and trainer of each method."""

from typing import Any

import pytest

METHODS = ("DPO", "KTO", "CPO", "ORPO", "TPO")


def trl_config(method: str) -> Any:
    return _of_trl(f"{method}Config")


def trl_trainer(method: str) -> Any:
    return _of_trl(f"{method}Trainer")


def _of_trl(name: str) -> Any:
    trl = pytest.importorskip("trl")
    if name.startswith(("DPO", "KTO")):
        return getattr(trl, name)
    from trl.experimental import cpo, orpo, tpo

    return next(getattr(module, name) for module in (cpo, orpo, tpo) if hasattr(module, name))
