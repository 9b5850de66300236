"""The operator ``act(conv(x, w) + bias [+ residual])``, and inference graphs of consecutive blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_res import ops
from fused_res.backends import registry
from fused_res.backends.cpu import inference_graph
from fused_res.backends.cpu.inference_graph import InferenceGraph
from fused_res.dispatch import Problem, Selection
from fused_res.spec import BlockSpec, GlobalAveragePoolSpec


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
    return registry.dispatch_conv_bias_act(
        kernels, input, weight, bias, residual, geometry, relu, registry.conv_preference()
    )


conv_bias_act = ops.register_python_operator("fused_res_cpu", "conv_bias_act", _conv_bias_act, "CPU")


class PackedConvLayer(Protocol):
    """A layer that provides its bias and its packed weight: :class:`fused_res.nn.packed_steps.PackedConv`.

    Attributes:
        weight_shape: shape ``(K, C / groups, ...)`` of the weight.
        bias: contiguous bias ``(K,)``, float32.
        packed_weight: function that returns the weight as packed for a selected algorithm and its problem.
    """

    @property
    def weight_shape(self) -> tuple[int, ...]: ...

    @property
    def bias(self) -> Tensor: ...

    def packed_weight(self, selected: Selection, problem: Problem) -> Tensor: ...


class BoundInferenceGraph(NamedTuple):
    """An inference graph and its operands: consecutive blocks computed by this library's kernels only.

    It holds the operands that were current when it was prepared; the caller replaces it when a weight changes.
    """

    graph: InferenceGraph
    packed: list[Tensor]
    biases: list[Tensor]

    def run(self, input: Tensor) -> Tensor:
        return self.graph.run(input, self.packed, self.biases)


def prepare_inference_graph(
    blocks: tuple[BlockSpec | GlobalAveragePoolSpec, ...],
    layers: Sequence[PackedConvLayer],
    input: tuple[int, ...],
    dtype: torch.dtype,
    preference: str,
) -> BoundInferenceGraph | None:
    """Plan the inference graph for an input shape and pack its weights.

    Args:
        blocks: consecutive blocks, in any order; each may end with a max pooling. A linear layer after global average
            pooling is a block of one 1x1 convolution.
        layers: their convolutions, block by block, a block's projection last; all tensors are CPU tensors.
        input: shape ``(N, C, H, W)``.
        dtype: float32, bfloat16 or float16, of the input and all values.
        preference: algorithm preference, see :func:`fused_res.dispatch.select`.

    Returns:
        The graph with its operands, or None if a shape is invalid or a convolution falls back to oneDNN or ATen.
    """
    shapes = tuple([layer.weight_shape for layer in layers])
    graph = inference_graph.plan(blocks, shapes, input, dtype, *registry.selection_settings("cpu"), preference)
    if graph is None:
        return None
    packed = [
        layer.packed_weight(selection, problem)
        for layer, selection, problem in zip(layers, graph.selections, graph.problems, strict=True)
    ]
    return BoundInferenceGraph(graph, packed, [layer.bias for layer in layers])
