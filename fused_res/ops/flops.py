"""FLOP formulas for ``torch.utils.flop_counter``, for opaque operators that contain convolutions.

In eager mode no formula is needed: blocks call ``aten.convolution`` through the dispatcher, where the counter
intercepts it. Under ``torch.compile`` a block is one opaque operator. Its formula runs the operator's implementation on
fake tensors and counts the ATen calls, so that it always agrees with the block's plan: gradients that are not required
are not counted, convolutions that a recompute level runs twice are counted twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from fused_res._torch_compat import FakeTensorMode, tree_map_only


def register(operator: Any, implementation: Callable[..., Any]) -> None:
    """Register a FLOP formula for an opaque operator: the FLOPs of its implementation.

    Args:
        operator: the overload packet, such as ``torch.ops.fused_res.block_forward``.
        implementation: the operator's Python implementation, which is run on fake tensors.
    """

    def count(*args: Any, out_val: Any = None) -> int:
        with FakeTensorMode():
            fakes = tree_map_only(Tensor, _fake, args)
            with FlopCounterMode(display=False) as counter:
                implementation(*fakes)
        return counter.get_total_flops()

    register_flop_formula(operator, get_raw=True)(count)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
