"""The operator ``act(conv(x, w) + bias [+ residual])``, and consecutive frozen blocks as one inference graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_res import ops
from fused_res.backends import registry
from fused_res.backends.cpu import inference_graph
from fused_res.backends.cpu.inference_graph import InferenceGraph
from fused_res.dispatch import Problem, Selection
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
    return registry.dispatch_conv_bias_act(
        kernels, input, weight, bias, residual, geometry, relu, registry.conv_preference()
    )


conv_bias_act = ops.register_python_operator("fused_res_cpu", "conv_bias_act", _conv_bias_act, "CPU")


class PackedConvLayer(Protocol):
    """A convolution layer that caches its packed weight, implemented by :class:`fused_res.nn.frozen.FrozenConv`.

    ``packed_weight`` returns the cache entry, packing the weight on the first call; ``is_current`` returns whether an
    entry is still valid.
    """

    weight: Tensor
    bias: Tensor
    spec: UnitSpec
    last_selected: Selection | None  # the algorithm that ran last, for human-readable reports only
    packed_weight: Callable[[Selection, Problem, Tensor], Any]
    is_current: Callable[[Any], bool]


class BoundInferenceGraph(NamedTuple):
    """An inference graph and its operands: consecutive blocks computed by this library's kernels only."""

    graph: InferenceGraph
    layers: Sequence[PackedConvLayer]
    specs: list[UnitSpec]
    packed_entries: list[Any]
    packed: list[Tensor]
    biases: list[Tensor]

    def is_current(self, layers: Sequence[PackedConvLayer]) -> bool:
        """Return whether `layers` are the layers of this graph, with unchanged operands."""
        if len(layers) != len(self.layers):
            return False
        for layer, spec, entry, bias in zip(layers, self.specs, self.packed_entries, self.biases, strict=True):
            if layer.spec is not spec or layer.bias is not bias or not layer.is_current(entry):
                return False
        return True

    def run(self, input: Tensor) -> Tensor:
        first = self.layers[0]
        if first.last_selected is not self.graph.selections[0]:
            for layer, selection in zip(self.layers, self.graph.selections, strict=True):
                layer.last_selected = selection
        return self.graph.run(input, self.packed, self.biases)


def prepare_inference_graph(
    blocks: tuple[BlockSpec, ...], layers: Sequence[PackedConvLayer], input: Tensor, preference: str
) -> BoundInferenceGraph | None:
    """Plan the inference graph for `input` and pack its weights.

    Returns:
        The graph with its operands, or None if an operand is not a float32 CPU tensor, a bias is not contiguous, a
        shape is invalid, or a convolution falls back to oneDNN or ATen.
    """
    tensors = [input, *[layer.weight for layer in layers], *[layer.bias for layer in layers]]
    if any(tensor.dtype is not torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None
    if not all(layer.bias.is_contiguous() for layer in layers):  # a copy would miss in-place changes
        return None
    shapes = tuple([tuple(layer.weight.shape) for layer in layers])
    graph = inference_graph.plan(blocks, shapes, tuple(input.shape), *registry.selection_settings("cpu"), preference)
    if graph is None:
        return None
    entries = [
        layer.packed_weight(selection, problem, input)
        for layer, selection, problem in zip(layers, graph.selections, graph.problems, strict=True)
    ]
    specs = [layer.spec for layer in layers]
    return BoundInferenceGraph(
        graph, layers, specs, entries, [entry.tensor for entry in entries], [layer.bias for layer in layers]
    )
