"""The Dynamo backend: ``torch.compile(model, backend="fused_res")``.

It fuses what :func:`fused_res.fuse` cannot record symbolically: forwards with control flow, keyword arguments or plain
functions. Dynamo captures graphs and guards them; :mod:`fused_res.graph.dynamo` lowers each graph, and the same matcher
finds the same segments. Each becomes one call in Dynamo's graph, and an inner compiler gets the result. What
:mod:`fused_res.nn.chain` verifies on every call of a fused module is verified here once, on Dynamo's fake tensors:
its guards recompile the graph if a dtype, device, rank, setting, ``requires_grad`` or autocast's state changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fused_res import _torch_compat, functional
from fused_res.block.checks import TensorMeta, check_block
from fused_res.fusion.matcher import Segment, find_segments
from fused_res.graph import dynamo
from fused_res.graph.dynamo import Captured, value_of
from fused_res.graph.ir import Node, Op
from fused_res.nn import chain
from fused_res.nn.fusable_module import check_settings
from fused_res.ops.checks import DTYPES, check_norm, check_residual
from fused_res.ops.memory_format import has_same_layout, is_permuted, to_stock_layout
from fused_res.spec import BlockSpec, group_by_unit

INNER = ("eager", "inductor")


class Settings(NamedTuple):
    """The options of the backend.

    Args:
        inner: compiler of the graph with fused calls. ``"eager"`` runs it as it is; ``"inductor"`` compiles the
            operators around the fused ones.
        backend, recompute: see :func:`fused_res.functional.residual_block`.
    """

    inner: str = "eager"
    backend: str = "auto"
    recompute: str = "none"


def fused_res_backend(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo: the backend of ``torch.compile(model, backend="fused_res")``.

    Training and evaluation, graph breaks and dynamic shapes work as with any backend of ``torch.compile``. Layers of
    shapes and settings that the fused operators do not support stay stock.

    Args:
        module: the graph, which is changed in place.
        inputs: fake tensors like its arguments.
        options: ``options`` of ``torch.compile``: any of ``inner`` (``"eager"``, the default, or ``"inductor"``),
            ``backend`` (default ``"auto"``) and ``recompute`` (default ``"none"``), see
            :func:`fused_res.functional.residual_block`.
        mode: ``mode`` of ``torch.compile``, for ``inner="inductor"`` only.

    Returns:
        A function of the graph's arguments.

    Raises:
        ValueError: an option, or its value, is unknown.
        BackendUnavailableError: the kernel backend that ``options`` names cannot run here.
    """
    settings = _settings(options, mode)
    if chain.enabled and not _torch_compat.is_transformed() and not dynamo.has_transforms(module.graph):
        _rewrite(module, settings)
    if settings.inner == "eager":
        return module.forward
    return _torch_compat.compile_with_inductor(module, inputs, mode)


def _settings(options: Mapping[str, Any] | None, mode: str | None) -> Settings:
    options = options or {}
    unknown = [name for name in options if name not in Settings._fields]
    if unknown:
        raise ValueError(f"options: expected {', '.join(Settings._fields)}, got {unknown[0]!r}")
    settings = Settings(**options)
    if settings.inner not in INNER:
        raise ValueError(f"inner: expected one of {INNER}, got {settings.inner!r}")
    check_settings(settings.backend, settings.recompute)
    if mode is not None and settings.inner != "inductor":
        raise ValueError(f"mode: expected None for inner={settings.inner!r}, got {mode!r}")
    return settings


# The functions that nodes call. They hold what is no tensor; fx hashes targets, by identity.


@dataclass(frozen=True, eq=False)
class FusedChain:
    """A call of :func:`fused_res.functional.residual_block` with a constant specification.

    Args:
        spec: the chain.
        training, momentum: one value for each unit.
        settings: the backend's options.
    """

    spec: BlockSpec
    training: tuple[bool, ...]
    momentum: tuple[float, ...]
    settings: Settings
    __name__ = "fused_chain"

    def __call__(self, input: Tensor, *tensors: Tensor | None) -> Tensor:
        _, backend, recompute = self.settings
        opaque = self.settings.inner == "inductor"
        options = self.training, self.momentum, recompute, None, backend, False
        return functional.run_block(input, self.spec, tensors, *options, opaque=opaque)[0]


@dataclass(frozen=True, eq=False)
class FusedNorm:
    """A call of :func:`fused_res.functional.batch_norm_act` with constant settings."""

    training: bool
    momentum: float
    eps: float
    activation: str
    negative_slope: float
    settings: Settings
    __name__ = "fused_norm"

    def __call__(self, input: Tensor, *tensors: Tensor | None) -> Tensor:
        """Return ``activation(norm(input) [+ residual])`` for the mean, variance, weight, bias and residual."""
        mean, var, weight, bias, residual = tensors
        return functional.batch_norm_act(
            to_stock_layout(input), mean, var, weight, bias, residual, self.training, self.momentum, self.eps,
            self.activation, negative_slope=self.negative_slope, backend=self.settings.backend,
        )  # fmt: skip


