"""Generated forwards: straight-line Python that verifies its guards, then runs segments fused and the rest unchanged.

A :class:`Program` is the forward of one module, as it was recorded. It holds no module: it reads the module's children
on every call, so it is shared by copies. Its first lines verify what the recording depended on, and return
``NotImplemented`` if anything differs; the caller then runs the stock forward. Each segment is followed by the
operations that it replaces, for inputs that the fused operators do not support.
"""

from __future__ import annotations

import inspect
import linecache
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from fused_res.fusion.fused import fused_class
from fused_res.fusion.matcher import Head, Segment, Unit, source
from fused_res.graph.ir import Graph, Node, Op
from fused_res.graph.recording import Frame, Read, Size, assumed_rank, evaluate, nodes_in, sizes_in
from fused_res.graph.symbolic import is_layer, stock_forward
from fused_res.nn import chain
from fused_res.nn.fusable_module import stock_class
from fused_res.nn.packed import Head as PackedHead
from fused_res.ops.memory_format import has_same_layout


class Unemittable(Exception):
    """The reason why no forward can be generated for a module, although it was recorded."""


class Program:
    """The generated forward of one module.

    Args:
        source: text of the module that defines ``forward``.
        namespace: values that the text refers to.
        guards: what the first lines verify: a condition of failure and its description.
        segments, heads: what runs fused; paths of their layers are relative to the module.
    """

    def __init__(
        self, source: str, namespace: dict[str, Any], guards: Sequence[tuple[str, str]], segments: Sequence[Segment],
        heads: Sequence[Head], prefix: str,
    ) -> None:  # fmt: skip
        self.source = source
        self.segments = tuple(segments)
        self.heads = tuple(heads)
        self.prefix = prefix
        self._namespace = namespace
        self._guards = guards
        filename = f"<fused_res {id(self):x}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        exec(compile(source, filename, "exec"), namespace)
        self.forward: Callable[..., Any] = namespace["forward"]

    @property
    def key(self) -> Any:
        """Equal keys are equal programs, also of different modules."""
        constants = {k: v for k, v in self._namespace.items() if k not in ("forward", "__builtins__")}
        by_value = (int, float, complex, str, bytes, list, dict, set, tuple)
        return self.source, *[(name, repr(v) if isinstance(v, by_value) else id(v)) for name, v in constants.items()]

    def relative(self, path: str) -> str:
        return path[len(self.prefix) :].removeprefix(".")  # "" for the module itself

    def norms(self) -> Iterator[str]:
        """Yield the path of every norm in a segment, relative to the module."""
        for segment in self.segments:
            for node in segment.nodes:
                if node.op is Op.NORM:
                    yield self.relative(node.path)

    def failing_guard(self, module: nn.Module) -> str | None:
        """Return what the module's guards find changed, apart from its arguments, or None."""
        names = {"self": module}
        for code, description in self._guards:
            try:
                if code.startswith("if "):
                    if eval(code[3:], self._namespace, names):
                        return description
                else:
                    exec(code, self._namespace, names)
            except (AttributeError, KeyError, TypeError):
                return description
        return None


def generate(
    graph: Graph, frames: Sequence[Frame], owner: Frame, segments: Sequence[Segment], heads: Sequence[Head],
    packed: bool,
) -> Program:  # fmt: skip
    """Generate the forward of a module.

    Args:
        graph, frames: the recorded forward of a module that contains the owner.
        owner: call of the module.
        segments: all segments within that call. Calls of children without a segment are not looked into.
        heads: heads within that call. Those that follow a packed segment run with it, the others unfused.
        packed: run inference with packed weights, see :class:`fused_res.nn.packed.PackedProgram`.

    Raises:
        Unemittable: the module's forward cannot be generated.
    """
    return _Generator(graph, frames, owner, segments, heads, packed).generate()


