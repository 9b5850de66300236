"""Hypothesis strategies for shapes, memory layouts and the arguments of convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Channel counts around the widths of vectors, GEMM panels and packed masks.
CHANNELS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40)


@dataclass(frozen=True)
class StridedLayout:
    """A strided memory layout.

    Args:
        dim_order: the dimensions, from the slowest-varying on.
        stride_multiples: factor of each dimension's dense stride; more than 1 leaves gaps.
        offset: storage offset of the first element.
        broadcast_dims: dimensions of stride 0.
        unit_dim_stride: stride of dimensions of size 1, or None for the dense one.
    """

    dim_order: tuple[int, ...]
    stride_multiples: tuple[int, ...]
    offset: int = 0
    broadcast_dims: tuple[int, ...] = ()
    unit_dim_stride: int | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a copy of the tensor in this layout; along `broadcast_dims` its first values are repeated."""
        for dim in self.broadcast_dims:
            if tensor.shape[dim]:
                tensor = tensor.narrow(dim, 0, 1).expand(tensor.shape)
        strides, size = [0] * tensor.dim(), 1
        for dim in reversed(self.dim_order):
            if dim not in self.broadcast_dims:
                strides[dim] = size * self.stride_multiples[dim]
                size = max(tensor.shape[dim], 1) * strides[dim]
            if tensor.shape[dim] == 1 and self.unit_dim_stride is not None:
                strides[dim] = self.unit_dim_stride
        memory = tensor.new_full((self.offset + size,), float("nan"))
        view = memory.as_strided(tensor.shape, strides, self.offset)
        if tensor.numel():
            # Broadcast dimensions have one element of memory: copy their first index only.
            first = tuple(slice(0, 1) if dim in self.broadcast_dims else slice(None) for dim in range(tensor.dim()))
            view[first].copy_(tensor[first])
        return view


@st.composite
def layouts(draw: Any, rank: int, weight: bool = False) -> StridedLayout:
    contiguous = tuple(range(rank))
    channels_last = (0, *range(2, rank), 1) if rank > 1 else contiguous
    memory_format = st.sampled_from((contiguous, channels_last))
    dim_order = draw(memory_format if weight else memory_format | st.permutations(contiguous).map(tuple))
    if draw(st.booleans()):
        return StridedLayout(dim_order, (1,) * rank)
    multiples = draw(st.tuples(*[st.sampled_from((1, 1, 1, 2, 3))] * rank))
    broadcast = draw(st.sets(st.sampled_from(contiguous), max_size=2)) if not weight and draw(st.booleans()) else ()
    unit_dim_stride = draw(st.none() | st.sampled_from((0, 1, 7)))
    return StridedLayout(dim_order, multiples, draw(st.integers(0, 5)), tuple(sorted(broadcast)), unit_dim_stride)


def vectors() -> st.SearchStrategy[StridedLayout]:
    """Layouts of 1-d tensors."""
    return st.builds(
        lambda multiple, offset: StridedLayout((0,), (multiple,), offset), st.sampled_from((1, 1, 2)), st.integers(0, 3)
    )


@st.composite
def shapes(draw: Any, min_rank: int = 2, max_rank: int = 5) -> tuple[int, ...]:
    rank = draw(st.integers(min_rank, max_rank))
    size = st.integers(1, {2: 1, 3: 40, 4: 10, 5: 5}[rank])
    batch = draw(st.sampled_from((1, 2, 3, 3, 4, 5, 40 if rank == 2 else 6)))
    shape = (batch, draw(st.sampled_from(CHANNELS)), *(draw(size) for _ in range(rank - 2)))
    if draw(st.integers(0, 19)) == 0:
        empty = draw(st.sampled_from([0, *range(2, rank)]))
        shape = tuple(0 if dim == empty else size for dim, size in enumerate(shape))
    return shape


@dataclass(frozen=True)
class Convolution:
    """The shapes and options of a convolution."""

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def output_shape(self) -> tuple[int, ...]:
        dims = zip(self.input_shape[2:], self.weight_shape[2:], self.stride, self.padding, self.dilation, strict=True)
        sizes = ((n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n, k, stride, pad, dilation in dims)
        return (self.input_shape[0], self.weight_shape[0], *sizes)


@st.composite
def convolutions(draw: Any, input: tuple[int, ...] | None = None) -> Convolution:
    """Convolutions of an input shape (default: any shape), whose output is empty only if the batch is.

    Every window overlaps the input: for a window inside the padding, oneDNN (PyTorch 2.13, channels_last) accesses
    memory out of bounds.
    """
    if input is None:
        shape = draw(shapes(3, 5))
        input = (shape[0], shape[1], *(max(size, 1) for size in shape[2:]))
    rank = len(input) - 2
    groups = draw(st.sampled_from([1, 1, 1, *(g for g in (2, 3, 5, input[1]) if input[1] % g == 0)]))
    outputs = groups * draw(st.sampled_from([c for c in CHANNELS if c * groups <= 40]))
    kernel, stride, padding, dilation = [], [], [], []
    square = draw(st.booleans())  # most kernels are for equal parameters in all dimensions
    for dim in range(rank):
        if square and dim and input[2 + dim] == input[2]:
            for values in (kernel, stride, padding, dilation):
                values.append(values[0])
            continue
        kernel.append(draw(st.sampled_from((1, 3, 3, 2, 5) if rank < 3 else (1, 2, 3))))
        dilation.append(min(draw(st.sampled_from((1, 1, 1, 2))), input[2 + dim]))
        extent = dilation[-1] * (kernel[-1] - 1) + 1
        min_padding = max(0, -(-(extent - input[2 + dim]) // 2))
        padding.append(draw(st.integers(min_padding, min(extent - 1, max(min_padding, extent // 2 + 1)))))
        stride.append(draw(st.sampled_from((1, 1, 2, 3))))
    weight = (outputs, input[1] // groups, *kernel)
    return Convolution(input, weight, tuple(stride), tuple(padding), tuple(dilation), groups)