def count_batch(counter: Tensor, number: int) -> Tensor:
    """Add to a norm's ``num_batches_tracked``, once if activation checkpointing repeats the forward."""
    return counter if functional.is_recomputing() else counter.add_(number)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Activation checkpointing of a subgraph, executed eagerly.

    Dynamo's operator is meant for AOTAutograd. Executed as it is, it does not restore the random state, and it fails if
    the subgraph updates the running statistics that it gets as arguments: their version is verified in backward.

    Args:
        state: indices of the arguments that the subgraph updates.
        options: keyword arguments of :func:`torch.utils.checkpoint.checkpoint`.
    """

    state: tuple[int, ...]
    options: Mapping[str, Any]
    __name__ = "checkpoint"

    def __call__(self, body: fx.GraphModule, *arguments: Any) -> Any:
        state = {index: arguments[index] for index in self.state}

        def run(*rest: Any) -> Any:
            remaining = iter(rest)
            indices = range(len(arguments))
            return body(*[state[index] if index in state else next(remaining) for index in indices])

        rest = [argument for index, argument in enumerate(arguments) if index not in state]
        return checkpoint(run, *rest, use_reentrant=False, **self.options)


# The rewrite


def _rewrite(module: fx.GraphModule, settings: Settings, checkpointed: bool = False) -> set[fx.Node]:
    """Replace the segments of a graph by fused calls, and those of its subgraphs under activation checkpointing.

    Returns:
        The placeholders of the counters and running statistics that the graph updates.
    """
    graph = module.graph
    captured = dynamo.lower(graph)
    rewrite = _Rewrite(graph, captured, settings)
    for segment in find_segments(captured.graph):
        for part in segment.parts():
            for candidate in (part, *_without_addition(part, segment), *part.norm_passes()):
                rewrite.fuse(candidate)
    state = set(captured.state)
    for node in graph.nodes:
        body = dynamo.checkpoint_body(node)
        if body is not None:
            subgraph = module.get_submodule(body)
            assert isinstance(subgraph, fx.GraphModule)
            updated = _rewrite(subgraph, settings, checkpointed=True)
            placeholders = [placeholder for placeholder in subgraph.graph.nodes if placeholder.op == "placeholder"]
            indices = tuple([index for index, placeholder in enumerate(placeholders) if placeholder in updated])
            state |= {node.args[1 + index] for index in indices}
            if settings.inner == "eager":
                _checkpoint_eagerly(node, subgraph, indices)
    if checkpointed and settings.inner == "eager":
        rewrite.count_once()
    graph.lint()
    module.recompile()
    return state


def _without_addition(part: Segment, segment: Segment) -> Iterator[Segment]:
    """Yield the chains of a part of `segment` that ends in an addition, without the addition and what follows it."""
    if part.add is not None:
        units = segment.units[-1:] if part.shortcut == "tensor" else part.units
        yield Segment((*units[:-1], units[-1]._replace(activation=None)))
        if not isinstance(part.shortcut, str):
            yield Segment((part.shortcut,))


def _checkpoint_eagerly(node: fx.Node, body: fx.GraphModule, state: tuple[int, ...]) -> None:
    """Replace Dynamo's operator for activation checkpointing by :class:`Checkpoint`."""
    options = {name: value for name, value in node.kwargs.items() if name != "use_reentrant"}
    if options.keys() - {"preserve_rng_state", "determinism_check", "debug"}:
        return
    if "_checkpoint_context_fn" in body.meta:
        options["context_fn"] = body.meta["_checkpoint_context_fn"]
    node.target, node.kwargs = Checkpoint(state, options), {}


#: A function that computes a segment, and the tensors of its layers.
_Call = tuple[Callable[..., Tensor], Sequence[Tensor | None]]


