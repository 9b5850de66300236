"""Steps of packed inference: what runs for one sequence of blocks and one input shape.

Consecutive blocks, and the pooling and classifier after the last one, run as one inference graph where the backend
supports it, otherwise layer by layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import _torch_compat
from fused_res.backends import registry
from fused_res.dispatch import Algorithm, PackedWeight, Problem, Selection, select, tuning
from fused_res.dispatch.backend import Kernels
from fused_res.nn import chain
from fused_res.nn.chain import Unit
from fused_res.nn.folded_layer import FoldedLayer, find_layer, fold, synchronize, weight_format
from fused_res.nn.snapshot import Snapshot
from fused_res.ops.geometry import conv_output_sizes
from fused_res.ops.memory_format import conv_output_is_channels_last
from fused_res.spec import BlockSpec, GlobalAveragePoolSpec, PoolSpec, UnitSpec

Shape = tuple[int, ...]
_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")


class Block(NamedTuple):
    """Consecutive units with an optional shortcut and an optional max pooling.

    Args:
        units: one or more units; the norm of a unit may be None.
        shortcut: what the last unit adds before its activation. ``"none"``: nothing; ``"identity"``: the block's input;
            ``"tensor"``: the caller's residual; a :class:`Unit` without activation: a projection of the block's input.
        pool: max pooling at the end.
    """

    units: tuple[Unit, ...]
    shortcut: Literal["none", "identity", "tensor"] | Unit = "none"
    pool: nn.MaxPool2d | None = None

    @property
    def convolutions(self) -> tuple[Unit, ...]:
        """All units: those of the main path, then the projection."""
        return (*self.units, self.shortcut) if isinstance(self.shortcut, tuple) else self.units

    @classmethod
    def of(cls, units: Any, shortcut: Any, pool: Any) -> Block:
        """Return a block from tuples, which equal it; generated code passes those, because they are made faster."""
        return cls(tuple([Unit(*u) for u in units]), Unit(*shortcut) if isinstance(shortcut, tuple) else shortcut, pool)


class Head(NamedTuple):
    """The end of a network: global average pooling to ``(N, C)`` and an optional linear layer.

    Args:
        linear: the linear layer, or None.
    """

    linear: nn.Linear | None

    @property
    def convolutions(self) -> tuple[Unit, ...]:
        """The linear layer, which is a 1x1 convolution of the pooled image."""
        return () if self.linear is None else (Unit(self.linear, None, "identity"),)


class Settings(NamedTuple):
    """What the steps of one input shape depend on besides the modules."""

    kernels: Kernels
    preference: str
    device: torch.device
    dtype: torch.dtype  # of the computation
    autocast: bool


class PackedConv:
    """One use of a layer, with its weight in the dtype of the computation, and its activation."""

    __slots__ = ("_layer", "_settings", "bias", "selected", "spec", "weight_shape")

    def __init__(self, layer: FoldedLayer, spec: UnitSpec, settings: Settings) -> None:
        self._layer, self._settings, self.spec = layer, settings, spec
        # The bias contains the norm's whole shift. Rounded, it moves all pixels of a channel alike, and the network's
        # squared error grew to 1.4 times stock's in bfloat16.
        self.bias = layer.bias if settings.kernels.float32_bias else layer.bias.to(settings.dtype)
        self.weight_shape: Shape = tuple(layer.like.shape)
        self.selected: Selection | None = None

    def operand(self, selected: Selection, problem: Problem) -> PackedWeight | Tensor:
        self.selected = selected
        return self._layer.operand(selected, problem)

    def packed_weight(self, selected: Selection, problem: Problem) -> Tensor:
        operand = self.operand(selected, problem)
        return operand.tensor if isinstance(operand, PackedWeight) else operand

    def linear(self, x: Tensor) -> Tensor:
        """Return the output ``(N, K)`` of this linear layer, computed by PyTorch."""
        dtype = self._settings.dtype
        return F.linear(x, self._layer.tensors.weight[:, :, 0, 0].to(dtype), self.bias.to(dtype))

    def problem(self, input: Shape, residual: bool) -> Problem:
        """Return the problem that :meth:`run` solves for an input of this shape."""
        layer, settings = self._layer, self._settings
        x = torch.empty(input, dtype=settings.dtype, device="meta", memory_format=weight_format(layer.like))
        problem, _ = registry.select(
            settings.kernels.name, "inference", x, layer.like, self.spec.geometry, "planned", True, residual
        )
        return problem._replace(device=settings.device.type)

    def measure(self, problem: Problem) -> None:
        """Time the algorithms of a problem with this layer's weight; what they pack is not cached."""

        def operand(algorithm: Algorithm) -> PackedWeight | Tensor:
            pack = algorithm.pack
            return folded if pack is None else PackedWeight(pack(problem, folded), problem.weight)

        folded = fold(self._layer.tensors, self._layer.eps)[0].to(problem.dtype)
        relu = self.spec.activation == "relu"
        tuning.measure_inference(self._settings.kernels, problem, operand, self.bias, relu)

    def output_shape(self, input: Shape) -> Shape | None:
        """Return the output's shape, or None if PyTorch's convolution rejects the input."""
        outputs, channels, *kernel_size = self.weight_shape
        spec = self.spec
        if input[1] != channels * spec.groups or outputs % spec.groups:
            return None
        return _valid((input[0], outputs, *conv_output_sizes(input[2:], kernel_size, *spec.geometry[:3])))

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        spec, settings = self.spec, self._settings
        y = registry.dispatch_conv_bias_act(
            settings.kernels, x, self._layer.like, self.bias, residual, spec.geometry, spec.activation == "relu",
            settings.preference, self.operand,
        )  # fmt: skip
        # The convolutions' epilogues compute a ReLU only.
        if spec.activation == "relu6":
            return F.relu6(y, inplace=True)
        if spec.activation == "leaky_relu":
            return F.leaky_relu(y, spec.negative_slope, inplace=True)
        return F.silu(y, inplace=True) if spec.activation == "silu" else y


