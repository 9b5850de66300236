"""oneDNN's convolution with the bias and the ReLU in its epilogue, by way of PyTorch's ``mkldnn`` operators."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fused_res import _torch_compat
from fused_res.dispatch import PackedWeight, Problem
from fused_res.dispatch.convolution import finish_in_place
from fused_res.ops.geometry import Geometry
from fused_res.ops.memory_format import laid_out, makes_channels_last


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    supported = {
        torch.float32: True,
        torch.bfloat16: _torch_compat.mkldnn_computes_bf16(),
        torch.float16: _torch_compat.mkldnn_computes_fp16(),
    }
    return tuple(dtype for dtype, yes in supported.items() if yes)


def dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN computes in on this processor, now: ``torch.backends.mkldnn.flags`` can disable it."""
    return _dtypes() if _torch_compat.mkldnn_enabled() else ()


def supports(problem: Problem) -> str | None:
    if problem.traced:
        return "a dispatch mode or a tensor subclass sees ATen's operators only"
    if problem.dtype not in problem.machine.onednn or len(problem.input) < 4 or 0 in problem.input:
        return "oneDNN does not compute this dtype or shape here"
    return None


def pack(problem: Problem, input: Tensor, weight: Tensor) -> Tensor:
    """``weight`` in the blocked format of oneDNN for this problem.

    It may stand for ``weight`` with inputs of this shape and this number of threads; for others it would be right, and
    up to 30 times slower.
    """
    return _torch_compat.mkldnn_reorder_weight(weight, problem.geometry, problem.input)


def conv_bias_act(
    input: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    packed = isinstance(weight, PackedWeight)
    operand = weight.tensor if isinstance(weight, PackedWeight) else weight
    channels_last = packed or makes_channels_last(input, operand)
    input = laid_out(input, channels_last)
    if residual is not None:
        residual = laid_out(residual, channels_last)
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were
    # The addition in place afterwards: oneDNN's own, which copies the residual first, takes 1.2x as long on large maps.
    act = "relu" if relu and residual is None else "none"
    y = _torch_compat.mkldnn_convolution(input, operand, bias, geometry, act)
    return laid_out(finish_in_place(y, residual, relu and residual is not None), channels_last)
