"""Which kernel computes a convolution on the CPU, and its weight in that kernel's own form.

Ours are for float32 images in channels_last memory, without groups: Winograd's tiles for 3x3 kernels with stride 1 or
2 (``csrc/cpu/isa/winograd.h``), a direct product for all else (``direct.h``). Whatever they do not take, or where they
measure slower, is oneDNN's with its epilogue, or ATen's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import _extension
from fused_res.backends import registry
from fused_res.backends.cpu import onednn
from fused_res.choice import has_winograd
from fused_res.ops import makes_channels_last

_pack = torch.ops.fused_res_cpu.pack_conv_weight.default
convolve = torch.ops.fused_res_cpu.convolve.default

#: Outputs whose weights lie together: fewer leave a part of every instruction idle.
_PANEL = 32
#: What a number of a weight costs to read, and to pack, in multiply-adds.
_READ, _PACK_DIRECT, _PACK_WINOGRAD = 10, 60, 100
#: What a factor costs to transform, in multiply-adds of one output or input channel each.
_TRANSFORM = 8


class Kernel(NamedTuple):
    """``"winograd"`` (in tiles of ``tile`` outputs a side), ``"direct"``, ``"onednn"`` or ``"aten"``, and why."""

    name: str
    reason: str
    tile: int = 0

    @property
    def ours(self) -> bool:
        return self.name in ("winograd", "direct")

    def __str__(self) -> str:
        return (
            f"Winograd F({self.tile}x{self.tile})"
            if self.tile
            else {"onednn": "oneDNN", "aten": "ATen"}.get(self.name, self.name)
        )


class Geometry(NamedTuple):
    """All that the choice depends on: shapes ``(N, C, H, W)`` and ``(K, C / groups, kh, kw)``, and how they meet."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def kernel_for(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    packed: bool,
) -> Kernel:
    """``packed``: the weight's form is kept, and not made for this call alone."""
    others = onednn.takes(input)
    images = input.dtype == torch.float32 and input.dim() == 4 and input.numel() > 0
    ours = images and makes_channels_last(input, weight)
    if not (ours or others) or torch._C._len_torch_dispatch_stack():  # a mode that counts or records knows ATen's
        return Kernel("aten", "oneDNN does not take this dtype or shape, or a dispatch mode is on")
    geometry = Geometry(tuple(input.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    return choose(geometry, ours, packed, registry.winograd(), _extension.cpu_isa(), others)


@lru_cache(maxsize=4096)
def choose(geometry: Geometry, ours: bool, packed: bool, winograd: bool, isa: str, others: bool = True) -> Kernel:
    """The choice, as far as shapes decide it. ``ours``: dtype and memory format are those of our kernels."""
    images, channels, *size = geometry.input
    outputs, _, *taps = geometry.weight
    elsewhere = "onednn" if others and (packed or images > 1) else "aten"
    if not ours:
        return Kernel(elsewhere, "ours are for float32 images in channels_last memory")
    if geometry.groups > 1:
        return Kernel(elsewhere, "grouped")
    if isa == "baseline":
        return Kernel(elsewhere, "ours need AVX2")
    height, width = (
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(
            size, taps, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    )
    pixels = images * height * width
    # Costs in multiply-adds for each pair of an input and an output channel.
    count = taps[0] * taps[1]
    direct = count * (pixels + _READ + (0 if packed else _PACK_DIRECT))
    if not has_winograd(geometry.weight, geometry.stride, geometry.dilation):
        what = "x".join(map(str, taps))
        spread = f", stride {max(geometry.stride)}" * (max(geometry.stride) > 1) + ", dilated" * (
            geometry.dilation != (1, 1)
        )
        return Kernel("direct", f"{what}{spread}: one product, with its epilogue")
    if not winograd:
        return Kernel("direct", "Winograd is switched off")
    costs: dict[int, float] = {0: direct}
    for tile in (4, 2):
        products = images * _products(height, tile, geometry.stride[0]) * _products(width, tile, geometry.stride[0])
        transforms = products * _TRANSFORM * (1 / channels + 1 / outputs)
        costs[tile] = products + transforms + (tile + 2) ** 2 * _READ + (0 if packed else 36 * _PACK_WINOGRAD)
    best = min(costs, key=costs.__getitem__)
    if best == 0:
        return Kernel("direct", "too few pixels or channels to pay for Winograd's transforms and larger weight")
    saved = direct / costs[best]
    reason = f"{saved:.1f}x fewer operations" if best == 4 else "a small image: reads less of the weight than F(4x4)"
    return Kernel("winograd", reason, best)


def _products(size: int, tile: int, stride: int) -> int:
    """Along one side of an image; the last tile may be smaller."""
    whole, rest = divmod(size, tile)
    tiles = [tile] * whole + [max(rest, 2)] * (rest > 0)
    return sum((m - 1) * stride + 3 for m in tiles)


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
