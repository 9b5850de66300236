"""The symbolic front end: record a module's forward as a ``torch.fx`` graph, without running it on the module.

The forward runs on a :class:`_Shadow` of the module, which returns shadows of its children and proxies for its tensors,
so a recording cannot change the module, and no class of ``torch.nn`` is patched. All that the code can reach is safe by
construction: functions run with :class:`_Globals` in place of their globals, so every read of a global, a closure or an
attribute returns an immutable value, a shadow, or a recording function, and is noted as a :class:`Read` that the
generated forward verifies on every call. Anything else makes the module :class:`Untraceable`.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, GraphAppendingTracer
from torch.nn import functional as F

from fused_res.graph.bytecode import call_of_message, may_be_bool, side_effect, tests_value_for_none
from fused_res.graph.graph_modules import forward_in, opaque_graph_reason
from fused_res.graph.ir import eliminate_dead_reads
from fused_res.graph.norms import batch_norm, find_norms
from fused_res.graph.recording import (
    ATOMS,
    Frame,
    Read,
    Recording,
    Size,
    Untraceable,
    assert_that,
    evaluate,
    ordinary_shape,
    refuse,
    size_expression,
    sizes_in,
    structure,
)
from fused_res.nn.chain import has_no_hooks
from fused_res.nn.fusable_module import FusableModule, stock_class


def record(
    root: nn.Module, training: bool, inline_fusable: bool = False, requires_grad: bool | None = None
) -> Recording:
    """Record the forward of `root`, including all submodules that can be recorded.

    Args:
        root: any module. Its parameters without a default are tensors, the others are not given.
        training: the training mode that all modules have in this recording.
        inline_fusable: record the operations of this package's own modules, too.
        requires_grad: what a test of a tensor's ``requires_grad`` returns; None refuses to record one.

    Raises:
        Untraceable: the forward of `root` itself cannot be recorded.
    """
    if reason := opaque_reason(root, inline_fusable, called=False):
        raise Untraceable(reason)
    tracer = _Tracer(training, inline_fusable, requires_grad)
    shape = ordinary_shape(root)
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    for parameter in list(inspect.signature(stock_forward(root), follow_wrapped=False).parameters.values())[1:]:
        if parameter.default is not parameter.empty or parameter.kind in _VARIABLE:  # of those, none is given
            continue
        argument = tracer.create_proxy("placeholder", parameter.name, (), {})
        argument.node.meta["shape"] = shape
        if parameter.kind is parameter.KEYWORD_ONLY:
            keywords[parameter.name] = argument
        else:
            arguments.append(argument)
    tracer.inline("", root, tuple(arguments), keywords)
    for argument in (*arguments, *keywords.values()):
        argument.node.meta["frame"] = tracer.frames[0]
    eliminate_dead_reads(tracer.graph, {node for frame in tracer.frames for node in (*frame.inputs, *frame.outputs)})
    return Recording(tracer.graph, tracer.frames, tracer.opaque, tracer.reads_training)


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
TESTS_REQUIRES_GRAD = "tests whether a tensor requires a gradient"


def _reads_of_norm(path: str, module: nn.Module, training: bool) -> list[Read] | None:
    """Return what a forward depends on if it computes a batch norm, whether or not its input requires a gradient.

    Frozen batch norms may save memory by arithmetic in place of ``F.batch_norm``, whose backward computes more.
    """
    reads: list[Read] = []
    for requires_grad in (False, True):
        try:
            recording = record(module, training, requires_grad=requires_grad)
        except Untraceable:
            return None
        (root, *others), nodes = recording.frames, set(recording.graph.nodes)
        if others or root.conditions or root.assertions or len(root.outputs) != 1 or root.outputs[0] is not root.result:
            return None
        call = None if module._modules else find_norms(recording.graph, {"": module}.__getitem__).get(root.result)
        if call is None or nodes != {call.input, root.result, *call.parts} or len(root.inputs) != 1:
            return None
        reads += [read._replace(owner=path) if read.owner == "" else read for read in root.reads.values()]
    return reads


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is one operation: a forward of ``torch.nn``, and no children."""
    forward: Any = getattr(stock_class(type(module)), "forward", None)
    is_torch = (getattr(forward, "__module__", None) or "").startswith("torch.nn.")
    return is_torch and not module._modules and not isinstance(module, _CONTAINERS)