class _Rewrite:
    """Replaces segments of one graph by calls of fused operators.

    Args:
        graph: the graph of Dynamo, which is changed in place.
        captured: the same graph, lowered.
        settings: the backend's options.
    """

    def __init__(self, graph: fx.Graph, captured: Captured, settings: Settings) -> None:
        self.graph = graph
        self.nodes = captured.nodes
        self.producers = captured.graph.producers
        self.placeholders = captured.tensors
        self.settings = settings
        self.fused: set[Node] = set()
        self.fused_norms: set[Any] = set()

    def fuse(self, part: Segment) -> None:
        """Replace a segment by one call if its tensors are supported, and no part of it has been replaced."""
        inputs = [self.nodes[value] for value in part.values]
        if part.has_clamp or not self.fused.isdisjoint(part.nodes):
            return
        if not all(_is_supported_input(value_of(node)) for node in inputs):
            return
        try:
            call = self._chain_call(part) if part.units[0].conv is not None else self._norm_call(part)
        except (ValueError, TypeError, RuntimeError):
            return  # PyTorch broadcasts the operands, or raises its own exception, or a size is unknown
        if call is None:
            return
        function, tensors = call
        arguments = [None if tensor is None else self.placeholders[id(tensor)] for tensor in tensors]
        if part.units[0].conv is None:
            arguments.append(inputs[1] if len(inputs) > 1 else None)
        self._replace(part, function, (inputs[0], *arguments))

    # Selection of the call: what fused_res.nn.chain verifies for real tensors is verified for fake ones.

    def _chain_call(self, part: Segment) -> _Call | None:
        matched, conv = chain.match_chain(*part.layers()), part.units[0].conv
        if isinstance(matched, chain.Unsupported) or conv is None:
            return None
        input = value_of(self.nodes[part.values[0]])
        # The dtype of the convolution's output is that of the computation, which autocast may have chosen.
        dtype = value_of(self.nodes[conv.source]).dtype
        autocast = any(tensor is not None and tensor.dtype is not dtype for tensor in (input, *matched.tensors))
        if not _have_supported_dtypes(matched.tensors, dtype, autocast, matched.has_constant_norm):
            return None
        if part.shortcut == "identity" and (input.dtype is not dtype or is_permuted(input)):
            return None
        if input.dim() == 5 and matched.has_channels_last_3d(input):
            return None
        metas = [
            None if tensor is None else _meta(tensor, dtype if name in ("weight", "bias") else tensor.dtype)
            for unit in group_by_unit(matched.tensors)
            for name, tensor in unit._asdict().items()
        ]
        check_block(matched.spec, _meta(input, dtype), metas, matched.training)
        momentum = tuple(map(float, matched.momentum))
        return FusedChain(matched.spec, tuple(matched.training), momentum, self.settings), matched.tensors

    def _norm_call(self, part: Segment) -> _Call | None:
        (unit,), _, _ = part.layers()
        state = unit.norm.__dict__
        norm, is_constant = chain.read_norm(state), chain.is_constant_norm(state)
        input, residual = (*(value_of(self.nodes[value]) for value in part.values), None)[:2]
        if isinstance(norm, str) or not _have_supported_dtypes(
            (None, None, *norm[:4]), input.dtype, False, is_constant
        ):
            return None
        weight, bias, mean, var, training, momentum, _ = norm
        if residual is not None and not has_same_layout(to_stock_layout(input), residual):
            return None
        check_norm(input, mean, var, weight, bias, training, True, state["eps"])
        check_residual(input, residual, None, None)
        activation = unit.activation, unit.negative_slope
        return FusedNorm(training, float(momentum), state["eps"], *activation, self.settings), (mean, var, weight, bias)

    def _replace(self, part: Segment, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        """Call `function` where the segment's last node is, unless a node outside reads a result inside."""
        inside = [self.nodes[node.source] for node in part.nodes]
        #: More than one if the last operations are in place.
        results = [node.source for node in part.nodes if part.last in self.producers[node.source]]
        held = [self.nodes[value] for value in results]
        if any(user not in inside for node in inside if node not in held for user in node.users):
            return
        self.fused.update(part.nodes)
        self.fused_norms |= {_module_call(self.nodes[node.source]) for node in part.nodes if node.op is Op.NORM}
        with self.graph.inserting_before(inside[-1]):
            new = self.graph.call_function(function, arguments)
        new.meta = dict(inside[-1].meta)
        for node in held:
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
        for node in reversed(inside):
            if node.op != "placeholder":  # a tensor of a norm that is written as arithmetic
                self.graph.erase_node(node)
        for value in results:
            self.nodes[value] = new

    def count_once(self) -> None:
        """Count a batch of the fused norms once if a checkpoint repeats the forward, as their statistics do."""
        for node in list(self.graph.nodes):
            is_counter = node.op == "call_method" and node.target == "add_" and not node.kwargs
            if is_counter and not value_of(node).is_floating_point() and _module_call(node) in self.fused_norms:
                with self.graph.inserting_before(node):
                    new = self.graph.call_function(count_batch, node.args)
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)


def _module_call(node: fx.Node) -> Any:
    """Return the key of the innermost module call that a node was captured in; unique if there is none."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack)) if stack else node


def _is_supported_input(value: Any) -> bool:
    return dynamo.is_plain(value) and 2 <= value.dim() <= 5 and value.dtype in DTYPES


def _have_supported_dtypes(
    tensors: Sequence[Tensor | None], dtype: torch.dtype, autocast: bool, has_constant_norm: bool
) -> bool:
    """Return what :func:`fused_res.nn.chain.inspect_tensors` returns for the dtypes of these tensors."""
    actual = [(index, tensor.dtype) for index, tensor in enumerate(tensors) if tensor is not None]
    return all(chain.is_supported_dtype(index, kind, dtype, autocast, has_constant_norm) for index, kind in actual)


def _meta(tensor: Tensor, dtype: torch.dtype) -> TensorMeta:
    return TensorMeta(tensor.shape, tensor.stride(), dtype, tensor.requires_grad, tensor.device)
