"""oneDNN convolution with bias and ReLU in its epilogue, called through PyTorch's ``mkldnn`` operators."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fused_res import _torch_compat
from fused_res.dispatch import PackedWeight, Problem
from fused_res.dispatch.convolution import apply_epilogue_
from fused_res.ops.geometry import Geometry
from fused_res.ops.memory_format import conv_output_is_channels_last, to_memory_format


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    supported = {
        torch.float32: True,
        torch.bfloat16: _torch_compat.mkldnn_supports_bf16(),
        torch.float16: _torch_compat.mkldnn_supports_fp16(),
    }
    return tuple(dtype for dtype, is_supported in supported.items() if is_supported)


def dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes that oneDNN supports on this processor; none if ``torch.backends.mkldnn.flags`` disables it."""
    return _dtypes() if _torch_compat.mkldnn_enabled() else ()


def unsupported_reason(problem: Problem) -> str | None:
    if problem.under_torch_dispatch:
        return "a dispatch mode or a tensor subclass requires ATen's operators"
    if problem.dtype not in problem.machine.onednn_dtypes or len(problem.input) < 4 or 0 in problem.input:
        return "oneDNN does not support this dtype or shape on this processor"
    depthwise_volume = len(problem.input) == 5 and problem.input[1] == problem.geometry[3]
    wrong = not _torch_compat.mkldnn_supports_bf16_depthwise_volumes()
    if wrong and depthwise_volume and problem.dtype == torch.bfloat16:
        return "the oneDNN of this torch computes wrong results for bfloat16 volumes with one channel per group"
    return None


def pack(problem: Problem, weight: Tensor) -> Tensor:
    """Return `weight` reordered into oneDNN's blocked format for this problem.

    The format depends on the input's shape and the number of threads. With another shape or thread count the result is
    still correct, but the convolution is up to 30 times slower.
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
    channels_last = packed or conv_output_is_channels_last(input, operand)
    input = to_memory_format(input, channels_last)
    if residual is not None:
        residual = to_memory_format(residual, channels_last)
    bias = None if bias is None else bias.contiguous()  # oneDNN assumes a contiguous bias
    # The residual is added in place afterwards: PyTorch's oneDNN operator with a fused addition copies the residual
    # first and takes 1.2x as long on large feature maps.
    act = "relu" if relu and residual is None else "none"
    y = _torch_compat.mkldnn_convolution(input, operand, bias, geometry, act)
    return to_memory_format(apply_epilogue_(y, residual, relu and residual is not None), channels_last)