def stock_forward(module: nn.Module) -> Any:
    """Return the function that computes the forward of `module` unfused."""
    return getattr(stock_class(type(module)), _forward_name(module))


def _forward_name(module: nn.Module) -> str:
    """Return "stock_forward" for a module of this package, unless a subclass overrides ``forward``."""
    kinds = stock_class(type(module)).__mro__ if isinstance(module, FusableModule) else ()
    defined = (name for kind in kinds for name in ("stock_forward", "forward") if name in vars(kind))
    return next(defined, "forward")


def opaque_reason(module: nn.Module, inline_fusable: bool, called: bool = True) -> str | None:
    """Return why the forward of `module` is not to be recorded operation by operation, or None.

    Args:
        module, inline_fusable: see :func:`record`.
        called: whether it is called in the recorded forward, which would miss its hooks; otherwise they run around it.
    """
    kind = stock_class(type(module))
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit"
    if isinstance(module, FusableModule) and not (inline_fusable and hasattr(module, "stock_forward")):
        return "is a module of fused_res.nn"
    if isinstance(module, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
        return "wraps a model for parallel execution"
    if not isinstance(stock_forward(module), types.FunctionType):
        return "has no function as its forward"
    if stock_forward(module) is nn.Module.forward:
        return "has no forward"
    if "forward" in module.__dict__ or (called and not has_no_hooks(module.__dict__)):
        return "has a hook, or a forward of its own"
    if isinstance(module, fx.GraphModule):
        if reason := opaque_graph_reason(kind):
            return reason
    elif kind.__call__ is not nn.Module.__call__:
        return "overrides __call__"
    if kind.__getattr__ is not nn.Module.__getattr__ or kind.__getattribute__ is not object.__getattribute__:
        return "overrides attribute access"
    return None


# Proxies of tensors

#: Properties that every tensor has, and that are not None.
_TENSOR_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "is_leaf", "is_cuda"),
    *("is_sparse", "is_quantized", "is_meta", "T", "mT", "H", "mH", "real", "imag", "data"),
)


