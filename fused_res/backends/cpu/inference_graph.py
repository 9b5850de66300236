"""Inference graphs: consecutive blocks, and the pooling and classifier after them, as one call.

All intermediate values are in one arena. :func:`plan` selects the convolution algorithms, assigns every intermediate
value an arena offset from its live range and encodes the steps for the C++ graph executor (``csrc/cpu``). A linear
layer is a 1x1 convolution of the pooled image. The executor runs the batch in chunks, each through all
layers, so that the arena's size is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fused_res import _extension
from fused_res.backends.cpu.convolution import ALGORITHMS, KERNELS
from fused_res.backends.cpu.operators import conv_program
from fused_res.dispatch import Machine, Problem, Selection, select
from fused_res.ops.geometry import conv_output_sizes
from fused_res.spec import BlockSpec, GlobalAveragePoolSpec, PoolSpec, UnitSpec

#: Bound on the arena in bytes. Larger chunks of the batch are not faster with 32 MB of L3. With 300 MB, the bound keeps
#: a chunk's values in the quarter of the L3 up to which they are not streamed (``csrc/cpu/caches.h``).
_MAX_ARENA_BYTES = 64 << 20
#: Locations outside the arena, kinds of steps, and the names of a step's fields, defined in csrc/cpu.
_INPUT, _OUTPUT, _NO_OPERAND = _extension.cpp.GRAPH_LOCATIONS
_CONVOLUTION, _MAX_POOL, _GLOBAL_AVERAGE_POOL = _extension.cpp.GRAPH_STEP_KINDS
_FIELDS = _extension.cpp.GRAPH_STEP_FIELDS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class InferenceGraph:
    """A planned graph for one input shape.

    Args:
        selections, problems: algorithm and problem of each convolution, block by block, a block's projection last.
        steps: the encoded steps.
        arena_elements: elements of the arena per batch element.
        chunk_size: batch elements that run through the graph at a time.
        output_shape: shape of the output.
    """

    selections: tuple[Selection, ...]
    problems: tuple[Problem, ...]
    steps: tuple[int, ...]
    arena_elements: int
    chunk_size: int
    output_shape: Shape

    def run(self, input: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """Run the graph on `input` with the packed weights and biases of its convolutions."""
        output: Tensor = conv_program(
            input, packed, biases, self.steps, self.arena_elements, self.chunk_size, self.output_shape
        )
        return output


@dataclass(frozen=True)
class _GraphNode:
    """One convolution or pooling of the graph.

    Value 0 is the graph's input, node i produces value i + 1, and the last value is the graph's output.
    """

    spec: UnitSpec | PoolSpec | GlobalAveragePoolSpec
    input_value: int
    residual: int | None  # the value that is added
    weight_index: int  # -1 for a pooling


@lru_cache(maxsize=1024)
def plan(
    blocks: tuple[BlockSpec | GlobalAveragePoolSpec, ...],
    weights: tuple[Shape, ...],
    input: Shape,
    dtype: torch.dtype,
    winograd: bool,
    machine: Machine,
    preference: str = "planned",
) -> InferenceGraph | None:
    """Plan the graph of `blocks` for one input shape; cached.

    Args:
        blocks: the blocks and global poolings, in order.
        weights: shapes of all weights, block by block, a projection's after the others of its block.
        input: shape ``(N, C, H, W)``.
        dtype: float32, bfloat16 or float16, of the input and all values.
        winograd: whether Winograd algorithms are allowed.
        machine: the processor.
        preference: the algorithm preference, see :func:`fused_res.dispatch.select`.

    Returns:
        The graph, or None if a shape is invalid or a convolution falls back to oneDNN or ATen.
    """
    nodes = _graph_nodes(blocks)
    batch, *sample = input
    if batch == 0:
        return None
    shapes: list[Shape] = [tuple(sample)]
    selections: dict[int, Selection] = {}
    problems: dict[int, Problem] = {}
    for node in nodes:
        channels, *size = shapes[node.input_value]
        if isinstance(node.spec, GlobalAveragePoolSpec):
            shapes.append((channels, 1, 1))
            continue
        if isinstance(node.spec, PoolSpec):
            pool = node.spec
            shapes.append((channels, *conv_output_sizes(size, pool.kernel_size, pool.stride, pool.padding, (1, 1))))
            continue
        spec, weight = node.spec, weights[node.weight_index]
        if weight[1] * spec.groups != channels:
            return None
        problem = Problem(
            "inference", (batch, channels, *size), weight, *spec.geometry, dtype, "cpu", True, prepacked=True,
            residual=node.residual is not None, allow_winograd=winograd, machine=machine,
        )  # fmt: skip
        problems[node.weight_index], selections[node.weight_index] = problem, select(ALGORITHMS, problem, preference)
        if selections[node.weight_index].name not in KERNELS:
            return None
        shapes.append((weight[0], *problem.output_size))
    if any(size < 1 for shape in shapes for size in shape):
        return None
    offsets, arena = _plan_arena(nodes, [prod(shape) for shape in shapes])
    steps = [
        value
        for index, node in enumerate(nodes)
        for value in _encode_step(node, index, offsets, shapes[node.input_value], weights, selections)
    ]
    return InferenceGraph(
        tuple(selections[index] for index in sorted(selections)),
        tuple(problems[index] for index in sorted(problems)),
        tuple(steps),
        arena,
        max(1, min(batch, _MAX_ARENA_BYTES // max(arena * dtype.itemsize, 1))),
        (batch, *shapes[-1]),
    )


def _graph_nodes(blocks: Sequence[BlockSpec | GlobalAveragePoolSpec]) -> list[_GraphNode]:
    nodes: list[_GraphNode] = []
    weight_index = 0
    for block in blocks:
        if isinstance(block, GlobalAveragePoolSpec):
            nodes.append(_GraphNode(block, len(nodes), None, -1))
            continue
        block_input = len(nodes)
        residual = block_input if block.shortcut == "identity" else None
        if block.projection is not None:
            nodes.append(_GraphNode(block.projection, block_input, None, weight_index + len(block.units)))
            residual = len(nodes)
        value = block_input
        for index, unit in enumerate(block.units):
            last = index == len(block.units) - 1
            nodes.append(_GraphNode(unit, value, residual if last else None, weight_index + index))
            value = len(nodes)
        if block.pool is not None:
            nodes.append(_GraphNode(block.pool, value, None, -1))
        weight_index += len(block.convolutions)
    return nodes


def _plan_arena(nodes: Sequence[_GraphNode], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Assign each value an arena offset; values with disjoint live ranges may share memory.

    Args:
        nodes: the graph's nodes.
        sizes: elements of each value per batch element.

    Returns:
        The location of each value (an arena offset in elements per batch element, the graph's input or its output), and
        the arena's size. Offsets are assigned first-fit in the order of definition.
    """
    output = len(nodes)
    last_use = dict.fromkeys(range(output + 1), output)
    for index, node in enumerate(nodes):
        for value in (node.input_value, node.residual):
            if value is not None:
                last_use[value] = index
    # A residual that is last used by an addition is overwritten in place by the sum, element by element, unless it is
    # also the convolution's input, which is read while the sum is written.
    alias_of = list(range(output + 1))
    for index in reversed(range(output)):
        residual = nodes[index].residual
        if residual and last_use[residual] == index and residual != nodes[index].input_value:
            alias_of[residual] = alias_of[index + 1]
    live_ranges: dict[int, tuple[int, int]] = {}
    for value in range(1, output + 1):
        begin, end = live_ranges.get(alias_of[value], (value - 1, 0))
        live_ranges[alias_of[value]] = begin, max(end, last_use[value])
    offsets: dict[int, int] = {0: _INPUT, output: _OUTPUT}
    for value, (begin, end) in live_ranges.items():
        if value == output:
            continue
        occupied = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other, (first, last) in live_ranges.items()
            if other in offsets and other != output and first <= end and begin <= last
        )
        offset = 0
        for low, high in occupied:
            if offset + sizes[value] <= low:
                break
            offset = max(offset, high)
        offsets[value] = offset
    arena = max((offsets[value] + sizes[value] for value in live_ranges if value != output), default=0)
    return [offsets[alias_of[value]] for value in range(output + 1)], arena


