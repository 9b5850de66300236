"""Blocks in a row as one call: convolutions and poolings whose values in between stay in an arena.

A graph takes as many images at a time through all of its layers as an arena of bounded size has room for.
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
from fused_res.backends.cpu.convolution import ALGORITHMS, TILES
from fused_res.backends.cpu.operators import conv_program
from fused_res.dispatch import Machine, Problem, Selected, select
from fused_res.ops.geometry import conv_output_sizes
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec

#: Floats of an arena, 64 MB: more images at a time gain nothing.
_ARENA = 16 << 20
#: Places other than offsets into the arena, kinds of steps, and the fields of a step: csrc/cpu/conv_program.h.
_INPUT, _OUTPUT, _NOWHERE = _extension.cpp.PROGRAM_PLACES
_CONVOLUTION, _MAX_POOL = _extension.cpp.PROGRAM_KINDS
_FIELDS = _extension.cpp.PROGRAM_FIELDS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class InferenceGraph:
    kernels: tuple[Selected, ...]  # of the convolutions, each block's projection last
    problems: tuple[Problem, ...]  # likewise
    steps: tuple[int, ...]
    arena: int  # floats an image
    chunk: int  # images at a time
    output: Shape

    def run(self, input: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        output: Tensor = conv_program(input, packed, biases, self.steps, self.arena, self.chunk, self.output)
        return output


@dataclass(frozen=True)
class _Layer:
    """Values have numbers: 0 is the input, layer i makes value i + 1, the last one is the output."""

    spec: UnitSpec | PoolSpec
    reads: int
    residual: int | None
    weight: int  # its number; -1 for a pooling


@lru_cache(maxsize=1024)
def plan(
    blocks: tuple[BlockSpec, ...],
    weights: tuple[Shape, ...],
    input: Shape,
    winograd: bool,
    machine: Machine,
    preference: str = "planned",
) -> InferenceGraph | None:
    """The graph for an input ``(N, C, H, W)``; None if it does not fit, or another library is to compute a part.

    ``weights`` are the shapes of all weights, block after block, a projection's behind those of its block.
    """
    layers = _layers(blocks)
    images, *image = input
    if images == 0:
        return None
    shapes: list[Shape] = [tuple(image)]
    kernels: dict[int, Selected] = {}
    problems: dict[int, Problem] = {}
    for layer in layers:
        channels, *size = shapes[layer.reads]
        if isinstance(layer.spec, PoolSpec):
            pool = layer.spec
            shapes.append((channels, *conv_output_sizes(size, pool.kernel_size, pool.stride, pool.padding, (1, 1))))
            continue
        spec, weight = layer.spec, weights[layer.weight]
        if weight[1] * spec.groups != channels:
            return None
        problem = Problem(
            "inference", (images, channels, *size), weight, *spec.geometry, torch.float32, "cpu", True, packed=True,
            winograd=winograd, machine=machine,
        )  # fmt: skip
        problems[layer.weight], kernels[layer.weight] = problem, select(ALGORITHMS, problem, preference)
        if kernels[layer.weight].name not in TILES:
            return None
        shapes.append((weight[0], *problem.output))
    if any(size < 1 for shape in shapes for size in shape):
        return None
    places, arena = _places(layers, [prod(shape) for shape in shapes])
    steps = [
        number
        for index, layer in enumerate(layers)
        for number in _step(layer, index, places, shapes[layer.reads], weights, kernels)
    ]
    return InferenceGraph(
        tuple(kernels[number] for number in sorted(kernels)),
        tuple(problems[number] for number in sorted(problems)),
        tuple(steps),
        arena,
        max(1, min(images, _ARENA // max(arena, 1))),
        (images, *shapes[-1]),
    )


def _layers(blocks: Sequence[BlockSpec]) -> list[_Layer]:
    layers: list[_Layer] = []
    weight = 0
    for block in blocks:
        start = len(layers)
        residual = start if block.shortcut == "identity" else None
        if block.projection is not None:
            layers.append(_Layer(block.projection, start, None, weight + len(block.units)))
            residual = len(layers)
        reads = start
        for index, unit in enumerate(block.units):
            last = index == len(block.units) - 1
            layers.append(_Layer(unit, reads, residual if last else None, weight + index))
            reads = len(layers)
        if block.pool is not None:
            layers.append(_Layer(block.pool, reads, None, -1))
        weight += len(block.convolutions)
    return layers


def _places(layers: Sequence[_Layer], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each value is, in floats an image, and the arena's size: a place is used again when its value is not."""
    output = len(layers)
    last_use = dict.fromkeys(range(output + 1), output)
    for index, layer in enumerate(layers):
        for value in (layer.reads, layer.residual):
            if value is not None:
                last_use[value] = index
    # What is added for the last time is written over, one number after the other, by the sum.
    same = list(range(output + 1))
    for index in reversed(range(output)):
        residual = layers[index].residual
        if residual and last_use[residual] == index:
            same[residual] = same[index + 1]
    lives: dict[int, tuple[int, int]] = {}
    for value in range(1, output + 1):
        begin, end = lives.get(same[value], (value - 1, 0))
        lives[same[value]] = begin, max(end, last_use[value])
    offsets: dict[int, int] = {0: _INPUT, output: _OUTPUT}
    for value, (begin, end) in lives.items():
        if value == output:
            continue
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other, (first, last) in lives.items()
            if other in offsets and other != output and first <= end and begin <= last
        )
        offset = 0
        for low, high in taken:
            if offset + sizes[value] <= low:
                break
            offset = max(offset, high)
        offsets[value] = offset
    arena = max((offsets[value] + sizes[value] for value in lives if value != output), default=0)
    return [offsets[same[value]] for value in range(output + 1)], arena


def _step(
    layer: _Layer,
    index: int,
    places: Sequence[int],
    image: Shape,
    weights: Sequence[Shape],
    kernels: dict[int, Selected],
) -> list[int]:
    """One step, its numbers in the order of the C++ structure's fields."""
    spec = layer.spec
    pool = isinstance(spec, PoolSpec)
    outputs, _, *taps = (image[0], 0, *spec.kernel_size) if isinstance(spec, PoolSpec) else weights[layer.weight]
    step: dict[str, Any] = dict(zip(("channels", "height", "width"), image, strict=True))
    step |= {"from": places[layer.reads], "to": places[index + 1], "weight": layer.weight, "outputs": outputs}
    step |= {"residual": _NOWHERE if layer.residual is None else places[layer.residual], "taps": taps}
    step |= {"stride": spec.stride, "padding": spec.padding, "kind": _MAX_POOL if pool else _CONVOLUTION}
    if not isinstance(spec, PoolSpec):
        step |= {"tile": TILES[kernels[layer.weight].name], "relu": int(spec.relu)}
    step["dilation"] = (1, 1) if isinstance(spec, PoolSpec) else spec.dilation
    values = [step.get(field, 0) for field in _FIELDS]
    return [number for value in values for number in (value if isinstance(value, Sequence) else [value])]
