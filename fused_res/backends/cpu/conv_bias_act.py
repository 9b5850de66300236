"""``act(conv(x, w) + bias [+ residual])`` as an operator, and frozen blocks as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_res import ops
from fused_res.backends import registry
from fused_res.backends.cpu import inference_graph
from fused_res.backends.cpu.inference_graph import InferenceGraph
from fused_res.dispatch import Problem, Selected
from fused_res.spec import BlockSpec, UnitSpec


def _conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    kernels = registry.resolve("cpu", input.device)
    return registry.infer(kernels, input, weight, bias, residual, geometry, relu, registry.convolution("cpu"))


conv_bias_act = ops.operator("fused_res_cpu", "conv_bias_act", _conv_bias_act, "CPU")


class Layer(Protocol):
    """A convolution that keeps its weight packed: ``keep`` returns the packed weight, ``has`` says if it is current."""

    weight: Tensor
    bias: Tensor
    spec: UnitSpec
    kernel: Selected | None  # the algorithm that ran last, for people to read
    keep: Callable[[Selected, Problem, Tensor], Any]
    has: Callable[[Any], bool]


class Prepared(NamedTuple):
    """Blocks in a row, by our kernels alone: an inference graph and its operands."""

    graph: InferenceGraph
    layers: Sequence[Layer]
    specs: list[UnitSpec]
    kept: list[Any]
    packed: list[Tensor]
    biases: list[Tensor]

    def current(self, layers: Sequence[Layer]) -> bool:
        """Whether these are the same layers still, with the same operands."""
        if len(layers) != len(self.layers):
            return False
        for layer, spec, kept, bias in zip(layers, self.specs, self.kept, self.biases, strict=True):
            if layer.spec is not spec or layer.bias is not bias or not layer.has(kept):
                return False
        return True

    def run(self, input: Tensor) -> Tensor:
        first = self.layers[0]
        if first.kernel is not self.graph.kernels[0]:
            for layer, kernel in zip(self.layers, self.graph.kernels, strict=True):
                layer.kernel = kernel
        return self.graph.run(input, self.packed, self.biases)


def prepare_blocks(
    blocks: tuple[BlockSpec, ...], layers: Sequence[Layer], input: Tensor, preference: str
) -> Prepared | None:
    """None where another library is to compute a part, or a shape does not fit."""
    tensors = [input, *[layer.weight for layer in layers], *[layer.bias for layer in layers]]
    if any(tensor.dtype is not torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None
    if not all(layer.bias.is_contiguous() for layer in layers):  # a copy would not follow changes in place
        return None
    shapes = tuple([tuple(layer.weight.shape) for layer in layers])
    graph = inference_graph.plan(blocks, shapes, tuple(input.shape), *registry.settings("cpu"), preference)
    if graph is None:
        return None
    kept = [
        layer.keep(kernel, problem, input)
        for layer, kernel, problem in zip(layers, graph.kernels, graph.problems, strict=True)
    ]
    specs = [layer.spec for layer in layers]
    return Prepared(graph, layers, specs, kept, [one.tensor for one in kept], [layer.bias for layer in layers])
