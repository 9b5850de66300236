"""The CPU's convolutions as calls (``csrc/cpu/convolution.cpp``): which kernel for these tensors, the weight in that
kernel's own form, and the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res import _extension
from fused_res.backends import registry
from fused_res.backends.cpu import onednn
from fused_res.backends.cpu.choice import Geometry, Kernel, inference_kernel
from fused_res.layout import makes_channels_last

_pack = torch.ops.fused_res_cpu.pack_conv_weight.default
convolve = torch.ops.fused_res_cpu.convolve.default


def kernel_for(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    packed: bool,
) -> Kernel:
    """The kernel of an inference. ``packed``: the weight's form is kept, and not made for this call alone."""
    others = onednn.takes(input)
    images = input.dtype == torch.float32 and input.dim() == 4 and input.numel() > 0
    ours = images and makes_channels_last(input, weight)
    if not (ours or others) or torch._C._len_torch_dispatch_stack():  # a mode that counts or records knows ATen's
        return Kernel("aten", "oneDNN does not take this dtype or shape, or a dispatch mode is on")
    geometry = Geometry(tuple(input.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    return inference_kernel(geometry, ours, packed, registry.winograd(), _extension.cpu_isa(), others)


def pack(weight: Tensor, kernel: str, stride: Sequence[int], transposed: bool = False) -> Tensor:
    """The weight as one of our kernels reads it, whatever the size of its tiles."""
    packed: Tensor = _pack(weight, stride[0] if kernel == "winograd" else 0, transposed)
    return packed


def run(
    input: Tensor,
    packed: Tensor,
    kernel: Kernel,
    shape: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    """One of our kernels, with a weight of ``shape`` that it has packed."""
    outputs, _, *taps = shape
    bias = None if bias is None else bias.contiguous()
    y, _ = convolve(input, packed, bias, residual, outputs, taps, stride, padding, dilation, kernel.tile, relu, False)
    return y
