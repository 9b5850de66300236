"""``act(conv(x, w) + bias [+ residual])`` by oneDNN, with the bias, the addition and the ReLU in its epilogue.

What it does not take (float64, sequences, 16-bit types that the processor does not know, an empty batch) is ATen's
convolution, with the rest in place on its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fused_res import ops
from fused_res.convolution import finish_in_place
from fused_res.ops import laid_out, makes_channels_last

_pointwise = torch.ops.mkldnn._convolution_pointwise.default
_binary = torch.ops.mkldnn._convolution_pointwise.binary


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


def _takes(input: Tensor) -> bool:
    return input.dim() > 3 and input.dtype in _dtypes() and input.numel() > 0 and torch._C._get_mkldnn_enabled()


def pack_weight(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor | None:
    """``weight`` in the blocked format that oneDNN wants for this input, or None where it would not be asked.

    It may stand for ``weight`` in :func:`conv_bias_act` with inputs of this shape and, as the format depends on it,
    this number of threads; for others it would be right, and up to 30 times slower.
    """
    if not _takes(input):
        return None
    return torch.ops.mkldnn._reorder_convolution_weight.default(
        weight, padding, stride, dilation, groups, list(input.shape)
    )


def _conv_bias_act(
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
    channels_last = makes_channels_last(input, weight)
    input = laid_out(input, channels_last)
    # A weight that is not packed yet is packed on every call: for one image that takes longer than is gained.
    if not weight.is_mkldnn and (input.shape[0] == 1 or not _takes(input)):
        y = torch.convolution(input, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    elif residual is None:
        y = _pointwise(input, weight, bias, padding, stride, dilation, groups, "relu" if relu else "none", [], None)
        relu = False
    elif channels_last and groups == 1:
        residual = laid_out(residual, True)
        y = _binary(
            input,
            residual,
            weight,
            bias,
            padding,
            stride,
            dilation,
            groups,
            "add",
            None,
            "relu" if relu else None,
            [],
            None,
        )
        residual, relu = None, False
    else:  # oneDNN adds in its epilogue only there
        y = _pointwise(input, weight, bias, padding, stride, dilation, groups, "none", [], None)
    return laid_out(finish_in_place(y, residual, relu), channels_last)


conv_bias_act = ops.operator("fused_res_cpu", "conv_bias_act", _conv_bias_act, "CPU")