class _GraphStep(NamedTuple):
    """Consecutive blocks as one inference graph, whose output is ``(N, C)`` if the last one is a head."""

    graph: Any
    has_head: bool

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        output: Tensor = self.graph.run(x)
        return output.flatten(1) if self.has_head else output


class _BlockStep(NamedTuple):
    """A block whose convolutions run one by one.

    Args:
        units: convolutions of the main path.
        shortcut: as of :class:`Block`, with the projection's convolution.
        pool: max pooling at the end, or None.
        shapes: shapes of the block's input, of the last convolution's output, and of the block's output.
    """

    units: tuple[PackedConv, ...]
    shortcut: Literal["none", "identity", "tensor"] | PackedConv
    pool: PoolSpec | None
    shapes: tuple[Shape, Shape, Shape]

    @property
    def convolutions(self) -> tuple[PackedConv, ...]:
        return (*self.units, self.shortcut) if isinstance(self.shortcut, PackedConv) else self.units

    def problems(self) -> Iterator[tuple[PackedConv, Problem]]:
        """Yield each convolution and its problem."""
        shape: Shape | None = self.shapes[0]
        for unit in self.units:
            assert shape is not None, "the shapes of a step are valid"
            yield unit, unit.problem(shape, unit is self.units[-1] and self.shortcut != "none")
            shape = unit.output_shape(shape)
        if isinstance(self.shortcut, PackedConv):
            yield self.shortcut, self.shortcut.problem(self.shapes[0], False)

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = x
        for unit in self.units[:-1]:
            y = unit.run(y)
        if isinstance(self.shortcut, PackedConv):
            residual = self.shortcut.run(x)
        elif self.shortcut != "tensor":
            residual = x if self.shortcut == "identity" else None
        y, pool = self.units[-1].run(y, residual), self.pool
        return y if pool is None else F.max_pool2d(y, pool.kernel_size, pool.stride, pool.padding)

    def specs(self) -> tuple[BlockSpec, ...] | None:
        """Return the block's specification for an inference graph, or None if a graph cannot contain it."""
        shortcut = self.shortcut.spec if isinstance(self.shortcut, PackedConv) else self.shortcut
        if shortcut == "tensor" or (self.pool is not None and shortcut != "none"):
            return None
        if any(unit.spec.activation not in ("identity", "relu") for unit in self.units):
            return None
        return (BlockSpec(tuple([unit.spec for unit in self.units]), shortcut, self.pool),)


class _HeadStep(NamedTuple):
    """A :class:`Head` that PyTorch computes.

    Args:
        layer: the linear layer, or None.
        shapes: shapes of the input, of the pooled input, and of the output.
    """

    layer: PackedConv | None
    shapes: tuple[Shape, Shape, Shape]

    @property
    def convolutions(self) -> tuple[PackedConv, ...]:
        return () if self.layer is None else (self.layer,)

    def problems(self) -> Iterator[tuple[PackedConv, Problem]]:
        """Yield nothing: whether the linear layer runs in a graph is not measured."""
        yield from ()

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return pooled if self.layer is None else self.layer.linear(pooled)

    def specs(self) -> tuple[BlockSpec | GlobalAveragePoolSpec, ...]:
        """Return the specifications for an inference graph."""
        return (GlobalAveragePoolSpec(), *[BlockSpec((layer.spec,)) for layer in self.convolutions])


