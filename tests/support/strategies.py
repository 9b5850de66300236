"""Hypothesis strategies: shapes, memory layouts and the arguments of convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Around the widths of vectors, panels and masks.
CHANNELS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40)


@dataclass(frozen=True)
class Layout:
    """How a tensor's values lie in memory: its dimensions from the slowest on, how many places each leaves unused
    behind every one it takes, where the first element is, and dimensions whose values all share one place."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    offset: int = 0
    shared: tuple[int, ...] = ()
    lone_stride: int | None = None  # of dimensions of size 1, where any stride is as good

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor in this layout: its values are the same but along `shared` dimensions."""
        for dim in self.shared:
            if tensor.shape[dim]:
                tensor = tensor.narrow(dim, 0, 1).expand(tensor.shape)
        strides, size = [0] * tensor.dim(), 1
        for dim in reversed(self.order):
            if dim not in self.shared:
                strides[dim] = size * self.gaps[dim]
                size = max(tensor.shape[dim], 1) * strides[dim]
            if tensor.shape[dim] == 1 and self.lone_stride is not None:
                strides[dim] = self.lone_stride
        memory = tensor.new_full((self.offset + size,), float("nan"))
        view = memory.as_strided(tensor.shape, strides, self.offset)
        if tensor.numel():
            # Where values share a place, the first of them is theirs all.
            first = tuple(slice(0, 1) if dim in self.shared else slice(None) for dim in range(tensor.dim()))
            view[first].copy_(tensor[first])
        return view


@st.composite
def layouts(draw: Any, rank: int, weight: bool = False) -> Layout:
    plain = tuple(range(rank))
    channels_last = (0, *range(2, rank), 1) if rank > 1 else plain
    usual = st.sampled_from((plain, channels_last))
    order = draw(usual if weight else usual | st.permutations(plain).map(tuple))
    if draw(st.booleans()):
        return Layout(order, (1,) * rank)
    gaps = draw(st.tuples(*[st.sampled_from((1, 1, 1, 2, 3))] * rank))
    shared = draw(st.sets(st.sampled_from(plain), max_size=2)) if not weight and draw(st.booleans()) else ()
    lone = draw(st.none() | st.sampled_from((0, 1, 7)))
    return Layout(order, gaps, draw(st.integers(0, 5)), tuple(sorted(shared)), lone)


def vectors() -> st.SearchStrategy[Layout]:
    return st.builds(lambda gap, offset: Layout((0,), (gap,), offset), st.sampled_from((1, 1, 2)), st.integers(0, 3))


@st.composite
def shapes(draw: Any, least_rank: int = 2, most_rank: int = 5) -> tuple[int, ...]:
    rank = draw(st.integers(least_rank, most_rank))
    size = st.integers(1, {2: 1, 3: 40, 4: 10, 5: 5}[rank])
    images = draw(st.sampled_from((1, 2, 3, 3, 4, 5, 40 if rank == 2 else 6)))
    shape = (images, draw(st.sampled_from(CHANNELS)), *(draw(size) for _ in range(rank - 2)))
    if draw(st.integers(0, 19)) == 0:
        empty = draw(st.sampled_from([0, *range(2, rank)]))
        shape = tuple(0 if dim == empty else size for dim, size in enumerate(shape))
    return shape


@dataclass(frozen=True)
class Convolution:
    """An input's shape, a weight's, and how they meet."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def output(self) -> tuple[int, ...]:
        taps = zip(self.input[2:], self.weight[2:], self.stride, self.padding, self.dilation, strict=True)
        sizes = ((n + 2 * pad - spread * (k - 1) - 1) // step + 1 for n, k, step, pad, spread in taps)
        return (self.input[0], self.weight[0], *sizes)


@st.composite
def convolutions(draw: Any, input: tuple[int, ...] | None = None) -> Convolution:
    """Of an input, or of any; whose output is not empty but for the batch. Every window meets the input: where one lies
    in the padding alone, oneDNN (of PyTorch 2.13, on channels_last images) reads and writes what is not its own."""
    if input is None:
        shape = draw(shapes(3, 5))
        input = (shape[0], shape[1], *(max(size, 1) for size in shape[2:]))
    rank = len(input) - 2
    groups = draw(st.sampled_from([1, 1, 1, *(g for g in (2, 3, 5, input[1]) if input[1] % g == 0)]))
    outputs = groups * draw(st.sampled_from([c for c in CHANNELS if c * groups <= 40]))
    kernel, stride, padding, dilation = [], [], [], []
    square = draw(st.booleans())  # what most kernels are for
    for dim in range(rank):
        if square and dim and input[2 + dim] == input[2]:
            for values in (kernel, stride, padding, dilation):
                values.append(values[0])
            continue
        kernel.append(draw(st.sampled_from((1, 3, 3, 2, 5) if rank < 3 else (1, 2, 3))))
        dilation.append(min(draw(st.sampled_from((1, 1, 1, 2))), input[2 + dim]))
        reach = dilation[-1] * (kernel[-1] - 1) + 1
        least = max(0, -(-(reach - input[2 + dim]) // 2))
        padding.append(draw(st.integers(least, min(reach - 1, max(least, reach // 2 + 1)))))
        stride.append(draw(st.sampled_from((1, 1, 2, 3))))
    weight = (outputs, input[1] // groups, *kernel)
    return Convolution(input, weight, tuple(stride), tuple(padding), tuple(dilation), groups)
