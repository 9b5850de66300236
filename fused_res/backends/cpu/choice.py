"""Which kernel computes a convolution on the CPU: two rules of shapes alone.

Ours are for float32 images in channels_last memory, without groups: Winograd's tiles for 3x3 kernels with stride 1 or
2 (``csrc/cpu/isa/winograd.h``), a direct product for all else (``direct.h``). Whatever they do not take is oneDNN's
with its epilogue, or ATen's.

There are two rules because there are two questions. In inference (:func:`inference_kernel`) a weight is packed once,
and what counts is multiply-adds. In training (:func:`training_kernels`) it is packed for every step, there are
gradients as well, and fresh memory costs as much as the arithmetic: there the rule is what measured faster than ATen's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fused_res.choice import has_winograd
from fused_res.spec import convolved_sizes

#: What a number of a weight costs to read, and to pack, in multiply-adds.
_READ, _PACK_DIRECT, _PACK_WINOGRAD = 10, 60, 100
#: What a factor costs to transform, in multiply-adds of one output or input channel each.
_TRANSFORM = 8

#: Fewer channels leave a part of every instruction idle.
_LEAST_CHANNELS = 16
#: Output pixels from which the larger weight of Winograd is worth its transform, which is made on every step.
_WINOGRAD_PIXELS = 128
#: Elements of a float32 tensor of 32 MB. The C library gives a larger one fresh memory every time, whose page faults
#: take as long as a 1x1 convolution; our outputs come from a cache.
_LARGE = 1 << 23


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

    @property
    def output(self) -> tuple[int, ...]:
        """Height and width of the output."""
        return convolved_sizes(self.input[2:], self.weight[2:], self.stride, self.padding, self.dilation)

    @property
    def has_winograd(self) -> bool:
        return has_winograd(self.weight, self.stride, self.dilation)


@lru_cache(maxsize=4096)
def inference_kernel(
    geometry: Geometry, ours: bool, packed: bool, winograd: bool, isa: str, others: bool = True
) -> Kernel:
    """The kernel with the fewest multiply-adds, those counted in that reading and transforming a weight takes.

    ``ours``: dtype and memory format are those of our kernels. ``packed``: the weight's form is kept from call to call.
    ``others``: oneDNN takes the dtype.
    """
    images, channels, *_ = geometry.input
    outputs, _, *taps = geometry.weight
    elsewhere = "onednn" if others and (packed or images > 1) else "aten"
    if not ours:
        return Kernel(elsewhere, "ours are for float32 images in channels_last memory")
    if geometry.groups > 1:
        return Kernel(elsewhere, "grouped")
    if isa == "baseline":
        return Kernel(elsewhere, "ours need AVX2")
    height, width = geometry.output
    pixels = images * height * width
    # Costs in multiply-adds for each pair of an input and an output channel.
    count = taps[0] * taps[1]
    direct = count * (pixels + _READ + (0 if packed else _PACK_DIRECT))
    if not geometry.has_winograd:
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


class TrainingKernels(NamedTuple):
    """``"winograd"``, ``"direct"`` or ``"aten"``: who computes a convolution on the CPU, and its two gradients."""

    forward: str = "aten"
    input_gradient: str = "aten"
    weight_gradient: str = "aten"


@lru_cache(maxsize=4096)
def training_kernels(geometry: Geometry, winograd: bool) -> TrainingKernels:
    """Which kernels measured faster in training on the CPU, weights packed on every step.

    Two Zen 4 cores, AVX-512, the shapes of ResNet-18 and ResNet-50 at batch 16; ms of ATen's, and ours:

    ======================  ==================  ===================  ===================
    kernel                  forward             gradient of input    gradient of weight
    ======================  ==================  ===================  ===================
    3x3, Winograd           17-19, 7-13         16-17, 6-11          17-36, 8-11
    3x3 with stride 2       direct 9-19, 6-13   no kernel            12-28, 9-17
    1x1                     8-22, 9-19          9-30, 8-17           10-25, 10-21
    7x7, over 32 MB         33, 24              no kernel            a tie
    ======================  ==================  ===================  ===================

    A 1x1's forward brings the statistics, too. Its weight's gradient with stride 1 and more than 128 channels is faster
    by itself, but not in a step of ResNet-50: 1.80 s at best with ATen's, 1.89 s with ours.
    """
    images, channels, *size = geometry.input
    outputs, _, *taps = geometry.weight
    height, width = geometry.output
    pixels = images * height * width
    if pixels < _WINOGRAD_PIXELS:
        return TrainingKernels()
    if winograd and geometry.has_winograd and min(outputs, channels) >= _LEAST_CHANNELS:
        # With stride 1 the gradient of the input is a convolution with 2 - padding.
        backward = geometry.stride == (1, 1) and max(geometry.padding) <= 2
        return TrainingKernels("winograd", "winograd" if backward else "aten", "winograd")
    weight_gradient = max(taps) <= 3 and channels >= _LEAST_CHANNELS and (geometry.stride != (1, 1) or channels <= 128)
    if taps == [1, 1] and not any(geometry.padding) and min(outputs, channels) >= _LEAST_CHANNELS:
        return TrainingKernels("direct", "direct", "direct" if weight_gradient else "aten")
    return TrainingKernels(
        "direct" if pixels * outputs > _LARGE else "aten",
        "direct" if images * channels * size[0] * size[1] > _LARGE and geometry.stride == (1, 1) else "aten",
        "direct" if weight_gradient else "aten",
    )
