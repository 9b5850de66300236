"""Packed inference on live modules: convolutions with their batch norms folded in, derived from the modules' tensors.

The modules are not modified, and nothing is stored in them. Their folded and packed weights are derived data: every
call of :meth:`PackedProgram.run` compares the modules with a snapshot and derives them again after a change, so that
the modules can be called alone, trained, loaded and moved in between. Consecutive blocks, and the pooling and
classifier after the last one, run as one inference graph where the backend supports it, otherwise layer by layer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fused_res import _torch_compat, functional
from fused_res.backends import registry
from fused_res.dispatch import Algorithm, PackedWeight, Problem, Selection, select, tuning
from fused_res.dispatch.backend import Kernels
from fused_res.nn import chain
from fused_res.nn.chain import Unit
from fused_res.nn.snapshot import Snapshot
from fused_res.nn.spec_builder import build_block_spec
from fused_res.ops.geometry import conv_output_sizes
from fused_res.ops.memory_format import conv_output_is_channels_last, has_channels_last_strides, is_permuted
from fused_res.spec import BlockSpec, GlobalAveragePoolSpec, PoolSpec, UnitSpec, UnitTensors

#: Bound on the packed weights of a layer and on the prepared input shapes of a sequence of blocks. Some packings depend
#: on the input's shape, and a server's batch size varies. A packed weight occupies as much memory as the weight itself,
#: a transformed one (Winograd) four times as much.
_MAX_CACHE_ENTRIES = 4
#: Bound on the sequences of blocks of one program, for a program whose modules are replaced again and again.
_MAX_SEQUENCES = 256
_lock = threading.Lock()

Shape = tuple[int, ...]


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


class PackedProgram:
    """Runs blocks of a model with packed weights; caches what it prepared for each sequence of blocks and input shape.

    Programs of one model share the packed weights, which live as long as a program that uses them. A program refers to
    the modules: keep it in the model, not in a global variable. Copies and pickles of a program start empty.
    """

    def __init__(self, tune: bool = False) -> None:
        self._tune = tune
        self._sequences: dict[tuple[Block | Head, ...], _Sequence] = {}

    def __reduce__(self) -> tuple[type[PackedProgram], tuple[bool]]:
        return PackedProgram, (self._tune,)  # a copied model has other modules

    def run(
        self, x: Tensor, blocks: tuple[Block | Head, ...], residual: Tensor | None = None, backend: str = "auto"
    ) -> Tensor | None:
        """Return the output of consecutive blocks, or None if the caller has to compute it another way.

        None is returned while PyTorch traces, compiles or exports; under dispatch modes and ``torch.func`` transforms;
        if a gradient is needed; if a norm uses the statistics of the batch; for tensors, shapes and settings that the
        kernels do not support or that PyTorch rejects; and while a CUDA graph is captured, unless an earlier call has
        prepared this input shape.

        Args:
            x: input ``(N, C, ...)`` of rank 3 to 5.
            blocks: the blocks, of which the last may be a :class:`Head`; the output of each is the input of the next.
            residual: tensor that the block with the shortcut ``"tensor"`` adds, of the dtype and shape of what it is
                added to; None if there is no such block.
            backend: name of a backend, see :mod:`fused_res.backends`.

        Raises:
            BackendUnavailableError: the named backend cannot run on `x`'s device.
        """
        if torch.compiler.is_compiling() or chain.unsupported_context() or _torch_compat.has_torch_dispatch_mode():
            return None
        if chain.inspect_input(x) or _torch_compat.is_functorch_wrapper(x):
            return None
        refuse_grad = torch.is_grad_enabled()
        if refuse_grad and (x.requires_grad or (residual is not None and residual.requires_grad)):
            return None
        kernels = registry.resolve(backend, x.device)
        autocast, preference = functional.autocast_dtype(x), registry.conv_preference()
        if self._tune and preference == "planned" and x.device.type == "cpu" and tuning.can_measure(x.device):
            preference = "tuned"
        key = (
            x.shape, x.dtype, x.device, autocast, preference, kernels.name, *registry.selection_settings(kernels.name)
        )  # fmt: skip
        sequence = self._sequences.get(blocks)
        prepared = None if sequence is None else sequence.prepared.get(key)
        if sequence is None or prepared is None or not prepared.snapshot.is_current(refuse_grad):
            if prepared is not None and prepared.snapshot.is_current():
                return None  # a gradient is needed
            if sequence is None:
                sequence = _Sequence()
            elif prepared is not None:
                sequence.discard_prepared()
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # tensors that are created during the capture must not outlive the CUDA graph
            settings = _Settings(kernels, preference, x.device, autocast or x.dtype, autocast is not None)
            blocks = tuple([block if isinstance(block, Head) else Block.of(*block) for block in blocks])
            if preference == "tuned":
                prepared = _prepare_tuned(x, residual, blocks, settings, refuse_grad)
            else:
                prepared = _prepare(x, blocks, settings, refuse_grad)
            if prepared is None:
                return None
            _insert(sequence.prepared, key, prepared, _MAX_CACHE_ENTRIES)
            _insert(self._sequences, blocks, sequence, _MAX_SEQUENCES)
        # The kernels return channels_last memory, PyTorch only if the input or a weight has it.
        is_channels_last = prepared.has_channels_last_weight or has_channels_last_strides(x)
        if is_channels_last and x.dim() == 5:
            return None  # which memory format a Conv3d returns depends on the library that computes it
        if not prepared.accepts(residual) or (blocks[0][1:2] == ("identity",) and is_permuted(x)):
            return None
        sequence.last = prepared
        output = prepared.run(x, residual)
        return output if is_channels_last or output.dim() == 2 else output.contiguous()

    def selected(self) -> dict[nn.Module, Selection]:
        """Return the algorithm that each convolution or linear layer ran last, for human-readable reports.

        A linear layer that ran as a matrix multiplication of PyTorch is left out.
        """
        found: dict[nn.Module, Selection] = {}
        for blocks, sequence in list(self._sequences.items()):
            if sequence.last is not None:
                modules = [unit.conv for block in blocks for unit in block.convolutions]
                pairs = zip(modules, sequence.last.convolutions, strict=True)
                found |= {module: packed.selected for module, packed in pairs if packed.selected is not None}
        return found


class _Sequence:
    """What was prepared for one sequence of blocks: by input shape, dtype and settings, and what ran last."""

    __slots__ = ("last", "prepared")

    def __init__(self) -> None:
        self.prepared: dict[Hashable, _Prepared] = {}
        self.last: _Prepared | None = None

    def discard_prepared(self) -> None:
        """Free what was derived from weights that have changed, for all input shapes."""
        with _lock:
            self.prepared.clear()
        self.last = None


# Packed weights, one set for each pair of a convolution and a norm


class _Layer:
    """A convolution with its norm folded in: the folded bias, and the folded weight as packed for each algorithm.

    A linear layer is a 1x1 convolution.
    """

    __slots__ = (
        "__weakref__",
        "_packed",
        "bias",
        "eps",
        "geometry",
        "has_constant_norm",
        "like",
        "snapshot",
        "tensors",
    )

    def __init__(
        self, tensors: UnitTensors, geometry: tuple[Any, ...], eps: float, has_constant_norm: bool, snapshot: Snapshot
    ) -> None:
        self.tensors, self.geometry, self.eps, self.snapshot = tensors, geometry, eps, snapshot
        self.has_constant_norm = has_constant_norm
        self._packed: dict[Hashable, Tensor] = {}
        weight = tensors.weight
        _, self.bias = fold(tensors._replace(weight=weight[:, :0]), eps)
        #: Shape and memory format of the folded weight.
        self.like = torch.empty(weight.shape, device="meta", memory_format=_weight_format(weight))

    def spec(self, unit: Unit, pool: tuple[Any, ...] | None) -> BlockSpec | None:
        """Return the specification of `unit` and of a pooling after it, or None if they are not supported.

        Args:
            unit: a unit of this layer.
            pool: kernel_size, stride and padding of the max pooling, or None.
        """
        key = (*self.geometry, self.tensors.weight.shape, self.eps, unit.activation, unit.negative_slope)
        spec = build_block_spec((key,), "none", pool)
        return None if isinstance(spec, str) else spec

    def operand(self, selected: Selection, problem: Problem) -> PackedWeight | Tensor:
        """Return the folded weight, packed if the selected algorithm packs it; computed at the first call."""
        algorithm = selected.algorithm
        packs = algorithm.pack is not None
        key = (packs, problem.dtype, algorithm.pack_key(problem) if packs else None)
        found = self._packed.get(key)
        if found is None:
            folded = fold(self.tensors, self.eps)[0].to(problem.dtype)
            found = folded if algorithm.pack is None else algorithm.pack(problem, folded)
            _synchronize(found.device)
            _insert(self._packed, key, found, _MAX_CACHE_ENTRIES)
        return PackedWeight(found, problem.weight) if packs else found


#: The layers that programs hold, by the ids of the two modules' ``__dict__``, which the layer's snapshot keeps alive. A
#: layer must not be reachable from here: through a hook, its tensors and modules may refer to the whole model, which
#: would never be freed.
_layers: WeakValueDictionary[tuple[int, int], _Layer] = WeakValueDictionary()


@torch.no_grad()
def fold(tensors: UnitTensors, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with the following norm folded in, computed in float64.

    Args:
        tensors: the unit's tensors, with running statistics; all None for a convolution without a norm.
        eps: constant that is added to the variance.

    Returns:
        The weight ``(K, C / groups, ...)`` of its dtype, that of a 2-D convolution in channels_last memory, and the
        bias ``(K,)``, float64 for a float64 weight and float32 otherwise.
    """
    weight, *rest = tensors
    bias, norm_weight, norm_bias, mean, var = (None if tensor is None else tensor.double() for tensor in rest)
    if mean is None or var is None:
        folded, shift = weight, weight.new_zeros(len(weight)) if bias is None else bias
    else:
        # Folding a weight of ones returns the norm's scale, so that the weight itself is copied once.
        ones = mean.new_ones(len(weight), *[1] * (weight.dim() - 1))
        scale, shift = fuse_conv_bn_weights(ones, bias, mean, var, eps, norm_weight, norm_bias)
        folded = weight.to(torch.float64, copy=True).mul_(scale)
    format = _weight_format(weight)
    bias_dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    return folded.detach().to(weight.dtype, memory_format=format), shift.detach().to(bias_dtype)


