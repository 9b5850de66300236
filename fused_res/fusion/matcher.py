"""The matcher: find every maximal chain of the graph that a fused operator computes.

A :class:`Segment` is a chain of conv-BN-act units with an optional shortcut and pooling, or one norm with an optional
addition and activation. A :class:`Head` is global pooling and a linear layer, which packed inference runs with the
segment before it. The matcher sees only :class:`fused_res.graph.ir.Node`: an intermediate result may be inside a
segment if nothing else reads it, and a segment runs where its last node is, so no operation in between may write to
its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from fused_res.graph.ir import Graph, Node, Op
from fused_res.nn import chain


class Unit(NamedTuple):
    """Nodes of one conv-BN-act unit; ``conv`` is None if the norm's input is any tensor.

    ``norm`` is None in the last unit of a pre-activation block, a convolution whose output is added.
    """

    conv: Node | None
    norm: Any
    activation: Node | None = None

    def layers(self) -> chain.Unit:
        """Return the modules."""
        return chain.Unit(None if self.conv is None else self.conv.layer, self.norm.layer, *self.settings)

    @property
    def settings(self) -> tuple[Any, ...]:
        """The activation's name, and its negative slope if it has one."""
        if self.activation is None:
            return ("identity",)
        name = self.activation.activation
        return (name, self.activation.negative_slope) if name == "leaky_relu" else (name,)

    @property
    def input(self) -> Node:
        return source(self.norm if self.conv is None else self.conv)

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple([node for node in self if node is not None])


