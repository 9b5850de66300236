"""Registration of the launchers as operators ``fused_res_triton::*`` of PyTorch's dispatcher."""

from collections.abc import Callable
from typing import Any

from fused_res import ops
from fused_res.backends.triton import devices

ops.define("fused_res_triton")


def register_operator(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``implementation`` under its own name, for every device of the backend.

    Returns:
        The callable to use in its place: it runs eager calls without the overhead of the dispatcher.
    """
    keys = (device.upper() for device in devices())
    return ops.register_python_operator("fused_res_triton", implementation.__name__, implementation, *keys)
