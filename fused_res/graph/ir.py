"""The intermediate representation of a module's forward, and its construction from a ``torch.fx`` graph.

One :class:`Node` for each operation. The matcher sees nothing else: what an operation computes (:class:`Op`), the nodes
that produce its tensor operands, the layer that holds its parameters, and which storages it writes. The graph is
functional: a read that follows an in-place operation has that operation as its producer, whichever Python name it
uses. A front end records a ``torch.fx`` graph of ATen-level calls and module calls; :func:`build_graph` is the only
place that knows their spellings.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from fused_res.graph.norms import NormCall, find_norms, is_read_at_once
from fused_res.nn import chain


class Op(Enum):
    """What a node computes."""

    CONV = auto()
    NORM = auto()
    RELU = auto()
    CLAMP = auto()  # an activation that is bounded by numbers, except that its gradient at a bound is 1
    ACTIVATION = auto()  # any other supported activation, see Node.activation
    ADD = auto()
    MAX_POOL = auto()
    GLOBAL_POOL = auto()  # mean over the last two dimensions, (N, C, H, W) to (N, C, 1, 1) or (N, C)
    FLATTEN = auto()  # (N, C, 1, 1) or (N, C) to (N, C)
    DROPOUT = auto()  # returns its operand in evaluation mode
    LINEAR = auto()
    IDENTITY = auto()  # returns its operand
    OTHER = auto()


class Node:
    """One operation.

    Args:
        source: the node of the ``torch.fx`` graph.
        index: position in the order of execution.
        frame: module call that it was recorded in.
        operands: producers of the tensors that it reads; of an addition, in the order of its arguments.
        values: the same tensors, as the recorded code names them.
        layer, path: module that holds the parameters of a convolution, norm or linear layer, or the settings of a
            pooling.
        activation, negative_slope: name and setting of an activation, as of
            :func:`fused_res.functional.batch_norm_act`.
        in_place: the output is the first operand's storage.
        keeps_dims: whether a global pooling returns ``(N, C, 1, 1)``, not ``(N, C)``.
        parts: operations before it that belong to it, such as the reads of the tensors of a norm that is written as
            ``F.batch_norm``. They are of no other use, and no users of their operands.
        returned: whether a module call returns it, or gets it as an argument, without any operation that reads it.
        storage, writes: storages of the output and of what it writes to, see :meth:`Graph.root`.
    """

    __slots__ = (
        "activation",
        "frame",
        "in_place",
        "index",
        "keeps_dims",
        "layer",
        "negative_slope",
        "op",
        "operands",
        "parts",
        "path",
        "returned",
        "source",
        "storage",
        "users",
        "values",
        "writes",
    )

    def __init__(self, source: fx.Node, index: int, frame: Any) -> None:
        self.op = Op.OTHER
        self.source = source
        self.index = index
        self.frame = frame
        self.operands: tuple[Node, ...] = ()
        self.values: tuple[fx.Node, ...] = ()
        self.layer: Any = None
        self.path = ""
        self.activation = "identity"
        self.negative_slope = 0.01
        self.in_place = False
        self.keeps_dims = True
        self.parts: tuple[Node, ...] = ()
        self.writes: tuple[int, ...] = ()
        self.storage = -1
        self.users: list[Node] = []
        self.returned = False


class Graph:
    """All nodes in the order of execution, and the aliasing of their storages."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.producers: dict[
            fx.Node, list[Node]
        ] = {}  # of each value: its own node, then those that update it in place
        self._parents: list[int] = []

    def new_storage(self) -> int:
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def root(self, storage: int) -> int:
        while self._parents[storage] != storage:
            storage = self._parents[storage]
        return storage

    def alias(self, first: int, second: int) -> None:
        self._parents[self.root(first)] = self.root(second)

    def is_written_between(self, first: Node, last: Node, read: Sequence[Node], inside: Sequence[Node]) -> bool:
        """Return whether an operation from `first` to `last` that is not `inside` may write to what is `read`."""
        storages = {self.root(node.storage) for node in read}
        written = [node.writes for node in self.nodes[first.index : last.index] if node not in inside]
        return any(self.root(storage) in storages for writes in written for storage in writes)


