"""The Dynamo front end: lower a graph that ``torch.compile`` captured to the intermediate representation.

In such a graph parameters and buffers are placeholders, and layers are calls of functions on them (``torch.conv2d``,
``F.batch_norm``). :func:`lower` gives each set of such tensors and settings a layer, an object with the attributes of
the ``torch.nn`` module that would call the function so, and records each call as one of that layer. From then on the
graph is like one of the symbolic front end. Nothing is executed: tensors are Dynamo's fake tensors.

Two properties differ from a recorded forward. Dynamo captures statements that change how PyTorch executes what follows
(autocast, grad mode, inference mode) as nodes without a value; nothing may move across these. And any tensor may be
read or written by any other node, so a layer is recognized only if the rest of the graph does not write to its tensors,
and does not read statistics that it updates.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fused_res import _torch_compat
from fused_res._torch_compat import FakeTensor
from fused_res.graph.ir import Graph, Op, build_graph
from fused_res.graph.recording import Frame


class Captured(NamedTuple):
    """A graph of Dynamo, lowered.

    Args:
        graph: the intermediate representation.
        nodes: node of Dynamo's graph for each node of the recorded graph, :attr:`fused_res.graph.ir.Node.source`.
        tensors: placeholder of each tensor of a layer, by the tensor's ``id``.
        state: placeholders of the counters and statistics that the graph updates.
    """

    graph: Graph
    nodes: dict[fx.Node, fx.Node]
    tensors: dict[int, fx.Node]
    state: set[fx.Node]


def value_of(node: fx.Node) -> Any:
    """Return the fake tensor, symbolic number or tuple that a node stands for; None if it has no value."""
    return node.meta.get("example_value")


def is_plain(value: object) -> bool:
    """Return whether a value is a fake tensor that stands for a plain tensor, without a subclass or transform."""
    return type(value) is FakeTensor and value.layout is torch.strided


def is_barrier(node: fx.Node) -> bool:
    """Return whether a node is a statement, such as entering autocast: it has no value, and nothing may cross it."""
    return node.op in ("call_function", "call_method") and value_of(node) is None


def checkpoint_body(node: fx.Node) -> str | None:
    """Return the name of the subgraph that only this node calls, under activation checkpointing, or None."""
    body = node.args[0] if node.target is torch.ops.higher_order.tag_activation_checkpoint and node.args else None
    if not isinstance(body, fx.Node) or body.op != "get_attr" or len(body.users) != 1:
        return None
    return str(body.target)


def has_transforms(source: fx.Graph) -> bool:
    """Return whether a graph enters a ``torch.func`` transform or a level of forward-mode differentiation."""
    modules = (getattr(node.target, "__module__", None) or "" for node in source.nodes if node.op == "call_function")
    return any(module.startswith(("torch._functorch", "torch._C._functorch")) for module in modules)


def lower(source: fx.Graph) -> Captured:
    """Lower a graph of Dynamo, which is unchanged. Subgraphs are opaque.

    Args:
        source: graph whose nodes hold their fake tensor in ``meta["example_value"]`` and the module calls that they
            were captured in, outer before inner, in ``meta["nn_module_stack"]``. Both may be absent.
    """
    layers = _Layers(source)
    recorded, nodes, frames = fx.Graph(), {}, _Frames()
    copies: dict[fx.Node, fx.Node] = {}
    for node in layers.in_order_of_use(source):
        if node.op == "output":
            copied = fx.node.map_arg(node.args[0], copies.__getitem__)
            frames.root.result = list(_nodes_in(copied))
            continue
        call = layers.calls.get(node)
        if call is not None:
            copy = recorded.create_node("call_module", call.path, (copies[call.input],))
        elif node.op == "placeholder" and (node in layers.tensors or not _may_alias_input(node)):
            copy = recorded.create_node("get_attr", layers.attributes.get(node, node.name))
        elif node.op == "call_module":
            copy = recorded.create_node("call_function", _opaque, *_mapped(node, copies))
        else:
            copy = recorded.node_copy(node, copies.__getitem__)
        copy.meta = {"frame": frames.of(node)}
        copies[node], nodes[copy] = copy, node
    used = {value for node in recorded.nodes for value in node.all_input_nodes} | set(frames.root.outputs)
    for copy in [copy for copy in recorded.nodes if copy.op == "get_attr" and copy not in used]:
        recorded.erase_node(copy)
    modules = {call.path: call.layer for call in layers.calls.values()} | layers.constant_norms | {"": nn.Module()}
    graph = build_graph(recorded, modules.__getitem__, frames.all)
    _add_writes(graph, nodes)
    written = _written_state(graph, nodes)
    for lowered in graph.nodes:
        call = layers.calls.get(nodes[lowered.source])
        operands = [nodes[part.source] for part in lowered.parts] if call is None else call.tensors.values()
        if not written.isdisjoint(operands):
            lowered.op = Op.OTHER  # the fused call would read its tensors after the write
    tensors = {id(value_of(node)): node for node in layers.tensors}
    return Captured(graph, nodes, tensors, written | layers.updated)


def _opaque(*arguments: Any, **options: Any) -> Any:
    """Stand for an operation that nothing is known of."""
    raise AssertionError("a recorded graph is not executed")


def _mapped(node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> tuple[Any, Any]:
    return fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)


def _nodes_in(value: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    yield from dict.fromkeys(found)


def _may_alias_input(placeholder: fx.Node) -> bool:
    """Return whether an argument may be a view of another one: neither a parameter, a number nor a counter is."""
    value = value_of(placeholder)
    if isinstance(value, nn.Parameter):
        return False
    return not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()


# Module calls


class _Frames:
    """The module calls that nodes were captured in, as frames. A layer's own call is part of its parent's frame."""

    def __init__(self) -> None:
        self.root = Frame("", nn.Module(), None, ((), {}))
        self.all = [self.root]
        self._children: dict[tuple[Frame, Any], Frame] = {}

    def of(self, node: fx.Node) -> Frame:
        stack: list[Any] = list((node.meta.get("nn_module_stack") or {}).items())
        while stack and _is_layer(stack[-1][1][1]):
            stack.pop()
        frame = self.root
        for key, (path, _) in stack:  # the key differs between two calls of one module
            if (frame, key) not in self._children:
                self._children[frame, key] = Frame(path, self.root.module, frame, ((), {}))
                self.all.append(self._children[frame, key])
            frame = self._children[frame, key]
        return frame


def _is_layer(kind: Any) -> bool:
    module = getattr(getattr(kind, "forward", None), "__module__", None) or ""
    return module.startswith("torch.nn.") and not issubclass(kind, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


# Layers


class _Call(NamedTuple):
    """A call of a function that is recorded as the call of a layer.

    Args:
        path, layer: the layer; calls of one layer share them.
        input: the node of its input.
        tensors: the placeholders of its tensors, by attribute.
    """

    path: str
    layer: nn.Module
    input: fx.Node
    tensors: Mapping[str, fx.Node]


#: Convolution functions and the modules that call them. ``F.conv2d`` is ``torch.conv2d``.
_CONVOLUTIONS: dict[Any, type[nn.Module]] = {torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d}
#: Rank of the input -> norm.
_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip

#: Parameters of the functions, with their defaults.
_REQUIRED: Any = object()
_CONVOLUTION_PARAMETERS = {
    "input": _REQUIRED, "weight": _REQUIRED, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
}  # fmt: skip
_NORM_PARAMETERS = {
    "input": _REQUIRED, "running_mean": _REQUIRED, "running_var": _REQUIRED, "weight": None, "bias": None,
    "training": False, "momentum": 0.1, "eps": 1e-5,
}  # fmt: skip
_POOL_PARAMETERS = {
    "input": _REQUIRED, "kernel_size": _REQUIRED, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
    "return_indices": False,
}  # fmt: skip


#: Dynamo's name of a placeholder that is a tensor of a batch norm.
_NORM_TENSOR = re.compile(r"(?P<module>.*)_(buffers|parameters)_(?P<name>weight|bias|running_mean|running_var)_")
_VIEWS = ("view", "reshape", "unsqueeze", "to", operator.getitem)


def _eps_of(running_var: fx.Node) -> float | None:
    """Return the number that a graph adds to a variance, or None."""
    values = [running_var]
    for node in values:
        for user in node.users:
            if user.target in (operator.add, torch.add, "add"):
                return next((number for number in user.args if type(number) is float), None)
            if user.target in _VIEWS:
                values.append(user)
    return None


class _Unknown(Exception):
    """A call is not one of a layer."""


class _Layers:
    """The calls of a graph that are recorded as calls of layers.

    Attributes:
        calls: those calls.
        constant_norms: layers of frozen batch norms, which the graph may compute by arithmetic; by their path.
        attributes: path and name of the attribute for each placeholder of their tensors.
        tensors: the placeholders of all layers' tensors.
        updated: those of the running statistics that a norm updates.
    """

    def __init__(self, source: fx.Graph) -> None:
        self.calls: dict[fx.Node, _Call] = {}
        self._layers: dict[Any, tuple[str, nn.Module]] = {}
        for node in source.nodes:
            recognize = self._recognizer(node)
            if recognize is not None:
                try:
                    self.calls[node] = recognize(node)
                except _Unknown:
                    continue
        for node in [node for node, call in self.calls.items() if not self._owns_statistics(call)]:
            del self.calls[node]
        self.tensors = {tensor for call in self.calls.values() for tensor in call.tensors.values()}
        self.constant_norms: dict[str, nn.Module] = {}
        self.attributes: dict[fx.Node, str] = {}
        self._find_constant_norms(source)
        self.tensors |= self.attributes.keys()
        training = [call for call in self.calls.values() if call.layer.training]
        self.updated = {call.tensors[name] for call in training for name in call.tensors if name.startswith("running_")}

    def _recognizer(self, node: fx.Node) -> Any:
        if node.op != "call_function" or not is_plain(value_of(node)):
            return None
        if node.target in _CONVOLUTIONS:
            return self._convolution
        recognizers: dict[Any, Any] = {F.batch_norm: self._norm, F.max_pool2d: self._pool}
        return recognizers.get(node.target)

    def _owns_statistics(self, call: _Call) -> bool:
        """Return whether nothing but calls of this layer reads a tensor that is the running statistics of a norm."""
        statistics = [node for name, node in call.tensors.items() if name.startswith("running_")]
        readers = (reader for node in statistics for reader in node.users)
        return all(reader in self.calls and self.calls[reader].layer is call.layer for reader in readers)

    def in_order_of_use(self, source: fx.Graph) -> Iterator[fx.Node]:
        """Yield the nodes of a graph, the tensors of frozen batch norms where they are first read, as in a module."""
        pending = set(self.attributes)
        for node in source.nodes:
            if node not in self.attributes:
                for operand in node.all_input_nodes:
                    if operand in pending:
                        pending.remove(operand)
                        yield operand
                yield node

    def _find_constant_norms(self, source: fx.Graph) -> None:
        """Give a layer to each set of placeholders with the names of one batch norm's tensors.

        Nothing is decided by the names: :mod:`fused_res.graph.norms` verifies what is computed from the tensors.
        """
        groups: dict[str, dict[str, fx.Node]] = {}
        for node in source.nodes:
            named = _NORM_TENSOR.fullmatch(node.name) if node.op == "placeholder" else None
            value = value_of(node)
            if named and node not in self.tensors and is_plain(value) and value.dim() == 1 and type(len(value)) is int:
                groups.setdefault(named["module"], {})[named["name"]] = node
        for tensors in groups.values():
            eps = _eps_of(tensors["running_var"]) if "running_var" in tensors else None
            if eps is not None and "running_mean" in tensors:
                path = f"constant_norm_{len(self.constant_norms)}"
                layer = nn.Module()
                layer.__dict__["eps"] = eps
                layer._buffers |= {name: value_of(node) for name, node in tensors.items()}
                self.constant_norms[path] = layer
                self.attributes |= {node: f"{path}.{name}" for name, node in tensors.items()}

    # Recognition of one call

    def _convolution(self, node: fx.Node) -> _Call:
        given = _arguments(node, _CONVOLUTION_PARAMETERS)
        kind = _CONVOLUTIONS[node.target]
        tensors = _tensors(given, ("weight", "bias"))
        if "weight" not in tensors:
            raise _Unknown
        spatial = value_of(tensors["weight"]).dim() - 2
        settings = {name: _sizes(given[name], spatial) for name in ("stride", "padding", "dilation")}
        groups = given["groups"]
        if type(groups) is not int:
            raise _Unknown
        return self._call(kind, given["input"], tensors, settings | {"groups": groups, "padding_mode": "zeros"})

    def _norm(self, node: fx.Node) -> _Call:
        given = _arguments(node, _NORM_PARAMETERS)
        training, momentum, eps = given["training"], given["momentum"], given["eps"]
        tensors = _tensors(given, ("running_mean", "running_var", "weight", "bias"))
        has_statistics = "running_mean" in tensors
        kind = _NORMS.get(value_of(given["input"]).dim())
        if (
            kind is None
            or type(training) is not bool
            or type(momentum) not in (int, float)
            or type(eps) not in (int, float)
            or has_statistics is not ("running_var" in tensors)
            or (has_statistics and tensors["running_mean"] is tensors["running_var"])
            or not (training or has_statistics)
        ):
            raise _Unknown
        settings = {"training": training, "momentum": momentum, "eps": eps, "track_running_stats": has_statistics}
        return self._call(kind, given["input"], tensors, settings)

    def _pool(self, node: fx.Node) -> _Call:
        given = _arguments(node, _POOL_PARAMETERS)
        settings = {name: given[name] for name in ("ceil_mode", "return_indices")}
        if not all(type(setting) is bool for setting in settings.values()):
            raise _Unknown
        sizes = {name: _sizes(given[name], 2) for name in ("kernel_size", "padding", "dilation")}
        stride = sizes["kernel_size"] if given["stride"] is None else _sizes(given["stride"], 2)
        return self._call(nn.MaxPool2d, given["input"], {}, settings | sizes | {"stride": stride})

    def _call(
        self, kind: type[nn.Module], input: Any, tensors: Mapping[str, fx.Node], settings: Mapping[str, Any]
    ) -> _Call:
        key = kind, *tensors.items(), *settings.items()
        if key not in self._layers:
            layer = _layer(kind, {name: value_of(node) for name, node in tensors.items()}, settings)
            self._layers[key] = f"{kind.__name__.lower()}_{len(self._layers)}", layer
        return _Call(*self._layers[key], input, tensors)


def _layer(kind: type[nn.Module], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
    """Return a `kind` of module with these tensors and settings; it is read, not called.

    It has no ``num_batches_tracked``: the graph increments the counter itself.
    """
    layer: Any = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.__dict__ |= settings
    layer._parameters |= {name: tensors.get(name) for name in ("weight", "bias")}
    layer._buffers |= {name: tensors.get(name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    return layer


def _arguments(node: fx.Node, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, symbolic numbers that have one value as that value.

    Raises:
        _Unknown: they do not fit `parameters`, or the input is no plain tensor.
    """
    given: dict[str, Any] = dict(zip(parameters, node.args, strict=False)) | dict(node.kwargs)
    if len(node.args) > len(parameters) or not given.keys() <= parameters.keys():
        raise _Unknown
    given = {name: _constant(value) for name, value in (dict(parameters) | given).items()}
    if not isinstance(given["input"], fx.Node) or not is_plain(value_of(given["input"])) or _REQUIRED in given.values():
        raise _Unknown
    return given


