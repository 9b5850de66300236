"""The geometry of a convolution: stride, padding, dilation and groups, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

#: Stride, padding and dilation for each spatial dimension, and the number of groups.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def conv_output_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Height, width, ... of a convolution's output, from those of its input."""
    return tuple(
        (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, spread in zip(sizes, kernel, stride, padding, dilation, strict=True)
    )


def same_padding(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...] | None:
    """The padding of ``padding="same"``; None where the two sides would differ, or a stride is not 1."""
    around = [spread * (taps - 1) for taps, spread in zip(kernel, dilation, strict=True)]
    if any(a % 2 for a in around) or any(step != 1 for step in stride):
        return None
    return tuple(a // 2 for a in around)