class _Proxy(fx.Proxy):
    """A value of the recorded forward. In-place operators are recorded as such, which stock proxies do not do."""

    def __getattr__(self, name: str) -> Any:
        if name not in _TENSOR_PROPERTIES and not callable(getattr(Tensor, name, None)):
            refuse(f"reads the attribute {name!r} of a tensor")
        tracer: Any = self.tracer
        if may_be_bool(name):
            tracer.frame.has_unknown = True
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            refuse(f"sets the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        refuse("takes a tensor's length")

    def __hash__(self) -> int:
        refuse("uses a tensor, or a property of one, as a key")

    def __str__(self) -> str:
        expression = size_expression(self.node)
        if isinstance(expression, Size) and expression.name == "ndim":
            tracer: Any = self.tracer
            tracer.frame.assertions.append((expression, evaluate(expression)))  # in the message of an assertion
            return str(evaluate(expression))
        return refuse("formats a tensor, or a property of one")

    def __format__(self, specification: str) -> str:
        tracer: Any = self.tracer
        caller = sys._getframe(1)
        call = call_of_message(caller.f_code, caller.f_lasti)
        if call is None or specification or tracer.message not in (None, (caller.f_code, call)):
            return format(str(self), specification)
        size_expression(self.node)
        tracer.message = caller.f_code, call  # the text is the message of the assertion that is called next
        tracer.formatted.append(self)
        return f"{_FORMATTED}{len(tracer.formatted) - 1}{_FORMATTED}"


_FORMATTED = "\ue000"  # encloses the index of a formatted proxy in the message of an assertion


class _Attribute(Attribute, _Proxy):
    """An attribute of a tensor, recorded when it is used, or a method, recorded when it is called."""


def _define_in_place(name: str) -> None:
    function = getattr(operator, name)

    def record_in_place(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{name}__", record_in_place)


for _name in (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    _define_in_place(f"i{_name}")


def _is_about_rank(condition: Any) -> bool:
    """Return whether a condition depends on nothing but ranks, which norms and guards verify."""
    if not isinstance(condition, fx.Proxy):
        return False
    try:
        sizes = list(sizes_in(size_expression(condition.node)))
    except Untraceable:
        return False
    return all(size.name == "ndim" for size in sizes)


def _is_tensor(node: fx.Node) -> bool:
    """Return whether a value is certainly one tensor."""
    is_operation = node.op == "call_function" and node.target in (torch.cat, torch.relu, torch.add, F.relu)
    return is_operation or node.op in ("placeholder", "get_attr", "call_module")


def _is_present(tracer: _Tracer, node: fx.Node) -> bool:
    """Return whether a value is certainly not None, True or False, which recorded code may test for by ``is``."""
    name = str(node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target))
    if node.op in ("call_function", "call_method") and may_be_bool(name):
        return False
    if node.op == "call_module":
        return str(node.target) not in tracer.opaque
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        container = node.args[0]  # multi-head attention returns None in place of weights
        return container.op != "call_module" and container.target is not F.multi_head_attention_forward
    return True


# Containers that the recorded code may read


def _read_only_class(kind: type) -> type:
    """Return a subclass of a container that refuses changes, which a recording would lose."""
    names = (
        *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "update", "setdefault", "popitem"),
        *("move_to_end", "add", "discard", "difference_update", "intersection_update", "symmetric_difference_update"),
        *("__setitem__", "__delitem__", "__iadd__", "__imul__", "__ior__", "__iand__", "__isub__", "__ixor__"),
    )
    return type(kind.__name__, (kind,), {name: _refuse_change for name in names if hasattr(kind, name)})


def _refuse_change(self: Any, *arguments: Any, **options: Any) -> NoReturn:
    refuse(f"changes a {type(self).__name__} that outlives the call")


_READ_ONLY: dict[type, Any] = {kind: _read_only_class(kind) for kind in (list, dict, OrderedDict, set)}


def _read_only_copy(value: Any, convert: Callable[[Any], Any]) -> Any:
    kind = type(value)
    made = _READ_ONLY[kind]()
    if isinstance(value, dict):
        for key, item in value.items():
            kind.__setitem__(made, key, convert(item))
    else:
        for item in value:
            (list.append if kind is list else set.add)(made, convert(item))
    return made


# The tracer


class _Tracer(GraphAppendingTracer):
    """Records operations into a graph, and what the recorded code depends on into the current frame."""

    def __init__(self, training: bool, inline_fusable: bool, requires_grad: bool | None) -> None:
        super().__init__(fx.Graph())
        self.training = training
        self.inline_fusable = inline_fusable
        self.requires_grad = requires_grad
        self.frames: list[Frame] = []
        self.frame: Any = None
        self.opaque: dict[str, str] = {}
        self.reads_training = False
        self.failure: Untraceable | None = None
        self.formatted: list[_Proxy] = []
        self.message: tuple[types.CodeType, range] | None = None  # the call whose last argument formats a size
        self.shadows: dict[str, _Shadow] = {}
        self.functions: dict[Any, types.FunctionType] = {}
        self.globals: dict[int, _Globals] = {}
        self.builtins = _builtins_for(self)

    # Operations

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *arguments: Any, **options: Any) -> fx.Node:
        node = super().create_node(*arguments, **options)
        node.meta["frame"] = self.frame
        if self.frame is not None and not _is_present(self, node):
            node.meta["unknown"] = self.frame.has_unknown = True
        return node

    def create_arg(self, value: Any) -> Any:
        if isinstance(value, (Tensor, nn.Module)):
            refuse("uses a tensor that is neither an input, a parameter nor a buffer")
        if type(value) is _Object:
            refuse(f"passes a {value.__class__.__name__} to an operation")
        if isinstance(value, (_Recorder, _Namespace, _Class, types.FunctionType, types.MethodType)):
            refuse("passes a function or class to an operation")
        if type(value) is _Shadow:
            refuse("passes a module to an operation")
        for kind, read_only in _READ_ONLY.items():
            if type(value) is read_only:
                value = kind(value)
        try:
            return super().create_arg(value)
        except NotImplementedError:
            refuse(f"passes a {type(value).__name__} to an operation")

    def to_bool(self, proxy: fx.Proxy) -> bool:
        node = proxy.node
        if node.target is getattr and node.args[1] == "requires_grad":
            return refuse(TESTS_REQUIRES_GRAD) if self.requires_grad is None else self.requires_grad
        return bool(self.assume(size_expression(proxy.node)))

    def assume(self, expression: Any) -> Any:
        """Return an expression's value for an ordinary batch; the generated forward verifies it on each call."""
        value = evaluate(expression)
        self.frame.conditions.append((expression, value))
        return value

    def assert_now(self, condition: Any, message: str) -> None:
        if self.message is not None:
            caller = sys._getframe(1)
            code, call = self.message
            if caller.f_code is not code or caller.f_lasti not in call:
                refuse("formats a tensor, or a property of one")
            self.message = None
            if not _is_about_rank(condition):
                parts: list[Any] = message.split(_FORMATTED)
                parts[1::2] = [self.formatted[int(index)] for index in parts[1::2]]
                self.create_proxy("call_function", assert_that, (condition, tuple(parts)), {})
                return
        conditions = self.frame.conditions
        count = len(conditions)
        try:
            assert condition, message
        except Untraceable:  # it depends on more than the sizes of the arguments
            self.create_proxy("call_function", torch._assert, (condition, message), {})
        self.frame.assertions += conditions[count:]
        del conditions[count:]

    def keys(self, proxy: fx.Proxy) -> Any:
        refuse("unpacks a tensor as a mapping")

    # Modules

    def call(self, path: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Record a call of a module: operation by operation if that is possible."""
        if not is_layer(module):
            reason = opaque_reason(module, self.inline_fusable)
            if reason is None:
                state = self.reads_training, self.frame
                frames, nodes = len(self.frames), len(self.graph.nodes)
                try:
                    return self.inline(path, module, arguments, options)
                except Untraceable as failure:
                    reason = str(failure)
                    self.failure = self.message = None
                    self.reads_training, self.frame = state
                    del self.frames[frames:]
                    for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - nodes]:
                        self.graph.erase_node(node)
                if reason == TESTS_REQUIRES_GRAD and (reads := _reads_of_norm(path, module, self.training)):
                    for read in reads:
                        self.note(*read)
                    norm = self.create_proxy("call_module", path, arguments, options)
                    norm.node.meta["is_norm"] = True
                    return norm
            self.opaque[path] = reason
            if any(isinstance(value, (list, dict, set)) for value in (*arguments, *options.values())):
                refuse(f"passes a list or dict to {path or 'a module'}, which {reason}")
        return self.create_proxy("call_module", path, arguments, options)

    def inline(self, path: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run the forward of a module with proxies."""
        call = structure(arguments), structure(options)
        frame = self.frame = Frame(path, module, self.frame, call)
        self.frames.append(frame)
        try:
            stock = stock_forward(module)
            bound = inspect.signature(stock, follow_wrapped=False).bind(None, *arguments, **options)
            bound.apply_defaults()
            frame.arguments = {name: structure(value) for name, value in list(bound.arguments.items())[1:]}
            frame.has_unknown = any(node.meta.get("unknown") for node in frame.inputs)
            result = self.forward_of(path, module)(*arguments, **options)
            if self.failure is not None:  # the code has caught it
                raise self.failure
            if self.message is not None:
                refuse("formats a tensor, or a property of one")
            frame.result = structure(result)
            if frame.parent is not None and any(node.meta.get("unknown") for node in frame.outputs):
                frame.parent.has_unknown = True
            if frame.has_unknown and frame.tests_for_none:
                refuse("tests a value for None or a bool by its identity")
            frame.changes_arguments = (structure(arguments), structure(options)) != call
        except Untraceable as failure:
            self.failure = failure
            raise
        except Exception as error:
            self.failure = Untraceable(f"cannot be recorded ({type(error).__name__}: {error})")
            raise self.failure from error
        self.frame = frame.parent
        return result

    def forward_of(self, path: str, module: nn.Module) -> Any:
        """Return the instrumented forward of a module."""
        shadow = self.shadow(path, module)
        if not isinstance(module, fx.GraphModule):
            return _read(shadow, _forward_name(module))
        kind = stock_class(type(module))
        forward, depends_on_mode = forward_in(kind, module, self.training)
        self.reads_training |= depends_on_mode
        self.note("class", kind, "forward", forward)
        return types.MethodType(self.instrument(forward), shadow)

    def shadow(self, path: str, module: nn.Module) -> _Shadow:
        if path not in self.shadows:
            self.shadows[path] = _Shadow(self, path, module)
        return self.shadows[path]

    # What the code reads

    def note(self, kind: str, owner: Any, name: str, value: Any) -> None:
        key = kind, owner if isinstance(owner, (str, type)) else id(owner), name
        self.frame.reads[key] = Read(kind, owner, name, value)

    def convert(self, value: Any, what: str) -> Any:
        """Return a value of the recorded code's surroundings in a form that the code cannot change."""
        kind = type(value)
        if isinstance(value, ATOMS):
            return value
        if kind is tuple:
            return tuple([self.convert(item, what) for item in value])
        if kind in _READ_ONLY:
            return _read_only_copy(value, lambda item: self.convert(item, what))
        if kind is frozenset and all(isinstance(item, ATOMS) for item in value):
            return value
        if kind is functools.partial:
            positional, keywords = self.convert(value.args, what), self.convert(dict(value.keywords), what)
            return functools.partial(self.convert(value.func, what), *positional, **keywords)
        if kind is types.ModuleType and (_is_of_torch(value.__name__) or value in (math, operator, functools)):
            return _Namespace(self, value)
        if isinstance(value, type):
            return value if value is OrderedDict or value in _BUILTIN_TYPES else _Class(self, value)
        if kind is types.FunctionType and not _is_of_torch(value.__module__):
            return self.instrument(value)
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            return self.operation(value, what)
        return refuse(f"reads {what}, a {kind.__name__}")

    def operation(self, function: Any, what: str) -> Any:
        """Return a function of torch, or a pure one, for the recorded code."""
        if function.__name__ in _FALSE_IN_EAGER and _is_of_torch(function.__module__):
            return _false
        if function is torch._assert:
            return self.assert_now
        if function.__module__ in ("math", "_operator", "_functools", "functools"):
            return function
        if function in _OPERATIONS:
            return _Recorder(self, function)
        return refuse(f"reads {what}")

    def instrument(self, function: types.FunctionType) -> types.FunctionType:
        """Return a copy of a function that sees converted globals, closures and defaults."""
        if self.frame is not None and not _is_of_torch(function.__module__):
            self.frame.tests_for_none |= tests_value_for_none(function.__code__)
            for name in ("__code__", "__defaults__", "__kwdefaults__"):  # IPython's autoreload replaces them
                if getattr(function, name) is not None:
                    self.note("class", function, name, getattr(function, name))
        key = function, self.frame  # every call notes what it reads of the closure
        if key in self.functions:
            return self.functions[key]
        code = function.__code__
        if reason := side_effect(code, code.co_freevars):
            refuse(f"{function.__name__} {reason}")
        defaults: tuple[Any, ...] = function.__defaults__ or ()
        keyword_defaults: dict[str, Any] = function.__kwdefaults__ or {}
        for value in (*defaults, *keyword_defaults.values()):
            items = value if isinstance(value, tuple) else (value,)
            if not all(
                isinstance(item, (*ATOMS, types.FunctionType, types.BuiltinFunctionType, type)) for item in items
            ):
                refuse(f"{function.__name__} has a default argument that may change")
        cells = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                value = cell.cell_contents
                self.note("cell", cell, name, value)
                cell = types.CellType(self.convert(value, f"the variable {name} of an outer function"))
            cells.append(cell)
        outer = function.__globals__
        scope = self.globals.setdefault(id(outer), _Globals(self, outer))
        made = types.FunctionType(code, scope, function.__name__, None, tuple(cells))
        what = f"a default argument of {function.__name__}"
        made.__defaults__ = tuple([self.convert(value, what) for value in defaults])
        made.__kwdefaults__ = {name: self.convert(value, what) for name, value in keyword_defaults.items()}
        self.functions[key] = made
        return made


def _is_of_torch(name: str | None) -> bool:
    return name is not None and (name == "torch" or name.startswith("torch."))


#: Functions of torch that return how a forward runs; in eager execution, False.
_FALSE_IN_EAGER = ("is_scripting", "is_tracing", "is_in_onnx_export")
#: Tensor operations of torch: no function that sets or returns a mode or a state.
_OPERATIONS = {
    function
    for module in (torch, F, torch.functional, torch._C._nn, torch.linalg, torch.fft, torch.special)
    for name, function in vars(module).items()
    if isinstance(function, types.BuiltinFunctionType)
    or (isinstance(function, types.FunctionType) and function.__module__ in ("torch.functional", F.__name__))
    if not name.startswith(("_", "set_", "get_", "is_"))
}


def _false() -> bool:
    return False


# Shadows: what the recorded code sees in place of modules, globals, modules of torch, functions and classes


class _Shadow:
    """Stands for a module while its forward is recorded. All names but special ones are those of the module."""

    __slots__ = ("_shadowed",)

    def __init__(self, tracer: _Tracer, path: str, module: nn.Module) -> None:
        object.__setattr__(self, "_shadowed", (tracer, path, module))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return stock_class(type(self._shadowed[2]))

    def __getattr__(self, name: str) -> Any:
        return _read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse(f"sets the attribute {name!r} of a module")

    def __delattr__(self, name: str) -> None:
        refuse(f"deletes the attribute {name!r} of a module")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        tracer, path, module = self._shadowed
        return tracer.call(path, module, arguments, options)

    def __eq__(self, other: object) -> bool:
        return type(other) is _Shadow and other._shadowed[2] is self._shadowed[2]

    def __hash__(self) -> int:
        return hash(self._shadowed[2])

    def __iter__(self) -> Iterator[Any]:
        return _call_special(self, "__iter__")

    def __len__(self) -> int:
        return _call_special(self, "__len__")

    def __getitem__(self, key: Any) -> Any:
        return _call_special(self, "__getitem__", key)

    def __contains__(self, key: Any) -> bool:
        return _call_special(self, "__contains__", key)

    def __bool__(self) -> bool:
        if hasattr(self.__class__, "__bool__"):
            refuse("overrides __bool__")
        return len(self) > 0 if hasattr(self.__class__, "__len__") else True


_MISSING = object()


def _read(shadow: _Shadow, name: str) -> Any:
    """Return an attribute of a shadow, found in the order in which Python and ``nn.Module`` look for it."""
    tracer, path, module = shadow._shadowed
    state, kind = module.__dict__, shadow.__class__
    if name == "training":
        tracer.reads_training = True
        tracer.note("attribute", path, name, tracer.training)
        return tracer.training
    if name == "_modules":
        return types.MappingProxyType(_children(shadow))
    if name in ("_parameters", "_buffers", "__dict__"):
        refuse(f"reads {name}")
    found = inspect.getattr_static(kind, name, _MISSING)
    if isinstance(found, property):
        tracer.note("class", kind, name, found)
        return tracer.instrument(found.fget)(shadow)
    if name in state:
        if _is_plain_object(state[name]):
            return _Object(tracer, path, (name,), state[name])
        tracer.note("attribute", path, name, state[name])
        return tracer.convert(state[name], f"the attribute {name}")
    if found is not _MISSING:
        tracer.note("absent", path, name, None)
        tracer.note("class", kind, name, getattr(kind, name))
        return _class_attribute(shadow, found, name)
    full = f"{path}.{name}" if path else name
    for group in ("_parameters", "_buffers", "_modules"):
        if name in state[group]:
            value = state[group][name]
            if value is None:
                tracer.note(group, path, name, None)
                return None
            if group == "_modules":
                return tracer.shadow(full, value)
            tracer.note(group, path, name, True)
            return tracer.create_proxy("get_attr", full, (), {})
    tracer.note("missing", path, name, None)
    raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")


def _class_attribute(shadow: _Shadow, found: Any, name: str) -> Any:
    tracer = shadow._shadowed[0]
    if isinstance(found, classmethod):
        refuse(f"calls the class method {name}")
    if isinstance(found, types.FunctionType):
        return types.MethodType(tracer.instrument(found), shadow)
    return tracer.convert(found.__func__ if isinstance(found, staticmethod) else found, f"the attribute {name}")


def _children(shadow: _Shadow) -> dict[str, Any]:
    tracer, path, module = shadow._shadowed
    tracer.note("children", path, "", tuple(module._modules))
    shadows: dict[str, Any] = {}
    for name, child in module._modules.items():
        shadows[name] = None if child is None else tracer.shadow(f"{path}.{name}" if path else name, child)
        if child is None:
            tracer.note("_modules", path, name, None)
    return shadows


_SPECIAL: dict[str, Any] = {
    "__iter__": iter, "__len__": len, "__getitem__": operator.getitem, "__contains__": operator.contains,
}  # fmt: skip
_CONTAINER_METHODS = {name: {getattr(kind, name, None) for kind in _CONTAINERS} for name in _SPECIAL}


def _call_special(shadow: _Shadow, name: str, *arguments: Any) -> Any:
    """Call a special method, which Python looks up in the class; those of the containers of ``torch.nn`` are known."""
    module = shadow._shadowed[2]
    if not isinstance(module, _CONTAINERS) or getattr(shadow.__class__, name) not in _CONTAINER_METHODS[name]:
        return _read(shadow, name)(*arguments)
    if arguments and isinstance(arguments[0], slice):
        refuse("slices a container of modules")
    children = _children(shadow)
    return _SPECIAL[name](children if isinstance(module, nn.ModuleDict) else list(children.values()), *arguments)


class _Globals(dict[str, Any]):
    """Globals of an instrumented function: a read returns a converted value and is noted."""

    def __init__(self, tracer: _Tracer, outer: dict[str, Any]) -> None:
        super().__init__(__builtins__=tracer.builtins)
        self.tracer = tracer
        self.outer = outer

    def __getitem__(self, name: str) -> Any:
        if name not in self.outer:
            self.tracer.note("global", self.outer, name, None)
            raise KeyError(name)
        value = self.outer[name]
        self.tracer.note("global", self.outer, name, value)
        return self.tracer.convert(value, f"the global variable {name}")


#: Modules whose classes override ``__getattribute__`` only to give an attribute a second name.
_PLAIN_ACCESS = ("transformers.configuration_utils",)


def _is_plain_object(value: Any) -> bool:
    """Return whether a value is an object whose attributes are only looked up, such as a configuration."""
    kind: Any = type(value)
    access = kind.__getattribute__
    if kind is types.SimpleNamespace:
        return True
    return (
        bool(kind.__flags__ & _HEAP_TYPE)
        and not isinstance(value, (*ATOMS, type, Tensor, nn.Module, *_READ_ONLY, tuple, frozenset, functools.partial))
        and (access is object.__getattribute__ or getattr(access, "__module__", None) in _PLAIN_ACCESS)
        and not hasattr(kind, "__getattr__")
        and not callable(value)
    )


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: defined by a class statement


class _Object:
    """Stands for a plain object that an attribute of a module holds: each attribute read is verified on every call."""

    __slots__ = ("_shadowed",)

    def __init__(self, tracer: _Tracer, path: str, names: tuple[str, ...], value: Any) -> None:
        object.__setattr__(self, "_shadowed", (tracer, path, names, value))
        tracer.note("kind", path, ".".join(names), type(value))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._shadowed[3])

    def __getattr__(self, name: str) -> Any:
        tracer, path, names, value = self._shadowed
        found = inspect.getattr_static(type(value), name, _MISSING)
        if hasattr(type(found), "__get__") and not isinstance(found, types.MemberDescriptorType):
            refuse(f"calls {'.'.join(names)}.{name}")
        field = getattr(value, name, ...)
        if _is_plain_object(field):
            return _Object(tracer, path, (*names, name), field)
        tracer.note("field", path, ".".join((*names, name)), field)
        if field is ...:
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return tracer.convert(field, f"the attribute {'.'.join(names)}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        refuse(f"sets the attribute {name!r} of an object")

    def __delattr__(self, name: str) -> None:
        refuse(f"deletes the attribute {name!r} of an object")

    def __bool__(self) -> bool:
        kind = self.__class__
        return True if not hasattr(kind, "__bool__") and not hasattr(kind, "__len__") else refuse("tests an object")

    def __eq__(self, other: object) -> bool:
        refuse("compares an object")

    def __hash__(self) -> int:
        refuse("uses an object as a key")

    def __str__(self) -> str:
        refuse("formats an object")

    __repr__ = __str__

    def __format__(self, specification: str) -> str:
        refuse("formats an object")


class _Namespace:
    """Stands for a module of torch, or one of pure functions."""

    def __init__(self, tracer: _Tracer, module: types.ModuleType) -> None:
        self._shadowed = tracer, module

    def __getattr__(self, name: str) -> Any:
        tracer, module = self._shadowed
        if module is F and name == "batch_norm":
            return _Recorder(tracer, batch_norm)
        value, what = getattr(module, name), f"{module.__name__}.{name}"
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            tracer.note("global", vars(module), name, value)
            return tracer.operation(value, what)
        if not isinstance(value, types.ModuleType):
            tracer.note("class", module, name, value)
        return tracer.convert(value, what)


class _Recorder:
    """A function of torch that records an operation, whatever its arguments are: even torch.rand(3) runs each time."""

    def __init__(self, tracer: _Tracer, function: Any) -> None:
        self._shadowed = tracer, function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        tracer, function = self._shadowed
        return tracer.create_proxy("call_function", function, arguments, options)


class _Class:
    """Stands for a class: for ``isinstance``, for class attributes, and to make a layer without parameters."""

    def __init__(self, tracer: _Tracer, kind: Any) -> None:
        self._shadowed = tracer, kind

    def __getattr__(self, name: str) -> Any:
        tracer, kind = self._shadowed
        if inspect.getattr_static(kind, name, _MISSING) is _MISSING:
            raise AttributeError(name)
        value = getattr(kind, name)
        tracer.note("class", kind, name, value)
        return tracer.convert(value, f"{kind.__name__}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        kind = self._shadowed[1]
        if issubclass(kind, BaseException) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
            return kind(*arguments, **options)
        if kind is nn.Identity or kind.__module__ == nn.ReLU.__module__:
            layer = kind(*arguments, **options)
            if not any(True for _ in layer.parameters()):
                return layer.forward  # it has no state and no hooks
        return refuse(f"makes a {kind.__name__}")


class _Super:
    """``super()`` of a shadow: methods run with converted globals, too."""

    def __init__(self, kind: type, shadow: _Shadow) -> None:
        self._shadowed = kind, shadow

    def __getattr__(self, name: str) -> Any:
        kind, shadow = self._shadowed
        order = shadow.__class__.__mro__
        for base in order[order.index(kind) + 1 :]:
            if name in vars(base):
                shadow._shadowed[0].note("class", base, name, getattr(base, name))
                return _class_attribute(shadow, vars(base)[name], name)
        raise AttributeError(name)


# Builtins


class _Int(int):
    """``int`` for recorded code: the conversion of a tensor's size is recorded."""

    def __new__(cls, value: Any = 0, *arguments: Any) -> Any:
        if not isinstance(value, fx.Proxy):
            return int(value, *arguments)
        size_expression(value.node)
        return value.tracer.create_proxy("call_function", int, (value, *arguments), {})


_BUILTIN_TYPES = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, slice, range, object)
_PURE_BUILTINS = (
    *(abs, all, any, divmod, enumerate, filter, iter, map, max, min, next, reversed, round, sorted, sum, zip),
    *_BUILTIN_TYPES,
)


def _builtins_for(tracer: _Tracer) -> dict[str, Any]:
    """Return the builtins of instrumented functions: pure ones, some that know proxies, and the others refuse."""

    def safe_isinstance(value: Any, kinds: Any) -> bool:
        if not isinstance(value, fx.Proxy):
            return issubclass(value.__class__, _unwrap(kinds))
        if not _is_tensor(value.node):
            refuse("tests the type of a value that may not be a tensor")
        return issubclass(Tensor, _unwrap(kinds))

    def safe_getattr(value: Any, name: str, *default: Any) -> Any:
        if isinstance(value, fx.Proxy) and default and not hasattr(Tensor, name):
            refuse(f"reads the attribute {name!r} of a tensor, if it has one")
        return getattr(value, name, *default)

    def safe_hasattr(value: Any, name: str) -> bool:
        if isinstance(value, fx.Proxy) and not hasattr(Tensor, name):
            refuse(f"reads the attribute {name!r} of a tensor, if it has one")
        return hasattr(value, name)

    def safe_callable(value: Any) -> bool:
        return callable(value) and not isinstance(value, fx.Proxy)

    def safe_len(value: Any) -> Any:
        if not isinstance(value, fx.Proxy):
            return len(value)
        shape = size_expression(value.node)
        return tracer.assume(Size(shape.tensor, "ndim")) if isinstance(shape, Size) else refuse("takes a length")

    def safe_super(*arguments: Any) -> _Super:
        if arguments:
            return _Super(_unwrap(arguments[0]), arguments[1])
        caller = sys._getframe(1)
        return _Super(caller.f_locals["__class__"], caller.f_locals[caller.f_code.co_varnames[0]])

    def refusing(name: str) -> Callable[..., NoReturn]:
        return lambda *arguments, **options: refuse(f"calls {name}")

    allowed: dict[str, Any] = {}
    for name, value in vars(builtins).items():
        is_exception = isinstance(value, type) and issubclass(value, BaseException)
        keep = is_exception or not callable(value) or any(value is pure for pure in _PURE_BUILTINS)
        allowed[name] = value if keep else refusing(name)
    safe = (safe_isinstance, safe_getattr, safe_hasattr, safe_callable, safe_len, safe_super)
    return allowed | {function.__name__.removeprefix("safe_"): function for function in safe} | {"int": _Int}


def _unwrap(kinds: Any) -> Any:
    if isinstance(kinds, tuple):
        return tuple([_unwrap(kind) for kind in kinds])
    return int if kinds is _Int else kinds._shadowed[1] if type(kinds) is _Class else kinds