class _Group(NamedTuple):
    """Consecutive segments, and a head after them, that one packed program runs."""

    segments: tuple[Segment, ...]
    head: Head | None = None

    @property
    def last(self) -> Node:
        return self.segments[-1].last if self.head is None else self.head.last


#: Attributes that decide what a layer's operation is.
_SETTINGS = {
    Op.ACTIVATION: ("min_val", "max_val", "negative_slope"), Op.GLOBAL_POOL: ("output_size",),
    Op.FLATTEN: ("start_dim", "end_dim"),
}  # fmt: skip
#: Modules with equal forwards share a program: in a call after the first one, its code is in the processor's caches.
_programs: WeakValueDictionary[Any, Program] = WeakValueDictionary()


class _Generator:
    def __init__(
        self, graph: Graph, frames: Sequence[Frame], owner: Frame, segments: Sequence[Segment], heads: Sequence[Head],
        packed: bool,
    ) -> None:  # fmt: skip
        self.graph = graph
        self.owner = owner
        self.segments = segments
        self.packed = packed
        self.groups = self._groups(heads)
        self.heads = [group.head for group in self.groups.values() if group.head is not None]
        self.parts: list[Segment | Head] = [*segments, *self.heads]
        self.nodes = {node.source: node for node in graph.nodes}
        #: The values that operations within segments return unchanged, with their operands.
        self.same = {
            node.source: source(node).source for segment in segments for node in segment.nodes if node.op is Op.IDENTITY
        }
        self.namespace: dict[str, Any] = {
            "Tensor": Tensor, "Parameter": nn.Parameter, "is_compiling": torch.compiler.is_compiling,
            "has_no_hooks": chain.has_no_hooks, "run_fused": chain.run_fused, "run_fused_norm": chain.run_fused_norm,
            "is_equal": is_equal, "reject": _reject, "has_same_layout": has_same_layout, "Head": PackedHead,
        }  # fmt: skip
        self.constants: dict[Any, str] = {}
        self.numbers: dict[fx.Node, int] = {}  # those of the recording differ between the calls of one module
        self.modules: dict[str, str] = {owner.path: "self"}
        self.running: set[str] = set()
        #: Lines that verify the arguments, and the module; each with what its failure means.
        self.argument_guards: list[tuple[str, str]] = []
        self.guards: list[tuple[str, str]] = []
        #: Norms whose module asserts the rank of its input, by the first operation of the norm.
        self.rank_checks: dict[Node, Node] = {}
        self.within = [frame for frame in frames if frame.within(owner)]
        self.inlined = self._inlined()
        self.kept = {value for frame in self.within for value in (*nodes_in(frame.call), *frame.outputs)}
        #: For each line of the body: indentation, text, and the values that it defines and reads.
        self.lines: list[tuple[int, str, tuple[fx.Node, ...], tuple[fx.Node, ...]]] = []

    # What is looked into

    def _inlined(self) -> set[Frame]:
        """Return the calls that the program runs operation by operation."""
        inlined = {self.owner}
        for part in self.parts:
            for node in part.nodes:
                frame: Any = node.frame
                while frame not in inlined:
                    inlined.add(frame)
                    frame = frame.parent
        for frame in self.within:
            # A call whose result is an argument or a constant is no call in the graph.
            if frame.parent in inlined and (frame.changes_arguments or not self._is_callable(frame)):
                inlined.add(frame)
        return inlined

    def _is_callable(self, frame: Frame) -> bool:
        return bool(frame.outputs) and all(node.meta["frame"].within(frame) for node in frame.outputs)

    # Text of values

    def constant(self, value: Any) -> str:
        if value is None or value is ... or type(value) in (bool, int, str):
            return repr(value)
        key = (type(value), repr(value)) if type(value) in (float, complex, bytes) else id(value)
        if key not in self.constants:
            name = re.sub(r"\W", "_", getattr(value, "__name__", None) or type(value).__name__)
            self.constants[key] = f"{name}_{len(self.constants)}"
            self.namespace[self.constants[key]] = value
        return self.constants[key]

    def text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"v{self.numbers.setdefault(self.same.get(value, value), len(self.numbers))}"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self.constant(type(value))}({', '.join(map(self.text, value))})"
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            return f"({''.join(f'{self.text(item)}, ' for item in value)})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.text, value))}]"
        if isinstance(value, dict):
            made = f"{{{', '.join(f'{self.constant(key)}: {self.text(item)}' for key, item in value.items())}}}"
            return f"{self.constant(OrderedDict)}({made})" if isinstance(value, OrderedDict) else made
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        return self.constant(value)

    def arguments(self, positional: Iterable[Any], keywords: dict[str, Any]) -> str:
        return ", ".join([*map(self.text, positional), *(f"{name}={self.text(v)}" for name, v in keywords.items())])

    # Guards

    def guard(self, failure: str, description: str) -> None:
        self.guards.append((f"if {failure}", description))

    def relative(self, path: str) -> str:
        return _relative(path, self.owner.path)

    def module(self, path: str, runs: bool = False) -> str:
        """Return the variable of a module, which the first lines read from its parent.

        Args:
            path: path from the root of the recording.
            runs: whether the program computes what the module's forward would, so that no hook may be missed.
        """
        if path not in self.modules:
            prefix = f"{self.owner.path}." if self.owner.path else ""
            if not path.startswith(prefix):
                raise Unemittable(f"it uses the module {path or '(root)'} from outside")
            parent, _, name = path.rpartition(".")
            holder, where = self.module(parent), self.relative(path)
            variable = self.modules[path] = "m_" + re.sub(r"\W", "_", where)
            if list(self.modules.values()).count(variable) > 1:
                variable = self.modules[path] = f"m{len(self.modules)}"
            self.guards.append((f"{variable} = {holder}._modules.get({name!r})", f"{where} is missing"))
            kind: Any = stock_class(type(self.owner.module.get_submodule(where)))
            failure = f"{variable}.__class__ is not {self.constant(kind)}"
            if not is_layer(self.owner.module.get_submodule(where)) and (fused := fused_class(kind)) is not None:
                failure += f" and {variable}.__class__ is not {self.constant(fused)}"
            self.guard(failure, f"{where} has another class")
        variable = self.modules[path]
        if runs and path != self.owner.path and path not in self.running:
            self.running.add(path)
            self.guard(
                f"not has_no_hooks({variable}.__dict__)", f"{self.relative(path)} has a hook, or a forward of its own"
            )
        return variable

    def guard_read(self, read: Read) -> None:
        kind, owner, name, value = read
        if isinstance(owner, str):
            module = self.module(owner)
            where = ".".join(filter(None, (self.relative(owner), name)))
            if kind == "attribute":
                failure = self._differs(f"{module}.__dict__.get({name!r}, ...)", value)
            elif kind in ("field", "kind"):
                first, *names = name.split(".")
                actual = f"{module}.__dict__.get({first!r})"
                for attribute in names:
                    actual = f"getattr({actual}, {attribute!r}, ...)"
                failure = self._differs(actual if kind == "field" else f"{actual}.__class__", value)
            elif value is True:
                failure = f"{module}.{kind}.get({name!r}) is None"
            elif kind == "children":
                failure = f"list({module}._modules) != {list(value)!r}"  # Dynamo does not guard [*modules]
            else:
                failure = {"absent": f"{name!r} in {module}.__dict__", "missing": f"hasattr({module}, {name!r})"}.get(
                    kind, f"{module}.{kind}.get({name!r}, ...) is not None"
                )
            self.guard(failure, f"{where or 'the module'} has changed")
            return
        holder = self.constant(owner)
        texts = {"cell": f"{holder}.cell_contents", "global": f"{holder}.get({name!r})", "class": f"{holder}.{name}"}
        differs = self._differs(texts[kind], value)
        # Dynamo cannot compile a cell's contents and the function that closes over it.
        self.guard(f"not is_compiling() and ({differs})" if kind == "cell" else differs, f"{name} has changed")

    def _differs(self, actual: str, value: Any) -> str:
        if type(value) in (int, float, str):
            return f"type(value := {actual}) is not {type(value).__name__} or value != {self.constant(value)}"
        if isinstance(value, (list, dict, set, tuple)):
            return f"not is_equal({actual}, {self.constant(_copy(value))})"
        return f"{actual} is not {self.constant(value)}"

    def guard_condition(self, expression: Any, value: Any) -> None:
        code = self._size_text(expression)
        if code is not None:
            self.argument_guards.append((f"if {code} != {self.constant(value)}", ""))

    def _size_text(self, expression: Any) -> str | None:
        """Return an expression of the arguments' sizes; None if it is implied by their rank and being non-empty."""
        if isinstance(expression, Size):
            if expression.tensor in self.owner.inputs:
                return f"{self.text(expression.tensor)}.{expression.name}"
            if expression.name in ("ndim", "numel()") and self._has_rank_of_inputs(self.nodes[expression.tensor]):
                return None
            raise Unemittable("it depends on the size of an intermediate tensor")
        if type(expression) is tuple and expression and callable(expression[0]):
            operands = [self._size_text(operand) for operand in expression[1:]]
            return None if None in operands else f"{self.constant(expression[0])}({', '.join(map(str, operands))})"
        return self.text(expression)

    def _norm_of(self, frame: Frame) -> Node | None:
        """Return the only norm that a call of a batch norm of rank 4 computes by operations, or None."""
        norms = [node for node in self.graph.nodes if node.frame is frame and node.op is Op.NORM]
        is_own = frame is not self.owner and len(norms) == 1 and norms[0].layer is frame.module
        return norms[0] if is_own and isinstance(frame.module, nn.BatchNorm2d) else None

    def _is_rank(self, expression: Any, norm: Node) -> bool:
        """Return whether an expression depends on nothing but the rank of a norm's input, which is no argument."""

        def is_rank(size: Size) -> bool:
            node = self.nodes[size.tensor]
            while node.op is Op.IDENTITY:
                node = node.operands[0]
            return size.name == "ndim" and node is source(norm) and node.source not in self.owner.inputs

        return all(map(is_rank, sizes_in(expression)))

    def _has_rank_of_inputs(self, node: Node) -> bool:
        """Return whether a result has the assumed rank, and elements, if all arguments have."""
        while node.source not in self.owner.inputs:
            if node.op in (Op.OTHER, Op.GLOBAL_POOL, Op.FLATTEN, Op.LINEAR):
                return False
            node = node.operands[0]
        return True

    # Lines

    def emit(self, indent: int, text: str, defined: Iterable[fx.Node] = (), read: Iterable[fx.Node] = ()) -> None:
        self.lines.append((indent, text, tuple(defined), tuple([self.same.get(value, value) for value in read])))

    def emit_node(self, node: Node, indent: int) -> None:
        if node in self.rank_checks:
            self._emit_rank_check(self.rank_checks[node], indent)
        value = node.source
        target: Any = value.target
        arguments, options = value.args, value.kwargs
        if value.op == "get_attr":
            path, _, name = target.rpartition(".")
            code = f"{self.module(path)}.{name}"
        elif value.op == "call_module":
            code = f"{self.module(target)}({self.arguments(arguments, options)})"
        elif value.op == "call_method":
            code = f"{self.text(arguments[0])}.{target}({self.arguments(arguments[1:], options)})"
        elif target is getattr:
            code = f"{self.text(arguments[0])}.{arguments[1]}"
        else:
            code = f"{self.constant(target)}({self.arguments(arguments, options)})"
        self.emit(indent, f"{self.text(value)} = {code}", (value,), value.all_input_nodes)

    def _emit_rank_check(self, norm: Node, indent: int) -> None:
        """Raise the error of a norm's own forward for an input of another rank; fused operators refuse such inputs."""
        value, frame = source(norm).source, norm.frame
        call = f"{self.module(frame.path)}({self.arguments(*frame.call)})"
        failure = f"{self.text(value)}.ndim != {evaluate(Size(value, 'ndim'))}"
        self.emit(indent, f"if {failure}: reject({call})", (), (value, *nodes_in(frame.call)))

    def emit_call(self, frame: Frame, indent: int) -> None:
        """Call a child module and assign its result to the values that stand for it."""
        read = nodes_in(frame.call)
        positional, keywords = frame.call
        call = f"{self.module(frame.path)}({self.arguments(positional, keywords)})"
        if isinstance(frame.result, fx.Node):
            self.emit(indent, f"{self.text(frame.result)} = {call}", (frame.result,), read)
            return
        result = f"r{self.modules[frame.path][1:]}"  # m_child: r_child
        self.emit(indent, f"{result} = {call}", (), read)
        for code, node in _leaves(result, frame.result):
            self.emit(indent, f"{self.text(node)} = {code}", (node,))

    # Segments

    def values(self, segment: Segment) -> tuple[fx.Node, ...]:
        """Return the values that hold a segment's result: more than one if its last operations are in place."""
        last, sources = segment.last, {node.source for node in segment.nodes}
        held = [value for value in sources - {last.source} if last in self.graph.producers[value]]
        return (last.source, *[value for value in held if value in self.kept or not value.users.keys() <= sources])

    def emit_group(self, group: _Group, indent: int) -> None:
        """Run consecutive segments with packed weights, or one by one."""
        segments, head = group
        first, last = segments[0], segments[-1]
        if not self.packed or first.units[0].conv is None:
            for segment in segments:
                self.emit_segment(segment, indent)
            return
        blocks = "".join(f"({self.chain(block)}), " for segment in segments for block in segment.blocks())
        if head is not None:
            linear = "None" if head.linear is None else self.module(head.linear.path)
            call = f"packed.run({self.text(first.values[0])}, ({blocks}Head({linear})), None, settings.backend)"
            self.emit_attempt(call, (head.last.source,), first.values[:1], indent)
            self.emit_group(_Group(segments), indent + 1)
            for node in head.nodes:
                self.emit_node(node, indent + 1)
            return
        call = f"packed.run({self.text(first.values[0])}, ({blocks}), {self.residual(last)}, settings.backend)"
        if last.residual is not None:  # the sum has the memory format of its first operand
            call += f" if has_same_layout({self.text(first.values[0])}, {self.residual(last)}) else None"
        values = self.values(last)
        self.emit_attempt(call, values, (first.values[0], *last.values[1:]), indent)
        for segment in segments:
            self.emit_segment(segment, indent + 1)
        self.emit_names(values, indent)

    def emit_segment(self, segment: Segment, indent: int) -> None:
        """Run a segment with fused operators that compute gradients."""
        for part in segment.parts():
            conv = segment.units[-1].conv
            if part.units[0].conv is None and conv is not None:
                self.emit_node(conv, indent)
            self.emit_part(part, indent)
        last = segment.units[-1]
        for node in (last.conv, segment.add, last.activation) if last.norm is None else ():
            if node is not None:
                self.emit_node(node, indent)

    def emit_part(self, part: Segment, indent: int) -> None:
        """Run one operator; where that does not support the input, each norm of a chain alone, the rest unchanged."""
        unit, values, inner = part.units[0], self.values(part), indent
        passes: dict[Node, Segment] = {}
        if not part.has_clamp:
            input, norm = self.text(part.values[0]), self.module(unit.norm.path)
            if unit.conv is None:
                activation, *slope = map(repr, unit.settings)
                rest = ", ".join([self.residual(part), activation, "settings.backend", *slope, "calls=calls"])
                call = f"run_fused_norm({input}, {norm}, {rest})"
            else:
                call = f"run_fused({input}, {self.chain(part)}, *settings[:3], calls)"
            self.emit_attempt(call, values, part.values, indent)
            inner = indent + 1
            passes = {norm_pass.last: norm_pass for norm_pass in part.norm_passes()}
        covered = {node for norm_pass in passes.values() for node in norm_pass.nodes}
        for node in part.nodes:
            if node in passes:
                self.emit_part(passes[node], inner)
            elif node not in covered and node.op is not Op.IDENTITY:
                self.emit_node(node, inner)
        if inner > indent:
            self.emit_names(values, indent)

    def emit_attempt(self, call: str, values: Sequence[fx.Node], read: Sequence[fx.Node], indent: int) -> None:
        self.emit(indent, f"{self.text(values[0])} = {call}", values, read)
        self.emit(indent, f"if {self.text(values[0])} is None:", (), values[:1])

    def emit_names(self, values: Sequence[fx.Node], indent: int) -> None:
        for value in values[1:]:
            self.emit(indent, f"{self.text(value)} = {self.text(values[0])}", (value,), (values[0],))

    def chain(self, segment: Segment) -> str:
        """Return the first arguments of :func:`fused_res.nn.chain.run_fused` after the input."""
        units = "".join(f"{self.unit(unit)}, " for unit in segment.units)
        shortcut = repr(segment.shortcut) if isinstance(segment.shortcut, str) else self.unit(segment.shortcut)
        return f"({units}), {shortcut}, {'None' if segment.pool is None else self.module(segment.pool.path)}"

    def unit(self, unit: Unit) -> str:
        assert unit.conv is not None
        # With the defaults, because packed programs look up their blocks by equality.
        settings = ", ".join(map(repr, chain.Unit(None, None, *unit.settings)[2:]))
        norm = "None" if unit.norm is None else self.module(unit.norm.path)
        return f"({self.module(unit.conv.path)}, {norm}, {settings})"

    def residual(self, segment: Segment) -> str:
        return "None" if segment.residual is None else self.text(segment.values[1])

    def _groups(self, heads: Sequence[Head]) -> dict[Node, _Group]:
        """Return what one packed program runs, by the last node of each group."""
        groups: dict[Node, _Group] = {}
        for segment in self.segments:
            previous = groups.get(segment.input)
            is_chain = segment.units[0].conv is not None and segment.residual is not segment.input
            if self.packed and previous is not None and is_chain and self._continues(previous, segment):
                del groups[segment.input]
                groups[segment.last] = _Group((*previous.segments, segment))
            else:
                groups[segment.last] = _Group((segment,))
        for head in heads:
            previous = groups.get(head.input)
            if self.packed and previous is not None and self._continues(previous, head):
                del groups[head.input]
                groups[head.last] = _Group(previous.segments, head)
        return groups

    def _continues(self, previous: _Group, part: Segment | Head) -> bool:
        """Return whether only `part` reads the result of the `previous` ones, and one packed program may run all."""
        first, last = previous.segments[0], previous.segments[-1]
        return (
            last.units[0].conv is not None
            and last.residual is None
            and not part.input.returned
            and all(user in part.nodes for user in part.input.users)
            and not self.graph.is_written_between(first.nodes[0], part.last, first.inputs, part.nodes)
        )

    # The whole

    def generate(self) -> Program:
        header = self._header()
        self._emit_guards()
        covered = {node for part in self.parts for node in part.nodes}
        called: set[Frame] = set()
        for node in self.graph.nodes:
            if not node.frame.within(self.owner) or node.source in self.owner.inputs:
                continue
            frame = node.frame
            while frame not in self.inlined and frame.parent not in self.inlined:
                frame = frame.parent
            if frame not in self.inlined:
                if frame not in called:
                    called.add(frame)
                    self.emit_call(frame, 1)
            elif node in self.groups:
                self.emit_group(self.groups[node], 1)
            elif node not in covered:
                self.emit_node(node, 1)
        self.emit(1, f"return {self.text(self.owner.result)}", (), self.owner.outputs)
        body = self._free_and_check()
        first = [
            f"    {code}: return NotImplemented" if code.startswith("if ") else f"    {code}"
            for code, _ in (*self.argument_guards, *self.guards)
        ]
        text = "\n".join([header, *first, *body]) + "\n"
        program = Program(text, self.namespace, self.guards, self.segments, self.heads, self.owner.path)
        return _programs.setdefault(program.key, program)

    def _header(self) -> str:
        """Return the signature, and guard the arguments: tensors where the recording had tensors, equal constants."""
        if self.owner.changes_arguments:
            raise Unemittable("it changes a list or dict among its arguments")
        forward = stock_forward(self.owner.module)
        parameters = []
        keyword_only = False
        for parameter in list(inspect.signature(forward, follow_wrapped=False).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if self.owner.arguments.get(parameter.name):  # an unpickled module is recorded without any
                    raise Unemittable("it is called with a variable number of arguments")
                stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
                parameters.append(stars + parameter.name)
                keyword_only = True
                continue
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                parameters.append("*")
                keyword_only = True
            default = "" if parameter.default is parameter.empty else f"={self.constant(parameter.default)}"
            parameters.append(parameter.name + default)
        seen: dict[fx.Node, str] = {}
        for name, value in self.owner.arguments.items():
            self._guard_argument(name, value, seen)
        return f"def forward({', '.join(['self', *parameters])}):"

    def _guard_argument(self, code: str, value: Any, seen: dict[fx.Node, str]) -> None:
        arguments = self.argument_guards
        if isinstance(value, fx.Node):
            if value in seen:
                arguments.append((f"if {code} is not {seen[value]}", ""))
            else:
                seen[value] = code
                arguments.append((f"if type({code}) is not Tensor and type({code}) is not Parameter", ""))
                arguments.append((f"{self.text(value)} = {code}", ""))
        elif not nodes_in(value):
            arguments.append((f"if {self._differs(code, value)}", ""))
        elif type(value) in (tuple, list):
            kind = self.constant(type(value))
            arguments.append((f"if type({code}) is not {kind} or len({code}) != {len(value)}", ""))
            for index, item in enumerate(value):
                self._guard_argument(f"{code}[{index}]", item, seen)
        else:
            raise Unemittable("an argument of its forward is nested")

    def _emit_guards(self) -> None:
        """Guard all that the inlined calls depended on, and the layers of the segments and heads."""
        layers: dict[str, Node] = {}
        for part in self.parts:
            for node in part.nodes:
                if node.path or node.layer is not None:
                    layers.setdefault(node.path, node)
        frames = [frame for frame in self.within if frame in self.inlined]
        for frame in frames:
            self.module(frame.path, runs=True)
        if isinstance(self.owner.module, fx.GraphModule):  # the class, whose forward a guard reads, is of one instance
            stock = stock_class(type(self.owner.module))
            self.guard(f"self.__class__ not in {self.text((stock, fused_class(stock)))}", "the module is a copy")
        for path, node in layers.items():
            self.module(path, runs=True)
            kind: Any = type(node.layer)
            if node.op in (Op.IDENTITY, Op.ACTIVATION) or not kind.__module__.startswith("torch.nn."):
                self.guard_read(Read("class", kind, "forward", kind.forward))
            if node.op is Op.DROPOUT:
                self.guard_read(Read("attribute", path, "training", False))
            for name in _SETTINGS.get(node.op, ()):
                if name in node.layer.__dict__:
                    self.guard_read(Read("attribute", path, name, node.layer.__dict__[name]))
        reads: dict[Any, Read] = {}
        conditions = []
        for frame in frames:
            reads |= frame.reads
            conditions += frame.conditions
            norm = self._norm_of(frame)
            for expression, value in frame.assertions:
                if norm is not None and self._is_rank(expression, norm):
                    self.rank_checks[min((norm, *norm.parts), key=lambda node: node.index)] = norm
                else:
                    conditions.append((expression, value))
        for read in reads.values():
            if (read.kind, read.name) != ("absent", "forward"):  # has_no_hooks
                self.guard_read(read)
        if any(self._size_text(expression) is None for expression, _ in conditions):
            for value in self.owner.inputs:
                name, rank = self.text(value), assumed_rank(value.graph)
                self.argument_guards.append((f"if {name}.ndim != {rank} or {name}.numel() == 0", ""))
        for expression, value in conditions:
            self.guard_condition(expression, value)
        # The body uses modules that no guard has named yet.
        for node in self.graph.nodes:
            if node.frame in self.inlined and node.source.op in ("call_module", "get_attr"):
                path = str(node.source.target)
                self.module(path if node.source.op == "call_module" else path.rpartition(".")[0])
        for frame in self.within:
            if frame.parent in self.inlined and frame not in self.inlined:
                self.module(frame.path)
        self.guards.append(("settings = self._fused_res.settings", ""))
        self.guards.append(("calls = self._fused_res.calls", ""))
        if self.packed:
            self.guards.append(("packed = self._fused_res.packed", ""))

    def _free_and_check(self) -> list[str]:
        """Return the body's lines; a value is released after the last line that reads it, as in the stock forward."""
        last: dict[fx.Node, int] = {}
        depth = dict.fromkeys(self.owner.inputs, 1)  # smallest indentation of a definition
        for number, (indent, _, defines, reads) in enumerate(self.lines):
            for value in reads:
                if value not in depth:
                    raise Unemittable("a value is used outside of the module that computes it")
                last[value] = number
            for value in defines:
                depth[value] = min(indent, depth.get(value, indent))
                last.setdefault(value, number)
        dead: dict[int, list[fx.Node]] = {}
        for value, number in last.items():
            dead.setdefault(number, []).append(value)
        body: list[str] = []
        pending: dict[int, list[str]] = {}
        for number, (indent, text, _, _) in enumerate(self.lines):
            for level in sorted(pending, reverse=True):
                if level >= indent and pending[level]:
                    body.append("    " * level + " = ".join(pending.pop(level)) + " = None")
            body.append("    " * indent + text)
            for value in dead.get(number, ()):
                for level in {indent, depth[value]}:
                    pending.setdefault(level, []).append(self.text(value))
        return body


def _relative(path: str, prefix: str) -> str:
    """Return a module's path relative to the module `prefix`, of which it is a part or which it is."""
    return "" if path == prefix else path.removeprefix(f"{prefix}." if prefix else "")


def is_equal(actual: Any, expected: Any) -> bool:
    """Return whether two values have the same types and are equal; tensors and arrays never are."""
    if actual is expected:
        return True
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, dict):
        return [*actual] == [*expected] and all(is_equal(actual[key], value) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(is_equal, actual, expected))
    return type(expected) in (int, float, str, set) and bool(actual == expected)


def _copy(value: Any) -> Any:
    """Return a copy of nested containers that later changes do not reach."""
    if type(value) is dict or type(value) is OrderedDict:
        return type(value)((key, _copy(item)) for key, item in value.items())
    if type(value) is set:
        return set(value)
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value


def _reject(output: Any) -> None:
    """Raise RuntimeError: the call that returned `output` should have raised an exception."""
    raise RuntimeError("the input of a batch norm has another rank than its forward was recorded for")


def _leaves(code: str, value: Any) -> Iterator[tuple[str, fx.Node]]:
    """Yield the expression of every node in the result of a call."""
    if isinstance(value, fx.Node):
        yield code, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{code}[{key!r}]", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _leaves(f"{code}[{index}]", item)
