"""oneDNN's convolution with the bias, the addition and the ReLU in its epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fused_res.convolution import finish_in_place

_pointwise = torch.ops.mkldnn._convolution_pointwise.default


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN computes in on this processor."""
    if not torch.backends.mkldnn.is_available():
        return ()
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, yes in supported.items() if yes)


def takes(input: Tensor) -> bool:
    return input.dim() > 3 and input.dtype in _dtypes() and input.numel() > 0 and torch._C._get_mkldnn_enabled()


def pack(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """``weight`` in the blocked format that oneDNN wants for this input.

    It may stand for ``weight`` with inputs of this shape and, as the format depends on it, this number of threads; for
    others it would be right, and up to 30 times slower.
    """
    return torch.ops.mkldnn._reorder_convolution_weight.default(
        weight, padding, stride, dilation, groups, list(input.shape)
    )


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    # The addition in place afterwards: oneDNN's own, which copies the residual first, takes 1.2x as long on large maps.
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were
    act = "relu" if relu and residual is None else "none"
    y = _pointwise(input, weight, bias, padding, stride, dilation, groups, act, [], None)
    return finish_in_place(y, residual, relu and residual is not None)