def _weight_format(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format


def _find_layer(conv: nn.Module, norm: nn.Module | None) -> _Layer | None:
    """Return the current layer of a convolution and a norm, or of a linear layer; None if its state is unsupported."""
    norm_state = None if norm is None else norm.__dict__
    key = id(conv.__dict__), id(norm_state)
    with _lock:
        layer = _layers.get(key)
    if layer is None or not layer.snapshot.is_current():
        layer = _read_layer(conv.__dict__, norm_state, isinstance(conv, nn.Linear))
        if layer is not None:
            with _lock:
                _layers[key] = layer
    return layer


_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")


#: Stride, padding, dilation, groups and padding mode of a linear layer.
_POINTWISE = (1, 0, 1, 1, "zeros")
#: Arguments of :func:`fold` for a convolution without a norm.
_NO_NORM: chain.NormArgs = (None, None, None, None, False, 0.0, None)


def _read_layer(conv: dict[str, Any], norm: dict[str, Any] | None, is_linear: bool) -> _Layer | None:
    """Return the layer for the ``__dict__`` of a convolution and of a norm, or None if their state is not supported.

    Args:
        conv, norm: the ``__dict__`` of the two modules; None without a norm.
        is_linear: whether `conv` is that of a linear layer.
    """
    parameters = conv["_parameters"]
    norm_args = _NO_NORM if norm is None else chain.read_norm(norm)
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters or isinstance(norm_args, str):
        return None
    norm_weight, norm_bias, mean, var, batch_statistics, _, _ = norm_args
    norm_attributes = [] if norm is None else chain.norm_dependencies(norm)
    if batch_statistics or norm_attributes is None:
        return None
    tensors = UnitTensors(weight, parameters["bias"], norm_weight, norm_bias, mean, var)
    if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in tensors if t is not None):
        return None
    attributes = () if is_linear else _GEOMETRY
    geometry = _POINTWISE if is_linear else tuple([conv[name] for name in attributes])
    if any(isinstance(value, list) for value in geometry):  # a change in place would not be detected
        return None
    if weight.dim() not in ((2,) if is_linear else (3, 4, 5)) or weight.numel() == 0:
        return None
    for tensor in tensors[1:]:
        if tensor is not None and (tensor.shape != weight.shape[:1] or tensor.device != weight.device):
            return None
    try:
        snapshot = Snapshot(
            [
                (conv, ("_parameters", *attributes)),
                (parameters, ("weight", "bias")),
                *norm_attributes,
            ]
        )
    except RuntimeError:  # a tensor without storage, such as one that was returned from inside a torch.func transform
        return None
    if is_linear:
        tensors = tensors._replace(weight=weight.detach()[:, :, None, None])
    eps, is_constant = (0.0, False) if norm is None else (norm["eps"], chain.is_constant_norm(norm))
    return _Layer(tensors, geometry, eps, is_constant, snapshot)