_Step = _BlockStep | _HeadStep


class Prepared(NamedTuple):
    """The steps for one sequence of blocks and one input shape, and the state that they were derived from."""

    snapshot: Snapshot
    settings: Settings
    steps: Sequence[_GraphStep | _Step]
    convolutions: list[PackedConv]
    residual_shape: Shape | None
    has_channels_last_weight: bool
    problems: tuple[Problem, ...]  # that were measured

    def accepts(self, residual: Tensor | None) -> bool:
        """Return whether `residual` can be added without broadcasting or a change of dtype, or there is none."""
        if residual is None or self.residual_shape is None:
            return residual is None and self.residual_shape is None
        return (
            chain.inspect_input(residual) is None
            and residual.shape == self.residual_shape
            and residual.dtype is self.settings.dtype
            and residual.device == self.settings.device
            and not _torch_compat.is_functorch_wrapper(residual)
        )

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        settings = self.settings
        # The operands are cast already; autocast must not cast the float32 intermediates of the reference.
        with torch.autocast(settings.device.type, enabled=False) if settings.autocast else contextlib.nullcontext():
            x = x.to(settings.dtype)
            for step in self.steps:
                x = step.run(x, residual)
        return x


def prepare(x: Tensor, blocks: tuple[Block | Head, ...], settings: Settings, refuse_grad: bool) -> Prepared | None:
    """Return the steps for `blocks` and inputs like `x`, or None if they are not supported."""
    if settings.dtype is not x.dtype and (x.dtype is torch.float64 or blocks[0][1:2] == ("identity",)):
        return None  # autocast does not cast float64, and does not cast the identity
    snapshots: list[Snapshot] = []
    steps: list[_Step] = []
    shape = _valid(tuple(x.shape))
    for block in blocks:
        if shape is None:
            return None
        step: _Step | None
        if isinstance(block, Head):
            step = _read_head(block, shape, settings, snapshots)
        else:
            step = _read_block(block, shape, settings, snapshots)
        if step is None or (refuse_grad and any(snapshot.requires_grad() for snapshot in snapshots)):
            return None
        steps.append(step)
        shape = step.shapes[-1]
    residuals = [step.shapes[1] for step in steps if isinstance(step, _BlockStep) and step.shortcut == "tensor"]
    if len(residuals) > 1:
        raise ValueError('blocks: expected at most one block with the shortcut "tensor"')
    problems: list[Problem] = []
    if settings.preference == "tuned_graph":
        with torch.autocast(settings.device.type, enabled=False):
            for convolution, problem in [pair for step in steps for pair in step.problems()]:
                convolution.measure(problem)
                problems.append(problem)
    units = [unit for block in blocks if isinstance(block, Block) for unit in block.units]
    weights = [unit.conv.__dict__["_parameters"]["weight"] for unit in units]
    synchronize(settings.device)  # the biases
    return Prepared(
        Snapshot.join(snapshots),
        settings,
        _merge_into_graphs(steps, settings),
        [convolution for step in steps for convolution in step.convolutions],
        residuals[0] if residuals else None,
        any(conv_output_is_channels_last(w, w) for w in weights),
        tuple(problems),
    )


def prepare_tuned(
    x: Tensor, residual: Tensor | None, blocks: tuple[Block | Head, ...], settings: Settings, refuse_grad: bool
) -> Prepared | None:
    """Return what :func:`prepare` does, with the measured algorithms.

    Where the fastest algorithm of a convolution cannot run in an inference graph, the blocks are timed with and without
    it.
    """
    graph = prepare(x, blocks, settings._replace(preference="tuned_graph"), refuse_grad)
    algorithms = settings.kernels.algorithms
    if graph is None or all(
        select(algorithms, problem, "tuned") == select(algorithms, problem, "tuned_graph") for problem in graph.problems
    ):
        return graph
    split = prepare(x, blocks, settings, refuse_grad)
    if split is None or not graph.accepts(residual):
        return graph
    if not any(isinstance(step, _GraphStep) for step in graph.steps):
        return split
    key = settings.kernels.name, tuple(x.shape), graph.problems
    keeps_graph = tuning.graph_is_faster(key, lambda: graph.run(x, residual), lambda: split.run(x, residual))
    return graph if keeps_graph else split


