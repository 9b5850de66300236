"""The launch that ``conv_bias_act`` and ``conv_bn_stats`` have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fused_res.backends.triton.kernels import convolution as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.products import precision, product
from fused_res.ops.memory_format import convolved, laid_out

#: float64 has no matrix instructions in Triton that would beat ATen's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Tile of the pass that adds up splits.
_EPILOGUE = 32, 64


def takes(input: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this convolution: images in 16 or 32 bits, something to compute."""
    return input.dim() == 4 and input.dtype in DTYPES and input.numel() > 0 and weight.numel() > 0


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    with_partials: bool,
) -> tuple[Tensor, Tensor]:
    """The output, channels_last, and the partial statistics of its tiles (or nothing)."""
    input, weight = laid_out(input, True), laid_out(weight, True)
    N, K, P, Q = convolved(input, weight, stride, padding, dilation)
    output = torch.empty((N, K, P, Q), dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    if residual is not None:
        residual = laid_out(residual, True)
    rows = N * P * Q
    group_channels, R, S = weight.shape[1:]
    cut = product(
        rows, K // groups, group_channels, R * S, input.dtype, formed=input_stats is not None or with_partials
    )
    large = max(input.numel(), output.numel()) >= 2**31

    split = cut.splits > 1
    row_tiles = triton.cdiv(rows, _EPILOGUE[0]) if split else cut.row_tiles
    partials = input.new_empty((row_tiles, 4, K) if with_partials else (0,), dtype=torch.float32)
    target = input.new_empty((cut.splits, rows, K), dtype=torch.float32) if split else output
    behind = (None, None, None) if split else (bias, residual, partials if with_partials else None)
    launch(
        kernels.convolution_kernel, (cut.row_tiles * cut.col_tiles, groups, cut.splits),
        input, weight, target, *behind[:2], input_stats, behind[2],
        rows, input.shape[1], K, group_channels, K // groups, *input.shape[2:], P, Q, cut.col_tiles,
        cut.chunks_per_split, *stride, *padding, *dilation, R, S, input_relu, relu and not split, split, large,
        precision(input.dtype), *cut.blocks, **cut.options,
    )  # fmt: skip
    if split:
        col_tiles = triton.cdiv(K, _EPILOGUE[1])
        launch(
            kernels.split_epilogue_kernel, (row_tiles * col_tiles,),
            target, output, bias, residual, partials if with_partials else None, rows, K, cut.splits, col_tiles,
            relu, large, *_EPILOGUE,
        )  # fmt: skip
    return output, partials
