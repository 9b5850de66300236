"""What a front end records: module calls, what the recorded code read, and the sizes that it tested."""

from __future__ import annotations

import enum
import operator
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx, nn


class Untraceable(BaseException):
    """The reason why a forward cannot be recorded. Not an Exception, so that the recorded code does not catch it."""


def refuse(reason: str) -> NoReturn:
    raise Untraceable(reason)


def assert_that(condition: Any, message: tuple[Any, ...]) -> None:
    """Raise an AssertionError unless `condition` is true; the message is the concatenation of the parts."""
    torch._assert(condition, "".join(map(str, message)))


class Read(NamedTuple):
    """A value that the recorded code depended on.

    Args:
        kind: "attribute" (in the ``__dict__`` of the module at path `owner`), "absent" (not in it), "_parameters",
            "_buffers" or "_modules" (in there, None or not), "missing" (nowhere), "children" (the names), "field"
            (attribute of an object in there, ``...`` if there is none) or "kind" (class of that object), "class"
            (attribute of a class or module), "global" (in a dictionary) or "cell" (of a closure).
        owner: path of the module, or the class, dictionary or cell.
        name: name of the attribute or variable; dotted for "field" and "kind".
        value: the value read.
    """

    kind: str
    owner: Any
    name: str
    value: Any


class Size(NamedTuple):
    """A read of a tensor's size: ``shape``, ``ndim`` or ``numel()``."""

    tensor: fx.Node
    name: str


class Frame:
    """One call of a module that was recorded operation by operation. Nodes stand for values in all attributes.

    Args:
        path, module: the module that is called.
        parent: the call that it is a part of, or None.
        call: its positional and keyword arguments.
    """

    def __init__(self, path: str, module: nn.Module, parent: Frame | None, call: tuple[Any, Any]) -> None:
        self.path = path
        self.module = module
        self.parent = parent
        self.call = call
        self.arguments: dict[str, Any] = {}  # by parameter
        self.result: Any = None
        self.reads: dict[tuple[str, Any, str], Read] = {}
        self.tests_for_none = False  # a function of this call tests a value for None, True or False by ``is``
        self.has_unknown = False  # this call handles a value that may be one of them
        self.changes_arguments = False  # the call changes a list or dict of its caller
        self.conditions: list[tuple[Any, Any]] = []  # expressions of sizes, with the value that the recording assumes
        self.assertions: list[tuple[Any, Any]] = []  # those whose failure is an error

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values in the arguments, each once."""
        return nodes_in(self.arguments)

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The values in the result, each once."""
        return nodes_in(self.result)

    def within(self, other: Frame) -> bool:
        """Return whether this call is `other`, or a part of it."""
        frame: Frame | None = self
        while frame is not None and frame is not other:
            frame = frame.parent
        return frame is other


class Recording(NamedTuple):
    """A recorded forward.

    Args:
        graph: the operations. Nodes carry their :class:`Frame` in ``meta["frame"]``.
        frames: all recorded module calls, outer before inner; the first is the root's.
        opaque: the reason why each module that is recorded as one call was not recorded operation by operation.
        reads_training: whether the recorded code read the training mode of a module.
    """

    graph: fx.Graph
    frames: list[Frame]
    opaque: dict[str, str]
    reads_training: bool


# Structures of values, and expressions of sizes

#: Immutable values. Recorded code may depend on them.
ATOMS: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, type(...), slice, range, enum.Enum),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size),
)


def structure(value: Any) -> Any:
    """Return an argument or result of a module call, with nodes in place of proxies."""
    if isinstance(value, fx.Proxy):
        return value.node
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(structure, value))
    if type(value) in (tuple, list):
        return type(value)([structure(item) for item in value])
    if type(value) in (dict, OrderedDict):
        return type(value)({key: structure(item) for key, item in value.items()})
    return value if isinstance(value, ATOMS) else refuse(f"passes a {type(value).__name__} to or from a module")


def nodes_in(value: Any) -> tuple[fx.Node, ...]:
    """Return the nodes in a structure, each once."""
    if isinstance(value, fx.Node):
        return (value,)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return tuple(dict.fromkeys(node for item in items for node in nodes_in(item)))


def size_expression(node: fx.Node) -> Any:
    """Return a value computed from sizes as a constant, a :class:`Size` or a tuple (function, operands ...)."""
    target: Any = node.target
    arguments: Any = node.args
    if node.op == "call_function" and target is getattr and arguments[1] in ("shape", "ndim"):
        return Size(*arguments)
    if node.op == "call_method" and target == "size":
        shape = Size(arguments[0], "shape")
        return (operator.getitem, shape, arguments[1]) if len(arguments) > 1 else shape
    if node.op == "call_method" and target in ("dim", "numel", "ndimension"):
        return Size(arguments[0], "numel()" if target == "numel" else "ndim")
    if node.op == "call_function" and (target is int or getattr(target, "__module__", "") == "_operator"):
        return target, *[size_expression(value) if isinstance(value, fx.Node) else value for value in arguments]
    return refuse("depends on the values of a tensor")


#: Number of spatial dimensions of a layer's input, and the attribute that holds its channels.
_CONVOLUTIONS: dict[type, tuple[int, str]] = {
    nn.Conv1d: (1, "in_channels"), nn.Conv2d: (2, "in_channels"), nn.Conv3d: (3, "in_channels"),
}  # fmt: skip
_NORMS: dict[type, tuple[int, str]] = {
    nn.BatchNorm2d: (2, "num_features"), nn.BatchNorm3d: (3, "num_features"),
    nn.BatchNorm1d: (0, "num_features"), nn.Linear: (0, "in_features"),
}  # fmt: skip


def ordinary_shape(root: nn.Module) -> torch.Size:
    """Return the shape of an ordinary batch for `root`: the rank and channels that its first convolution expects.

    Without a convolution it is what the first batch norm or linear layer expects; vectors for ``BatchNorm1d``.
    """
    for layers in (_CONVOLUTIONS, _NORMS):
        for module in root.modules():
            for kind, (spatial, channels) in layers.items():
                if isinstance(module, kind):
                    return torch.Size((32, getattr(module, channels), *(224,) * spatial))
    return torch.Size((32, 3, 224, 224))


def assumed_rank(graph: fx.Graph) -> int:
    """Return the rank that the recording assumes of all tensors."""
    return next((len(node.meta["shape"]) for node in graph.nodes if node.op == "placeholder"), 4)


def evaluate(expression: Any) -> Any:
    """Return an expression's value for an ordinary batch."""
    if isinstance(expression, Size):
        if expression.name == "ndim":
            return assumed_rank(expression.tensor.graph)
        if expression.name == "numel()":
            return 1 << 20
        if expression.tensor.op != "placeholder":
            refuse("depends on the size of an intermediate tensor")
        return expression.tensor.meta["shape"]
    if type(expression) is tuple and expression and callable(expression[0]):
        return expression[0](*map(evaluate, expression[1:]))
    return expression


def sizes_in(expression: Any) -> Iterator[Size]:
    """Yield the sizes in an expression, see :attr:`fused_res.graph.recording.Frame.conditions`."""
    if isinstance(expression, Size):
        yield expression
    elif type(expression) is tuple and expression and callable(expression[0]):
        for operand in expression[1:]:
            yield from sizes_in(operand)