def _read_block(block: Block, input: Shape, settings: Settings, snapshots: list[Snapshot]) -> _BlockStep | None:
    """Return the step of a block, or None if it is not supported; append the snapshots of its modules."""
    pool_key = None
    if block.pool is not None:
        state = block.pool.__dict__
        pool_key = tuple([state[name] for name in _POOL[:3]])
        if chain.inspect_pool(block.pool) is not None or any(isinstance(value, list) for value in pool_key):
            return None
        snapshots.append(Snapshot([(state, _POOL)]))
    convolutions, pool = [], None
    for unit in block.convolutions:
        layer = find_layer(unit.conv, unit.norm)
        if layer is None or layer.tensors.weight.device != settings.device:
            return None
        if len(input) != layer.tensors.weight.dim():
            return None
        if unit.norm is not None and not chain.accepts_rank(unit.norm, len(input)):
            return None
        if chain.inspect_tensors(layer.tensors, settings.dtype, settings.autocast, layer.has_constant_norm):
            return None
        spec = layer.spec(unit, pool_key)
        if spec is None:
            return None
        convolutions.append(PackedConv(layer, spec.units[0], settings))
        snapshots.append(layer.snapshot)
        pool = spec.pool
    units = tuple(convolutions[: len(block.units)])
    sum_shape: Shape | None = input
    for packed in units:
        sum_shape = None if sum_shape is None else packed.output_shape(sum_shape)
    shortcut: Literal["none", "identity", "tensor"] | PackedConv
    if not isinstance(block.shortcut, str):
        shortcut = convolutions[-1]
        added = None if shortcut.spec.activation != "identity" else shortcut.output_shape(input)
    else:
        shortcut = block.shortcut
        added = input if shortcut == "identity" else sum_shape
    if sum_shape is None or added != sum_shape:  # PyTorch may broadcast
        return None
    output: Shape | None = sum_shape
    if pool is not None:
        sizes = conv_output_sizes(sum_shape[2:], pool.kernel_size, pool.stride, pool.padding, (1, 1))
        output = _valid((*sum_shape[:2], *sizes))
    return None if output is None else _BlockStep(units, shortcut, pool, (input, sum_shape, output))


def _read_head(head: Head, input: Shape, settings: Settings, snapshots: list[Snapshot]) -> _HeadStep | None:
    """Return the step of a head, or None if it is not supported; append the snapshot of its linear layer."""
    if len(input) != 4:
        return None
    pooled: Shape = (*input[:2], 1, 1)
    if head.linear is None:
        return _HeadStep(None, (input, pooled, pooled))
    layer = find_layer(head.linear, None)
    if layer is None or layer.tensors.weight.device != settings.device:
        return None
    if chain.inspect_tensors(layer.tensors, settings.dtype, settings.autocast):
        return None
    (unit,) = head.convolutions
    spec = layer.spec(unit, None)
    if spec is None:
        return None
    packed = PackedConv(layer, spec.units[0], settings)
    snapshots.append(layer.snapshot)
    output = packed.output_shape(pooled)
    return None if output is None else _HeadStep(packed, (input, pooled, output))


def _merge_into_graphs(steps: list[_Step], settings: Settings) -> Sequence[_GraphStep | _Step]:
    """Return the steps with as few inference graphs as possible, each of consecutive blocks."""
    if settings.dtype is torch.float64 or settings.kernels.prepare_inference_graph is None:
        return steps
    if (graph := _prepare_graph(steps, settings)) is not None:
        return [graph]
    # Whether a graph can contain a block does not depend on its other blocks.
    merged: list[_GraphStep | _Step] = []
    for supported, group in groupby(steps, lambda step: _prepare_graph([step], settings) is not None):
        consecutive = list(group)
        graph = _prepare_graph(consecutive, settings) if supported else None
        merged += consecutive if graph is None else [graph]
    return merged


def _prepare_graph(steps: list[_Step], settings: Settings) -> _GraphStep | None:
    specs: list[BlockSpec | GlobalAveragePoolSpec] = []
    for step in steps:
        found = step.specs()
        if found is None:
            return None
        specs += found
    prepare: Any = settings.kernels.prepare_inference_graph
    convolutions = [convolution for step in steps for convolution in step.convolutions]
    graph = prepare(tuple(specs), convolutions, steps[0].shapes[0], settings.dtype, settings.preference)
    return None if graph is None else _GraphStep(graph, isinstance(steps[-1], _HeadStep))


def _valid(shape: Shape) -> Shape | None:
    """Return the shape, or None if a size other than the batch is not positive."""
    return shape if min(shape[1:]) >= 1 else None
