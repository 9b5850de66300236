"""The one place where a Triton kernel is launched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]
#: Gets (kernel, grid, arguments, options) instead of the GPU.
Observer = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]

_observer: Observer | None = None


def launch(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Runs ``kernel`` on the device of its first tensor, on that device's current stream, without waiting for it.

    Multiplications and additions are contracted only where a kernel says ``fma``: the normalise of a backward has to
    have the bits of the forward's, whatever surrounds it.
    """
    options["enable_fp_fusion"] = False
    if _observer is not None:
        _observer(kernel, grid, arguments, options)
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Hands every launch inside to ``observer`` and runs none; the tensors may be on the meta device."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous
