"""Geometry of convolutions and poolings: stride, padding, dilation and groups, and output-size arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

#: Stride, padding and dilation for each spatial dimension, and the number of groups.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def conv_output_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return the spatial sizes of a convolution's output.

    Args:
        sizes: spatial sizes ``(H, W, ...)`` of the input.
        kernel, stride, padding, dilation: one entry per spatial dimension.
    """
    return tuple(
        (size + 2 * pad - spacing * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, spacing in zip(sizes, kernel, stride, padding, dilation, strict=True)
    )


def same_padding(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...] | None:
    """Return the padding of ``padding="same"``, or None if the two sides would differ or a stride is not 1."""
    totals = [spacing * (taps - 1) for taps, spacing in zip(kernel, dilation, strict=True)]
    if any(total % 2 for total in totals) or any(step != 1 for step in stride):
        return None
    return tuple(total // 2 for total in totals)
