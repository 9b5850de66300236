"""Registration of the launchers as operators ``fused_res_triton::*`` of PyTorch's dispatcher."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from fused_res import ops
from fused_res.backends.triton import devices
from fused_res.ops.schemas import SCHEMAS

ops.define("fused_res_triton")


def register_operator(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``implementation`` under its own name, for every device of the backend.

    Args:
        implementation: function of the schema's arguments, by position. It may return None for a result that is not
            requested; the operator returns an empty tensor instead.

    Returns:
        The callable to use in its place: it runs eager calls without the overhead of the dispatcher. Its attribute
        ``implementation`` is the function itself, for callers that have only plain tensors.
    """
    name = implementation.__name__
    dtypes = [torch.uint8 if result == "relu_mask" else None for result in _result_names(SCHEMAS[name])]

    @functools.wraps(implementation)
    def complete(*arguments: Any) -> Any:
        results = implementation(*arguments)
        if not isinstance(results, tuple):
            return results
        return tuple(
            [
                arguments[0].new_empty(0, dtype=dtype) if result is None else result
                for result, dtype in zip(results, dtypes, strict=True)
            ]
        )

    keys = (device.upper() for device in devices())
    call = ops.register_python_operator("fused_res_triton", name, complete, *keys)
    call.implementation = implementation  # type: ignore[attr-defined]
    return call


def _result_names(schema: str) -> list[str]:
    return re.findall(r"Tensor (\w+)", schema.partition("->")[2])
