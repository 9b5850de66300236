"""Registers a launcher with the dispatcher."""

from collections.abc import Callable
from typing import Any

from fused_res import ops
from fused_res.backends.triton import devices

ops.define("fused_res_triton")


def operator(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an implementation for ``fused_res_triton::`` under its own name."""
    keys = (device.upper() for device in devices())
    return ops.operator("fused_res_triton", implementation.__name__, implementation, *keys)