@dataclass(frozen=True)
class Segment:
    """A chain that one fused operator computes, or two: with a ``"tensor"`` shortcut, the last norm is one by itself.

    A last unit without a norm runs fused in packed inference only.

    Args:
        units: units of the main path, in order. The last one's activation follows the addition.
        shortcut: "none", "identity", "tensor" or the projection.
        add: the addition, or None.
        residual: the other operand of the addition for a "tensor" shortcut, otherwise None.
        pool: max pooling, or None.
    """

    units: tuple[Unit, ...]
    shortcut: Literal["none", "identity", "tensor"] | Unit = "none"
    add: Node | None = None
    residual: Node | None = None
    pool: Node | None = None
    nodes: tuple[Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        projection = self.shortcut.nodes if isinstance(self.shortcut, Unit) else ()
        nodes = [node for unit in self.units for node in unit.nodes] + [*projection, self.add, self.pool]
        inside = {part for node in nodes if node is not None for part in (node, *node.parts)}
        for node in tuple(inside):
            for operand in node.operands:
                if _is_inside(operand, inside):  # operations in between that return their operand
                    while operand.op is Op.IDENTITY:
                        inside.add(operand)
                        operand = operand.operands[0]
        object.__setattr__(self, "nodes", tuple(sorted(inside, key=lambda node: node.index)))

    @property
    def input(self) -> Node:
        return self.units[0].input

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.input,) if self.residual is None else (self.input, self.residual)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of :attr:`inputs` as the recorded code names them."""
        unit, add = self.units[0], self.add
        first = (unit.norm if unit.conv is None else unit.conv).values[0]
        if self.residual is None or add is None:
            return (first,)
        return first, add.values[0 if source(add, 0) is self.residual else 1]

    @property
    def last(self) -> Node:
        return self.nodes[-1]

    @property
    def frame(self) -> Any:
        return common_frame(node.frame for node in self.nodes)

    @property
    def has_clamp(self) -> bool:
        return any(node.op is Op.CLAMP for node in self.nodes)

    def parts(self) -> tuple[Segment, ...]:
        """Return the segments that fused operators with gradients compute: no chain adds an arbitrary tensor."""
        if self.shortcut != "tensor":
            return (self,)
        *first, last = self.units
        if last.norm is None:
            return (Segment(tuple(first)),)
        norm = Segment((Unit(None, last.norm, last.activation),), "tensor", self.add, self.residual)
        return (Segment(tuple(first)), norm) if first else (norm,)

    def norm_passes(self) -> tuple[Segment, ...]:
        """Return the norms of a chain, each with the addition and activation after it."""
        if self.units[0].conv is None:
            return ()
        *others, last = [unit._replace(conv=None) for unit in self.units]
        if isinstance(self.shortcut, Unit):
            others.append(self.shortcut._replace(conv=None))
        passes = [Segment((unit,)) for unit in others]
        if self.add is None:
            return (*passes, Segment((last,)))
        operands = source(self.add, 0), source(self.add, 1)
        return *passes, Segment((last,), "tensor", self.add, operands[operands[0] is last.norm])

    def blocks(self) -> tuple[Segment, ...]:
        """Return the segments that packed inference computes: only a block of one unit adds an arbitrary tensor."""
        if self.shortcut != "tensor" or len(self.units) == 1:
            return (self,)
        last = Segment(self.units[-1:], "tensor", self.add, self.residual)
        return Segment(self.units[:-1]), last

    def layers(self) -> tuple[list[chain.Unit], chain.Shortcut, Any]:
        """Return the modules, as the arguments of :func:`fused_res.nn.chain.match_chain`."""
        shortcut = self.shortcut.layers() if isinstance(self.shortcut, Unit) else self.shortcut
        pool = None if self.pool is None else self.pool.layer
        return [unit.layers() for unit in self.units], shortcut, pool  # type: ignore[return-value]


class Head(NamedTuple):
    """Global average pooling whose result is flattened to ``(N, C)``, and an optional linear layer.

    Args:
        nodes: all operations, in order, with eval-mode dropouts and reads of sizes between them.
        linear: the linear layer, or None.
    """

    nodes: tuple[Node, ...]
    linear: Node | None

    @property
    def input(self) -> Node:
        return source(self.nodes[0])

    @property
    def last(self) -> Node:
        return self.nodes[-1]


def source(node: Node, operand: int = 0) -> Node:
    """Return the producer of an operand, past operations that return their operand."""
    found = node.operands[operand]
    while found.op is Op.IDENTITY:
        found = found.operands[0]
    return found


def readers(node: Node) -> Iterator[Node]:
    """Yield the nodes that read a result, past operations that return their operand."""
    for user in node.users:
        if user.op is Op.IDENTITY:
            yield from readers(user)
        else:
            yield user


def only_reader(node: Node, *ops: Op) -> Node | None:
    """Return the single operation that reads a result if it is one of `ops`, otherwise None."""
    found = list(readers(node))
    if len(found) != 1 or escapes(node) or found[0].op not in ops:
        return None
    return found[0]


def escapes(node: Node) -> bool:
    return node.returned or any(user.op is Op.IDENTITY and escapes(user) for user in node.users)


def common_frame(frames: Iterable[Any]) -> Any:
    """Return the innermost module call that contains all of `frames`."""
    common: Any = None
    for frame in frames:
        if common is None:
            common = frame
        while not frame.within(common):
            common = common.parent
    return common


def _is_inside(node: Node, inside: set[Node]) -> bool:
    while node.op is Op.IDENTITY:
        node = node.operands[0]
    return node in inside


def find_segments(graph: Graph, inference: bool = False) -> list[Segment]:
    """Return all segments, in the order of their last nodes.

    Args:
        graph: the graph of one forward.
        inference: whether no gradient is computed; ``clamp(min=0)`` is then a ReLU.
    """
    activation_ops = (Op.RELU, Op.ACTIVATION, Op.CLAMP) if inference else (Op.RELU, Op.ACTIVATION)
    matcher = _Matcher(graph, activation_ops, inference)
    for node in graph.nodes:
        if node.op is Op.ADD:
            matcher.match_addition(node)
    for node in graph.nodes:
        if node.op is Op.NORM and node not in matcher.taken:
            matcher.match_norm(node)
    return sorted(_in_order(graph, matcher.segments), key=lambda segment: segment.last.index)


def find_heads(graph: Graph) -> list[Head]:
    """Return all heads, in order; they are for inference only."""
    heads = [_match_head(node) for node in graph.nodes if node.op is Op.GLOBAL_POOL]
    return [head for head in heads if head is not None]


def _match_head(pool: Node) -> Head | None:
    """Return the head of a global pooling, or None."""
    nodes, is_flat = [pool], not pool.keeps_dims
    while (before := nodes[0].operands[0]).op is Op.IDENTITY and _only_step(before) == (nodes[0],):
        nodes.insert(0, before)
    head = Head(tuple(nodes), None) if is_flat else None
    while (step := _only_step(nodes[-1])) is not None:
        nodes += step
        op = nodes[-1].op
        if op is Op.LINEAR:
            return Head(tuple(nodes), nodes[-1]) if is_flat else head
        if op is Op.FLATTEN:
            is_flat, head = True, Head(tuple(nodes), None)
        elif op not in (Op.IDENTITY, Op.DROPOUT):
            break
    return head


def _only_step(node: Node) -> tuple[Node, ...] | None:
    """Return the only operation that reads a result, after reads of the result's sizes for that operation."""
    if node.returned or not node.users:
        return None
    *reads, user = node.users
    sizes: list[Node] = []
    while reads:
        read = reads.pop()
        if read.returned or read.source.target not in _SIZE_READS or read.source.op == "call_module":
            return None
        sizes.append(read)
        reads += [other for other in read.users if other is not user]
    return (*sorted(sizes, key=lambda size: size.index), user)