# What was prepared for one input shape


class _Settings(NamedTuple):
    """What the steps of one input shape depend on besides the modules."""

    kernels: Kernels
    preference: str
    device: torch.device
    dtype: torch.dtype  # of the computation
    autocast: bool


class PackedConv:
    """One use of a layer, with its weight in the dtype of the computation, and its activation."""

    __slots__ = ("_layer", "_settings", "bias", "selected", "spec", "weight_shape")

    def __init__(self, layer: _Layer, spec: UnitSpec, settings: _Settings) -> None:
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
        x = torch.empty(input, dtype=settings.dtype, device="meta", memory_format=_weight_format(layer.like))
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


class _Prepared(NamedTuple):
    """The steps for one sequence of blocks and one input shape, and the state that they were derived from."""

    snapshot: Snapshot
    settings: _Settings
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


def _prepare(x: Tensor, blocks: tuple[Block | Head, ...], settings: _Settings, refuse_grad: bool) -> _Prepared | None:
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
    _synchronize(settings.device)  # the biases
    return _Prepared(
        Snapshot.join(snapshots),
        settings,
        _merge_into_graphs(steps, settings),
        [convolution for step in steps for convolution in step.convolutions],
        residuals[0] if residuals else None,
        any(conv_output_is_channels_last(w, w) for w in weights),
        tuple(problems),
    )


