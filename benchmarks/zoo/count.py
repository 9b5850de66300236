"""Counts of the norms of a forward that run as PyTorch's operators, taken from outside of the fused model.

A replaced ``torch.nn.functional.batch_norm`` would be noticed by the guards of a recorded forward, which then runs
stock. The interpreter's profile hook observes the calls and replaces nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_BATCH_NORMS = (torch.batch_norm, torch.native_batch_norm)
#: Name and attributes that the frozen norms of torchvision, timm and detectron2 have in common.
_FROZEN_PREFIX = "FrozenBatchNorm"


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Return the norms with constant statistics and parameters, which compute without ``torch.batch_norm``."""
    return [module for module in model.modules() if type(module).__name__.startswith(_FROZEN_PREFIX)]


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or type(module).__name__.startswith(_FROZEN_PREFIX)


def count_stock_norms(model: nn.Module, call: Callable[[], Any]) -> int:
    """Return the number of batch norms that ``call`` runs as PyTorch's operator or as a frozen norm's own forward.

    Args:
        model: the model that ``call`` runs; only its classes of frozen norms are read.
        call: runs the model once, in this thread.
    """
    frozen: set[CodeType] = {type(norm).forward.__code__ for norm in frozen_norms(model)}  # type: ignore[attr-defined]
    count = 0

    def observe(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        if event == "c_call":
            count += any(argument is operator for operator in _BATCH_NORMS)
        elif event == "call":
            count += frame.f_code in frozen

    previous = sys.getprofile()
    sys.setprofile(observe)
    try:
        call()
    finally:
        sys.setprofile(previous)
    return count