#: Functions and methods that read a tensor's sizes.
_SIZE_READS = ("size", getattr, operator.getitem)


def _in_order(graph: Graph, segments: list[Segment]) -> list[Segment]:
    """Return the segments without those that would change the order in which a norm's calls update its statistics."""
    runs_at = {node: segment.last.index for segment in segments for node in segment.nodes}
    calls: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.op is Op.NORM:
            calls.setdefault(node.layer, []).append(node)
    moved = set()
    for nodes in calls.values():
        order = [runs_at.get(node, node.index) for node in nodes]
        if any(first >= second for first, second in pairwise(order)):
            moved.update(nodes)
    return [segment for segment in segments if not moved & set(segment.nodes)]


class _Matcher:
    def __init__(self, graph: Graph, activation_ops: tuple[Op, ...], inference: bool) -> None:
        self.graph = graph
        self.activation_ops = activation_ops
        self.inference = inference
        self.segments: list[Segment] = []
        self.taken: set[Node] = set()

    def accept(self, segment: Segment) -> bool:
        if not self.is_legal(segment):
            return False
        self.segments.append(segment)
        self.taken.update(segment.nodes)
        return True

    # Residual blocks, and additions of any tensor to a norm's output

    def match_addition(self, add: Node) -> None:
        found = [segment for operand in (0, 1) for segment in self.residual_segments(add, operand)]
        if self.inference:
            found += [segment for operand in (0, 1) for segment in self.preactivation_segments(add, operand)]

        # A whole block first, then the longest chain.
        def priority(segment: Segment) -> tuple[bool, int, int]:
            last = segment.units[-1]._replace(activation=None)
            return segment.shortcut != "tensor", len(segment.units), last.nodes[-1].index

        found.sort(key=priority, reverse=True)
        any(self.accept(segment) for segment in found)

    def residual_segments(self, add: Node, operand: int) -> Iterator[Segment]:
        norm, other = source(add, operand), source(add, 1 - operand)
        if norm.op is not Op.NORM or norm in self.taken or only_reader(norm, Op.ADD) is not add:
            return
        last = self.unit_of(norm, self.relu_after(add))
        projection = None
        if other.op is Op.NORM and other is not norm and only_reader(other, Op.ADD) is add:
            projection = self.unit_of(other, None)
        units = [last]
        while True:
            start = units[0].input
            if units[0].conv is not None:
                if start is other:
                    yield Segment(tuple(units), "identity", add)
                if projection is not None and projection.conv is not None and start is projection.input:
                    yield Segment(tuple(units), projection, add)
            previous = self.unit_before(units[0], [add, *(node for unit in units for node in unit.nodes)])
            if previous is None:
                break
            units.insert(0, previous)
        yield Segment(tuple(units), "tensor", add, other)
        if len(units) > 1:
            yield Segment((last,), "tensor", add, other)

    def preactivation_segments(self, add: Node, operand: int) -> Iterator[Segment]:
        """Yield a chain whose last convolution is added without a norm, as in pre-activation blocks."""
        conv, other = source(add, operand), source(add, 1 - operand)
        if conv.op is not Op.CONV or conv in self.taken or only_reader(conv, Op.ADD) is not add:
            return
        units = [Unit(conv, None, self.relu_after(add))]
        while (previous := self.unit_before(units[0], [add, *(n for unit in units for n in unit.nodes)])) is not None:
            units.insert(0, previous)
        if len(units) > 1:
            yield Segment(tuple(units), "tensor", add, other)

    def relu_after(self, add: Node) -> Node | None:
        """Return the ReLU that alone reads a sum, or None."""
        activation = only_reader(add, *self.activation_ops)
        return activation if activation is not None and activation.activation == "relu" else None

    def unit_of(self, norm: Node, activation: Node | None) -> Unit:
        conv = source(norm)
        if conv.op is not Op.CONV or conv in self.taken or only_reader(conv, Op.NORM) is not norm:
            is_clamp = activation is not None and activation.op is Op.CLAMP  # packed convolutions have no gradient
            return Unit(None, norm, None if is_clamp else activation)
        return Unit(conv, norm, activation)

    def unit_before(self, unit: Unit, nodes: list[Node]) -> Unit | None:
        """Return the unit whose output only `unit` reads, if it joins the chain of `nodes`."""
        if unit.conv is None:
            return None
        activation = None
        norm = unit.input
        if norm.op in self.activation_ops:
            activation, norm = norm, source(norm)
            if norm.op is not Op.NORM or only_reader(norm, activation.op) is not activation:
                return None
        if norm.op is not Op.NORM or norm in self.taken or only_reader(activation or norm, Op.CONV) is not unit.conv:
            return None
        found = self.unit_of(norm, activation)
        return found if found.conv is not None and _joins(nodes, found.nodes) else None

    # Chains without addition

    def match_norm(self, norm: Node) -> None:
        units = [self.unit_of(norm, only_reader(norm, *self.activation_ops))]
        if units[0].conv is not None:
            while (following := self.unit_after(units)) is not None:
                units.append(following)
            last = units[-1].activation or units[-1].norm
            pool = only_reader(last, Op.MAX_POOL) if units[-1].settings[0] in ("identity", "relu") else None
            chained = Segment(tuple(units))
            if pool is not None and _joins(chained.nodes, [pool]) and self.accept(replace(chained, pool=pool)):
                return
            if self.accept(chained):
                return
        for unit in units:
            candidates = (unit, unit._replace(conv=None), Unit(None, unit.norm))
            any(self.accept(Segment((candidate,))) for candidate in candidates)

    def unit_after(self, units: list[Unit]) -> Unit | None:
        conv = only_reader(units[-1].activation or units[-1].norm, Op.CONV)
        norm = None if conv is None else only_reader(conv, Op.NORM)
        if norm is None or norm in self.taken:
            return None
        found = Unit(conv, norm, only_reader(norm, *self.activation_ops))
        return found if _joins([node for unit in units for node in unit.nodes], found.nodes) else None

    # Legality

    def is_legal(self, segment: Segment) -> bool:
        inside = set(segment.nodes)
        if inside & self.taken:
            return False
        for node in segment.nodes:
            # The fused operator does not write to its inputs, which code outside may hold.
            if node.in_place and source(node) not in inside:
                return False
        if self.graph.is_written_between(segment.nodes[0], segment.last, segment.inputs, segment.nodes):
            return False
        return all(_is_supported(part) for part in segment.parts())


def _joins(first: Iterable[Node], second: Iterable[Node]) -> bool:
    """Return whether a module call that contains one of two chains contains the other, too.

    Blocks that follow each other are not joined: one module's forward would have to replace the calls of both.
    """
    frames = [common_frame(node.frame for node in nodes) for nodes in (first, second)]
    return common_frame(frames) in frames


def _is_supported(segment: Segment) -> bool:
    """Return whether the modules' present settings are supported."""
    if segment.units[0].conv is None:
        return not isinstance(chain.read_norm(segment.units[0].norm.layer.__dict__), str)
    return chain.find_unsupported(*segment.layers()) is None
