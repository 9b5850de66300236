"""Launch of the implicit-GEMM forward convolution, shared by ``conv_bias_act`` and ``conv_bn_stats``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fused_res.backends.triton.gemm_config import gemm_config, input_precision
from fused_res.backends.triton.kernels import convolution as kernels
from fused_res.backends.triton.launch import launch
from fused_res.ops.memory_format import conv_output_shape, to_memory_format

#: Triton has no float64 tensor core instructions with which a kernel could outperform ATen.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: ``BLOCK_M, BLOCK_N`` of the split-K reduction and epilogue.
_SPLIT_K_EPILOGUE_BLOCK = 32, 64
#: Largest second dimension of a CUDA grid, which is the number of groups. The first, output tiles, is at most 2^31 - 1:
#: their output would have 10^12 elements. The third is at most the number of splits.
_MAX_GROUPS = 65535


def supports(input: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels support this convolution: 2-d, 16- or 32-bit floating point, not empty."""
    if input.dim() != 4 or input.dtype not in DTYPES or input.numel() == 0 or weight.numel() == 0:
        return False
    return input.shape[1] // weight.shape[1] <= _MAX_GROUPS


def launch_convolution(
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
    """Launch the convolution and, with split-K, the reduction and epilogue.

    Returns:
        The output in channels_last memory, and with ``with_partials`` the partial statistics (count, mean, M2, low part
        of the mean) of its tiles, float32 ``(tiles, 4, channels)``, else shape ``(0,)``.
    """
    input, weight = to_memory_format(input, True), to_memory_format(weight, True)
    bias = None if bias is None else bias.contiguous()
    N, K, P, Q = conv_output_shape(input, weight, stride, padding, dilation)
    output = torch.empty((N, K, P, Q), dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    if residual is not None:
        residual = to_memory_format(residual, True)
    pixels = N * P * Q
    group_channels, R, S = weight.shape[1:]
    config = gemm_config(
        pixels,
        K // groups,
        group_channels,
        R * S,
        input.dtype,
        high_register_pressure=input_stats is not None or with_partials,
    )
    int64_offsets = max(input.numel(), output.numel()) >= 2**31

    split_k = config.splits > 1
    tiles_m = triton.cdiv(pixels, _SPLIT_K_EPILOGUE_BLOCK[0]) if split_k else config.tiles_m
    partials = input.new_empty((tiles_m, 4, K) if with_partials else (0,), dtype=torch.float32)
    target = input.new_empty((config.splits, pixels, K), dtype=torch.float32) if split_k else output
    epilogue_args = (None, None, None) if split_k else (bias, residual, partials if with_partials else None)
    launch(
        kernels.convolution_kernel, (config.tiles_m * config.tiles_n, groups, config.splits),
        input, weight, target, *epilogue_args[:2], input_stats, epilogue_args[2],
        pixels, input.shape[1], K, group_channels, K // groups, *input.shape[2:], P, Q, config.tiles_n,
        config.k_blocks_per_split, *stride, *padding, *dilation, R, S, input_relu, relu and not split_k, split_k,
        int64_offsets, input_precision(input.dtype), *config.block_shape, **config.options,
    )  # fmt: skip
    if split_k:
        tiles_n = triton.cdiv(K, _SPLIT_K_EPILOGUE_BLOCK[1])
        launch(
            kernels.split_k_epilogue_kernel, (tiles_m * tiles_n,),
            target, output, bias, residual, partials if with_partials else None, pixels, K, config.splits, tiles_n,
            relu, int64_offsets, *_SPLIT_K_EPILOGUE_BLOCK,
        )  # fmt: skip
    return output, partials
