"""Launcher of ``conv_dgrad``, the gradient of a 1x1 convolution's input.

A GEMM with M = pixels, N = input channels, K = output channels; its contract is in :mod:`fused_res.ops.schemas`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.implicit_gemm import machine
from fused_res.backends.reference import conv_dgrad as reference
from fused_res.backends.triton.batch_norm_sync import sum_partials
from fused_res.backends.triton.convolution import supports
from fused_res.backends.triton.gemm_config import gemm_config, input_precision
from fused_res.backends.triton.kernels import conv1x1_backward as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.registration import register_operator
from fused_res.ops.memory_format import to_memory_format


@register_operator
def conv_dgrad(
    grad_output: Tensor,
    output: Tensor | None,
    stats: Tensor | None,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
    weight: Tensor,
    input: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    added: Tensor | None = None,
    added_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not supports(grad_output, weight):
        norm = grad_output, output, stats, relu_mask, relu, sums, count
        return reference.conv_dgrad(*norm, weight, input, input_stats, input_relu, added, added_mask)
    grad_output, dtype = to_memory_format(grad_output, True), grad_output.dtype
    output = None if output is None else to_memory_format(output, True)
    out_channels, channels = weight.shape[:2]
    N, _, P, Q = grad_output.shape
    pixels = N * P * Q
    grad_input = torch.empty(
        (N, channels, P, Q), dtype=dtype, device=grad_output.device, memory_format=torch.channels_last
    )
    input_norm = input is not None and input_stats is not None
    fused_with_norm = output is not None or input_norm
    config = gemm_config(pixels, channels, out_channels, 1, dtype, high_register_pressure=fused_with_norm)
    if output is not None and not input_norm and machine().isa == "sm_90":
        # Registers leave room for one program on a multiprocessor, which must have 30 KB in flight on its own. On other
        # architectures a fourth stage spills, or has not been compiled.
        config = config._replace(num_stages=4)
    x = to_memory_format(input, True) if input_norm else None  # type: ignore[arg-type]
    partials = grad_output.new_empty((config.tiles_m, 2, channels) if input_norm else (0,), dtype=torch.float32)
    launch(
        kernels.dgrad_kernel, (config.tiles_m * config.tiles_n,),
        grad_output, output, stats, relu_mask, sums, weight.flatten(1).contiguous(), grad_input, x,
        input_stats if input_norm else None, partials if input_norm else None,
        None if added is None else to_memory_format(added, True), added_mask,
        pixels, channels, out_channels, count, config.tiles_n,
        relu, input_relu, max(grad_output.numel(), grad_input.numel()) >= 2**31, input_precision(dtype),
        *config.block_shape, **config.options,
    )  # fmt: skip
    return grad_input, sum_partials(partials) if input_norm else partials