def _constant(value: Any) -> Any:
    """Return the number that a node stands for if it can be no other; anything else is returned as it is."""
    number = _torch_compat.concrete_number(value_of(value)) if isinstance(value, fx.Node) else None
    return number if isinstance(number, (int, float)) else value


def _tensors(given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, fx.Node]:
    """Return the placeholders among these arguments, without those that are None.

    Raises:
        _Unknown: one is computed in the graph, is no plain tensor, or has a symbolic size.
    """
    tensors = {name: given[name] for name in names if given[name] is not None}
    for node in tensors.values():
        if not isinstance(node, fx.Node) or node.op != "placeholder" or not is_plain(value_of(node)):
            raise _Unknown
        if not all(type(size) is int for size in value_of(node).shape):
            raise _Unknown
    return tensors


def _sizes(value: Any, count: int) -> tuple[int, ...] | str:
    """Return one size per spatial dimension, or the name of a padding."""
    if isinstance(value, str):
        return value
    sizes = (value,) * count if type(value) is int else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sizes) == 1:
        sizes *= count
    if len(sizes) != count or not all(type(size) is int for size in sizes):
        raise _Unknown
    return sizes


# Writes

_UPDATES_STATISTICS = (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm)


def _add_writes(graph: Graph, nodes: Mapping[fx.Node, fx.Node]) -> None:
    """Add what nodes of Dynamo's graphs may write to, beyond what functions of a recorded forward do."""
    for node in graph.nodes:
        source = nodes[node.source]
        if is_barrier(source):
            node.writes = tuple({graph.root(other.storage) for other in graph.nodes})
        elif node.op is Op.OTHER and source.op in ("call_function", "call_module") and _may_write(source.target):
            node.writes = tuple([operand.storage for operand in node.operands])


def _may_write(target: Any) -> bool:
    """Return whether a function may write to any of its arguments, whatever its name."""
    if _torch_compat.is_registered_operator(target):
        return _torch_compat.may_mutate(target)
    module = getattr(target, "__module__", None) or ""
    if module.split(".")[0] not in ("torch", "_operator", "math", "builtins"):
        return True  # a function that Dynamo was told not to look into
    return target in _UPDATES_STATISTICS


def _written_state(graph: Graph, nodes: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Return the placeholders that operations other than layers may write to, without those that may alias inputs."""
    writers = [node for node in graph.nodes if not is_barrier(nodes[node.source])]
    written = {graph.root(storage) for node in writers for storage in node.writes}
    state = [node for node in graph.nodes if node.source.op == "get_attr" and graph.root(node.storage) in written]
    return {nodes[node.source] for node in state if nodes[node.source].op == "placeholder"}