def _encode_step(
    node: _GraphNode,
    index: int,
    offsets: Sequence[int],
    input_shape: Shape,
    weights: Sequence[Shape],
    selections: dict[int, Selection],
) -> list[int]:
    """Return one step as a flat list of integers, in the order of the C++ structure's fields."""
    spec = node.spec
    step: dict[str, Any] = dict(zip(("channels", "height", "width"), input_shape, strict=True))
    step |= {
        "input": offsets[node.input_value],
        "output": offsets[index + 1],
        "residual": _NO_OPERAND if node.residual is None else offsets[node.residual],
        "weight": node.weight_index,
        "out_channels": input_shape[0],
        "dilation": (1, 1),
    }
    if isinstance(spec, UnitSpec):
        out_channels, _, *kernel_size = weights[node.weight_index]
        tile, bf16_products = KERNELS[selections[node.weight_index].name]
        step |= {
            "kind": _CONVOLUTION,
            "tile": tile,
            "bf16_products": int(bf16_products),
            "relu": int(spec.relu),
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": spec.stride,
            "padding": spec.padding,
            "dilation": spec.dilation,
        }
    elif isinstance(spec, PoolSpec):
        step |= {
            "kind": _MAX_POOL, "kernel_size": spec.kernel_size, "stride": spec.stride, "padding": spec.padding
        }  # fmt: skip
    else:
        step |= {
            "kind": _GLOBAL_AVERAGE_POOL, "kernel_size": input_shape[1:], "stride": (1, 1), "padding": (0, 0)
        }  # fmt: skip
    values = [step.get(field, 0) for field in _FIELDS]
    return [item for value in values for item in (value if isinstance(value, Sequence) else [value])]