def _prepare_tuned(
    x: Tensor, residual: Tensor | None, blocks: tuple[Block | Head, ...], settings: _Settings, refuse_grad: bool
) -> _Prepared | None:
    """Return what :func:`_prepare` does, with the measured algorithms.

    Where the fastest algorithm of a convolution cannot run in an inference graph, the blocks are timed with and without
    it.
    """
    graph = _prepare(x, blocks, settings._replace(preference="tuned_graph"), refuse_grad)
    algorithms = settings.kernels.algorithms
    if graph is None or all(
        select(algorithms, problem, "tuned") == select(algorithms, problem, "tuned_graph") for problem in graph.problems
    ):
        return graph
    split = _prepare(x, blocks, settings, refuse_grad)
    if split is None or not graph.accepts(residual):
        return graph
    if not any(isinstance(step, _GraphStep) for step in graph.steps):
        return split
    key = settings.kernels.name, tuple(x.shape), graph.problems
    keeps_graph = tuning.graph_is_faster(key, lambda: graph.run(x, residual), lambda: split.run(x, residual))
    return graph if keeps_graph else split


def _read_block(block: Block, input: Shape, settings: _Settings, snapshots: list[Snapshot]) -> _BlockStep | None:
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
        layer = _find_layer(unit.conv, unit.norm)
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


def _read_head(head: Head, input: Shape, settings: _Settings, snapshots: list[Snapshot]) -> _HeadStep | None:
    """Return the step of a head, or None if it is not supported; append the snapshot of its linear layer."""
    if len(input) != 4:
        return None
    pooled: Shape = (*input[:2], 1, 1)
    if head.linear is None:
        return _HeadStep(None, (input, pooled, pooled))
    layer = _find_layer(head.linear, None)
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


def _merge_into_graphs(steps: list[_Step], settings: _Settings) -> Sequence[_GraphStep | _Step]:
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


def _prepare_graph(steps: list[_Step], settings: _Settings) -> _GraphStep | None:
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


def _synchronize(device: torch.device) -> None:
    """Wait for the current stream: the next call may use what it computes on another stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _valid(shape: Shape) -> Shape | None:
    """Return the shape, or None if a size other than the batch is not positive."""
    return shape if min(shape[1:]) >= 1 else None


def _insert(cache: dict[Any, Any], key: Hashable, value: Any, limit: int) -> None:
    with _lock:
        while len(cache) >= limit and key not in cache:
            del cache[next(iter(cache))]
        cache[key] = value
