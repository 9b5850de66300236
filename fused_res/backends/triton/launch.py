"""Launch of Triton kernels: every launch of this backend goes through :func:`launch`, where it can be intercepted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]
#: Called with (kernel, grid, arguments, options) in place of the launch.
LaunchInterceptor = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]

_interceptor: LaunchInterceptor | None = None


def launch(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Launch ``kernel`` asynchronously on the device of its first tensor, on that device's current stream.

    The compiler must not contract multiplications and additions: kernels call ``fma`` explicitly. Contraction depends
    on the surrounding code, but the normalized value that a backward recomputes has to equal the forward's bitwise.
    """
    options["enable_fp_fusion"] = False
    if _interceptor is not None:
        _interceptor(kernel, grid, arguments, options)
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    # Triton launches on the current device, which may differ from the tensors' device.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


@contextlib.contextmanager
def intercept_launches(interceptor: LaunchInterceptor) -> Iterator[None]:
    """Pass every launch in this context to ``interceptor`` instead of running it; tensors may be on the meta device."""
    global _interceptor
    previous, _interceptor = _interceptor, interceptor
    try:
        yield
    finally:
        _interceptor = previous
