"""Lets ``torch.utils.flop_counter`` count operators that hide convolutions.

In eager mode there is nothing to do: blocks call ``aten.convolution`` through the dispatcher, where the
counter sees it. Under ``torch.compile`` a block is one opaque operator. Its formula runs the operator's own
implementation on fake tensors and counts what that calls, so that it can never disagree with what the plan
decides: gradients that nobody asked for, convolutions that a recompute level runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from fused_res._torch_compat import FakeTensorMode, tree_map_only


def register(operator: Any, implementation: Callable[..., Any]) -> None:
    """Counts ``operator``, an overload packet such as ``torch.ops.fused_res.block_forward``, as its
    implementation."""

    def count(*args: Any, out_val: Any = None) -> int:
        with FakeTensorMode():
            fakes = tree_map_only(Tensor, _fake, args)
            with FlopCounterMode(display=False) as counter:
                implementation(*fakes)
        return counter.get_total_flops()

    register_flop_formula(operator, get_raw=True)(count)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