#: Spellings: the operation that a function, or a method of this name, computes, and whether it is in place without a
#: setting.
_SPELLINGS: dict[Any, tuple[str, bool]] = {
    torch.relu: ("relu", False), F.relu: ("relu", False), "relu": ("relu", False),
    torch.relu_: ("relu", True), F.relu_: ("relu", True), "relu_": ("relu", True),
    torch.clamp: ("clamp", False), torch.clamp_min: ("clamp_min", False),
    torch.clamp_: ("clamp", True), torch.clamp_min_: ("clamp_min", True),
    "clamp": ("clamp", False), "clamp_min": ("clamp_min", False),
    "clamp_": ("clamp", True), "clamp_min_": ("clamp_min", True),
    F.relu6: ("relu6", False), F.hardtanh: ("hardtanh", False), F.hardtanh_: ("hardtanh", True),
    F.leaky_relu: ("leaky_relu", False), F.leaky_relu_: ("leaky_relu", True), F.silu: ("silu", False),
    torch.add: ("add", False), operator.add: ("add", False), "add": ("add", False),
    operator.iadd: ("add", True), "add_": ("add", True),
}  # fmt: skip
#: Arguments of activations after the input.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "relu": ("inplace",), "relu6": ("inplace",), "silu": ("inplace",), "clamp": ("min", "max"), "clamp_min": ("min",),
    "hardtanh": ("min_val", "max_val", "inplace"), "leaky_relu": ("negative_slope", "inplace"),
}  # fmt: skip
#: Modules that call these functions with their attributes of these names.
_ACTIVATION_MODULES: dict[type, str] = {
    nn.ReLU: "relu", nn.ReLU6: "hardtanh", nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu",
}  # fmt: skip
_MULTIPLICATIONS = {torch.mul, operator.mul, "mul", operator.imul, "mul_"}
_SIGMOIDS = {torch.sigmoid, F.sigmoid, "sigmoid"}
_IN_PLACE_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem),
}
#: Functions and methods that read sizes and attributes, and arithmetic on them.
_PURE = {
    *(int, getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv),
    *(operator.mod, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *("size", "dim", "numel", "stride", "ndimension"),
}


#: Operations whose operands are all tensors and sizes that the recorded call reads.
_READS_ALL = (Op.OTHER, Op.FLATTEN)


def computes_like(kind: type[nn.Module], stock: type[nn.Module], *methods: str) -> bool:
    """Return whether instances of `kind` run `stock`'s forward: it is `stock`, or a subclass that overrides nothing."""
    if kind is stock:
        return True
    names = ("forward", "__call__", "__getattr__", "__getattribute__", *methods)
    return issubclass(kind, stock) and all(getattr(kind, name) is getattr(stock, name) for name in names)


_CONVOLUTIONS = (nn.Conv2d, nn.Conv1d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm3d)


def eliminate_dead_reads(graph: fx.Graph, used: set[fx.Node]) -> None:
    """Erase reads of sizes and attributes that are not in `used`, and would otherwise count as uses of a tensor."""
    for node in reversed(graph.nodes):
        pure = node.op in ("call_function", "call_method") and node.target in _PURE
        if (pure or node.op == "get_attr") and not node.users and node not in used:
            graph.erase_node(node)


def build_graph(source: fx.Graph, module_of: Callable[[str], nn.Module], frames: Sequence[Any]) -> Graph:
    """Lower a ``torch.fx`` graph.

    Args:
        source: the recorded graph. Parameters and buffers are ``get_attr`` nodes; ``meta["frame"]`` is the module call
            that a node was recorded in.
        module_of: returns the module at a path.
        frames: all module calls.
    """
    graph = Graph()
    producers = graph.producers
    names: dict[Node, list[fx.Node]] = {}  # the values that a node is the current producer of
    calls = find_norms(source, module_of) | _find_silu(source, module_of)
    parts = {part for call in calls.values() for part in call.parts}
    read_from = {str(node.target).rpartition(".")[0] for node in source.nodes if node.op == "get_attr"}
    inputs = graph.new_storage()  # any two arguments may alias
    for index, fx_node in enumerate(source.nodes):
        node = Node(fx_node, index, fx_node.meta["frame"])
        graph.nodes.append(node)
        if fx_node in parts:
            node.storage = graph.new_storage()
            names[node] = [fx_node]
            producers[fx_node] = [node]
            continue
        if fx_node in calls:
            _classify_call(node, calls[fx_node], producers)
            tensors: Any = (calls[fx_node].input,)
        else:
            _classify(node, module_of)
            if node.op is Op.NORM and node.path in read_from:
                node.op = Op.OTHER  # fusion may change the order in which its running statistics are updated and read
            count = 2 if node.op is Op.ADD else 1
            tensors = fx_node.args[:count] if node.op not in _READS_ALL else fx_node.all_input_nodes
        node.values = tuple(tensors)
        node.operands = tuple([producers[tensor][-1] for tensor in tensors])
        for operand in node.operands:
            operand.users.append(node)
        node.storage = inputs if fx_node.op == "placeholder" else graph.new_storage()
        names[node] = [fx_node]
        producers[fx_node] = []
        if node.in_place:
            target = node.operands[0]
            graph.alias(node.storage, target.storage)
            node.writes = (target.storage,)
            names[node] += names.pop(target)
        elif node.op in (Op.OTHER, Op.IDENTITY, Op.FLATTEN, Op.DROPOUT):
            if node.op is Op.OTHER:
                node.writes = tuple([operand.storage for operand in _written(node, module_of)])
            for operand in node.operands:  # the output may be a view of any operand
                graph.alias(node.storage, operand.storage)
        for name in names[node]:
            producers[name].append(node)
    written = {graph.root(storage) for node in graph.nodes for storage in node.writes}
    for node in graph.nodes:
        if node.source.op == "get_attr" and graph.root(node.storage) in written:
            for user in graph.nodes:  # a fused convolution would read the parameter after the write
                if user.op is Op.CONV and user.path == str(node.source.target).rpartition(".")[0]:
                    user.op = Op.OTHER
    for frame in frames:
        for value in frame.outputs:
            if not any(not user.meta["frame"].within(frame) for user in value.users):
                inside = [node for node in producers[value] if node.frame.within(frame)]
                (inside or producers[value])[-1].returned = True
        for value in frame.inputs:
            if not any(user.meta["frame"].within(frame) for user in value.users):
                producers[value][-1].returned = True
    return graph


def _classify(node: Node, module_of: Callable[[str], nn.Module]) -> None:
    source = node.source
    target, arguments, options = source.target, source.args, source.kwargs
    if source.op == "call_module":
        assert isinstance(target, str)
        module = module_of(target)
        if len(arguments) != 1 or options or not isinstance(arguments[0], fx.Node):
            return
        node.layer, node.path = module, target
        kind = type(module)
        if source.meta.get("is_norm"):
            node.op = Op.NORM
        elif any(computes_like(kind, stock, "_conv_forward") for stock in _CONVOLUTIONS):
            node.op = Op.CONV
        elif kind in chain.norm_types or any(computes_like(kind, stock) for stock in _BATCH_NORMS):
            node.op = Op.NORM
        elif kind in _ACTIVATION_MODULES:
            _classify_activation(node, _ACTIVATION_MODULES[kind], module.__dict__)
        elif kind is nn.MaxPool2d and chain.inspect_pool(module) is None:
            node.op = Op.MAX_POOL
        elif kind is nn.Identity:
            node.op = Op.IDENTITY
        elif kind is nn.AdaptiveAvgPool2d and _is_one(module.output_size):
            node.op = Op.GLOBAL_POOL
        elif isinstance(module, nn.Flatten) and kind is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
            node.op = Op.FLATTEN
        elif kind is nn.Dropout and not module.inplace:
            node.op = Op.DROPOUT
        elif kind is nn.Linear:
            node.op = Op.LINEAR
        return
    if target is F.conv2d:
        _classify_functional_conv(node, module_of)
        return
    if target in _HEAD_SPELLINGS and arguments and isinstance(arguments[0], fx.Node):
        _classify_head(node, *_HEAD_SPELLINGS[target])
        return
    if target not in _SPELLINGS or not arguments or not isinstance(arguments[0], fx.Node):
        return
    name, in_place = _SPELLINGS[target]
    rest: Any = arguments[1:]
    if name != "add":
        settings = dict(zip(_SETTINGS[name], rest, strict=False)) | options
        if len(rest) <= len(_SETTINGS[name]) and settings.keys() <= set(_SETTINGS[name]):
            _classify_activation(node, name, settings, in_place)
    elif len(rest) == 1 and isinstance(rest[0], fx.Node) and options in ({}, {"alpha": 1}):
        node.op, node.in_place = Op.ADD, in_place


#: Functions and methods that pool, flatten or drop, with the names of their arguments after the tensor. The sizes of
#: ``view`` and ``reshape`` may be one sequence.
_HEAD_SPELLINGS: dict[Any, tuple[Op, tuple[str, ...]]] = {
    F.adaptive_avg_pool2d: (Op.GLOBAL_POOL, ("output_size",)),
    torch.mean: (Op.GLOBAL_POOL, ("dim", "keepdim")), "mean": (Op.GLOBAL_POOL, ("dim", "keepdim")),
    torch.flatten: (Op.FLATTEN, ("start_dim", "end_dim")), "flatten": (Op.FLATTEN, ("start_dim", "end_dim")),
    "view": (Op.FLATTEN, ("batch", "channels")), "reshape": (Op.FLATTEN, ("batch", "channels")),
    F.dropout: (Op.DROPOUT, ("p", "training", "inplace")),
}  # fmt: skip


def _classify_head(node: Node, op: Op, names: tuple[str, ...]) -> None:
    """Classify a call that pools, flattens or drops, if its arguments are those of the end of a network."""
    source = node.source
    value, *rest = source.args
    if names == ("batch", "channels") and len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = list(rest[0])
    given: dict[str, Any] = dict(zip(names, rest, strict=False)) | dict(source.kwargs)
    if len(rest) > len(names) or not given.keys() <= set(names):
        return
    if "output_size" in names:
        matches = _is_one(given.get("output_size"))
    elif "keepdim" in names:
        dims: Any = given.get("dim")
        is_sequence = isinstance(dims, (tuple, list)) and all(type(dim) is int for dim in dims)
        node.keeps_dims = given.get("keepdim", False)
        matches = is_sequence and sorted(dims) in ([2, 3], [-2, -1], [-2, 3], [-1, 2]) and type(node.keeps_dims) is bool
    elif "start_dim" in names:
        matches = given.get("start_dim") == 1 and given.get("end_dim", -1) == -1
    elif "batch" in names:
        matches = given.get("channels") == -1 and _is_batch_size(given.get("batch"), value)
    else:
        matches = given.get("training") is False and given.get("inplace", False) is False
    if matches:
        node.op = op


def _is_one(size: Any) -> bool:
    return size == 1 or (isinstance(size, (tuple, list)) and [*size] == [1, 1])


def _is_batch_size(size: Any, value: Any) -> bool:
    """Return whether `size` is ``value.size(0)`` or ``value.shape[0]``."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args == (value, 0) and not size.kwargs
    shape = size.args[0] if size.target is operator.getitem and size.args[1] == 0 else None
    if not isinstance(shape, fx.Node) or shape.args[:1] != (value,):
        return False
    return shape.target in (getattr, "size") and shape.args[1:] in ((), ("shape",)) and not shape.kwargs


def _classify_activation(node: Node, name: str, settings: Mapping[str, Any], in_place: bool = False) -> None:
    """Classify a call of the function `name`, if it computes a supported activation with these settings."""
    numbers = {key: value for key, value in settings.items() if type(value) in (int, float)}
    found = None
    if name in ("relu", "relu6", "silu"):
        found = Op.ACTIVATION if name != "relu" else Op.RELU, name
    elif name == "leaky_relu":
        slope = numbers.get("negative_slope") if "negative_slope" in settings else 0.01
        if slope is not None and 0 <= slope < math.inf:  # PyTorch refuses gradients of some negative slopes
            found, node.negative_slope = (Op.ACTIVATION, name), float(slope)
    elif name == "hardtanh":
        if numbers.get("min_val") == 0 and numbers.get("max_val") == 6:
            found = Op.ACTIVATION, "relu6"
    elif numbers.get("min") == 0 and (settings.get("max") is None or numbers.get("max") == 6):
        found = Op.CLAMP, "relu" if settings.get("max") is None else "relu6"
    inplace = settings.get("inplace", False)
    if found is not None and type(inplace) is bool:
        node.op, node.activation = found
        node.in_place = in_place or inplace


class _Silu(NamedTuple):
    """``input * sigmoid(input)``, with the sigmoid as its only part."""

    input: fx.Node
    parts: tuple[fx.Node]


def _find_silu(graph: fx.Graph, module_of: Callable[[str], nn.Module]) -> dict[fx.Node, _Silu]:
    """Return the multiplications of a value by its sigmoid, which nothing else reads."""
    found = {}
    for node in graph.nodes:
        if node.target not in _MULTIPLICATIONS or len(node.args) != 2 or node.kwargs:
            continue
        for value, gate in (node.args, node.args[::-1]):
            if isinstance(gate, fx.Node) and gate.args == (value,) and not gate.kwargs and list(gate.users) == [node]:
                is_module = gate.op == "call_module" and type(module_of(str(gate.target))) is nn.Sigmoid
                call = _Silu(value, (gate,))
                if (is_module or gate.target in _SIGMOIDS) and is_read_at_once(node, call.input, call.parts):
                    found[node] = call
    return found


def _classify_call(node: Node, call: NormCall | _Silu, producers: Mapping[fx.Node, list[Node]]) -> None:
    node.parts = tuple([producers[part][-1] for part in call.parts])
    if isinstance(call, NormCall):
        node.op, node.layer, node.path = Op.NORM, call.layer, call.path
    else:
        node.op, node.activation = Op.ACTIVATION, "silu"
        node.in_place = node.source.target in (operator.imul, "mul_") and node.source.args[0] is call.input


def _classify_functional_conv(node: Node, module_of: Callable[[str], nn.Module]) -> None:
    """Recognize ``F.conv2d`` with exactly the arguments that an ``nn.Conv2d`` subclass's forward would pass."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.source.args, strict=False)) | dict(node.source.kwargs)
    weight, bias = given.get("weight"), given.get("bias")
    if not (isinstance(given.get("input"), fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return
    path, _, name = str(weight.target).rpartition(".")
    module: Any = module_of(path)
    if not isinstance(module, nn.Conv2d) or name != "weight" or module.padding_mode != "zeros":
        return
    has_bias = (
        isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.target == (f"{path}.bias" if path else "bias")
    )
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    settings = {name: given.get(name, default) for name, default in defaults.items()}
    pairs = {
        name: (value, value) if isinstance(value, int) and name != "groups" else value
        for name, value in settings.items()
    }
    expected = {name: getattr(module, name) for name in defaults}
    if (has_bias or (bias is None and module.bias is None)) and pairs == expected and node.source.args[:1]:
        node.op, node.layer, node.path = Op.CONV, module, path


def _written(node: Node, module_of: Callable[[str], nn.Module]) -> Iterator[Node]:
    """Yield the operands that an unclassified operation may write to."""
    source = node.source
    target: Any = source.target
    if source.op == "call_module":
        module: Any = module_of(target)
        stock = type(module).__module__.startswith("torch.nn.")
        if not stock or getattr(module, "inplace", False):  # an opaque module may write to its arguments
            yield from node.operands
    elif source.op == "call_method":
        if target.endswith("_") and not target.endswith("__"):
            yield from node.operands[:1]
    elif source.op == "call_function":
        name = getattr(target, "__name__", "")
        in_place = target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
        if (
            in_place
            or source.kwargs.get("inplace")
            or any(value is True for value in source.args)
            or "out" in source.kwargs
        ):
            yield from node.operands
