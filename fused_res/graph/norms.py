"""Batch norms written as operations: ``F.batch_norm`` on a module's tensors, and frozen batch norms as arithmetic.

A module whose forward computes a batch norm itself is recognized by what it computes, not by its class:
:func:`find_norms` compares the recorded operations with the arguments that :func:`fused_res.nn.chain.read_norm` returns
for the module. Whatever differs in any detail is not a norm.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fused_res._torch_compat import BatchNorm
from fused_res.graph.recording import Read
from fused_res.nn import chain


class NormCall(NamedTuple):
    """Recorded operations that compute one batch norm.

    Args:
        input: the value that is normalized.
        layer, path: module with the norm's tensors and settings.
        parts: all other operations that belong to the norm, such as reads of its tensors and the update of its counter.
    """

    input: fx.Node
    layer: nn.Module
    path: str
    parts: tuple[fx.Node, ...]


def find_norms(graph: fx.Graph, module_of: Callable[[str], nn.Module]) -> dict[fx.Node, NormCall]:
    """Return the batch norms that are written as operations, by the operation that returns the norm's output.

    Args:
        graph: a recorded graph, see :func:`fused_res.graph.ir.build_graph`.
        module_of: returns the module at a path.
    """
    reads: dict[str, list[fx.Node]] = {}  # of a module's tensors
    for node in graph.nodes:
        if node.op == "get_attr":
            reads.setdefault(_path_of(node), []).append(node)
    found: dict[fx.Node, NormCall] = {}
    for node in graph.nodes if reads else ():
        if node.op == "call_function" and node.target in (batch_norm, F.batch_norm):
            call = _match_functional(node, module_of, reads)
            if call is not None:
                found[node] = call
    constant = {path for path in reads if chain.is_constant_norm(module_of(path).__dict__)}
    for end, call in _match_arithmetic(graph, module_of, constant) if constant else ():
        found.setdefault(end, call)
    found = {end: call for end, call in found.items() if is_read_at_once(end, call.input, call.parts)}
    # A norm's tensors that anything else reads may be read before their update in the stock forward, and after it here.
    inside = {part for call in found.values() for part in call.parts}
    return {end: call for end, call in found.items() if inside.issuperset(reads[call.path])}


def _path_of(read: fx.Node) -> str:
    return str(read.target).rpartition(".")[0]


def is_read_at_once(end: fx.Node, input: fx.Node, parts: Container[fx.Node]) -> bool:
    """Return whether nothing else, which may write to it, uses `input` from the first of `parts` that does to `end`."""
    if all(user is end or user in parts for user in input.users):
        return True
    started = False
    for node in end.graph.nodes:
        if node is end:
            break
        if input in node.all_input_nodes:
            started = started or node in parts
            if started and node not in parts:
                return False
    return True


# F.batch_norm on the tensors of one module


def batch_norm(*arguments: Any, **options: Any) -> Tensor:
    """Call ``F.batch_norm``, which recorded code refers to by this function.

    Tools that count batch norms replace ``F.batch_norm``. A fused module does not depend on that, as an
    ``nn.BatchNorm2d`` in a chain does not, and an unfused norm calls the present function.
    """
    return F.batch_norm(*arguments, **options)


_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _match_functional(
    node: fx.Node, module_of: Callable[[str], nn.Module], reads: dict[str, list[fx.Node]]
) -> NormCall | None:
    """Return the norm of an ``F.batch_norm`` call with exactly the arguments that ``nn.BatchNorm2d`` would pass."""
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    given: dict[str, Any] = defaults | dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    tensors = [given.get(name) for name in _TENSORS]
    paths = {_path_of(tensor) for tensor in tensors if isinstance(tensor, fx.Node)}
    if len(paths) != 1 or not isinstance(given.get("input"), fx.Node) or given["input"] in tensors:
        return None
    (path,) = paths
    module = module_of(path)
    state = module.__dict__
    parts = [tensor for tensor in tensors if tensor is not None]
    if not chain.is_constant_norm(state):
        if not isinstance(module, BatchNorm):
            return None
        mode = node.meta["frame"].reads.get(("attribute", path, "training"))
        if mode is None:  # the recorded arguments do not depend on the mode, those of nn.BatchNorm2d do
            return None
        if mode.value and isinstance(module, nn.SyncBatchNorm):
            return None
        state = state | {"training": mode.value}
    expected = chain.read_norm(state)
    if isinstance(expected, str):
        return None
    for name, tensor, read in zip(_TENSORS, expected, tensors, strict=False):
        if (read is None) is not (tensor is None) or (read is not None and not _is_read(read, path, name)):
            return None
    _, _, running_mean, _, training, momentum, num_batches = expected
    if given["training"] is not training or not _is_number(given["eps"], state["eps"]):
        return None
    if training and running_mean is not None and not _is_number(given["momentum"], momentum):
        return None
    if num_batches is not None:
        counter = _find_counter(path, reads[path], node)
        if counter is None:
            return None
        parts += counter
    _note_settings(node, path, module, "eps", "momentum")
    return NormCall(given["input"], module, path, tuple(dict.fromkeys(parts)))


def _note_settings(node: fx.Node, path: str, module: nn.Module, *names: str) -> None:
    """Note that a norm depends on settings of its module: the fused norm reads them, the forward may hold constants."""
    reads = node.meta["frame"].reads
    for name in names:
        if name in module.__dict__:
            reads.setdefault(("attribute", path, name), Read("attribute", path, name, module.__dict__[name]))


def _is_read(value: Any, path: str, name: str) -> bool:
    is_read = isinstance(value, fx.Node) and value.op == "get_attr"
    return is_read and value.target == (f"{path}.{name}" if path else name)


def _is_number(value: Any, expected: float) -> bool:
    return type(value) in (int, float) and value == expected


def _find_counter(path: str, reads: Iterable[fx.Node], norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the read of ``num_batches_tracked`` and its ``add_(1)``, if nothing else reads the counter."""
    counters = [read for read in reads if _is_read(read, path, "num_batches_tracked")]
    counters = [read for read in counters if read.meta["frame"] is norm.meta["frame"]]
    if len(counters) != 1 or len(counters[0].users) != 1:
        return None
    (update,) = counters[0].users
    is_increment = update.op == "call_method" and update.target == "add_" and update.args[1:] == (1,)
    is_increment = is_increment and not update.kwargs and type(update.args[1]) is int and not update.users
    return (counters[0], update) if is_increment and update.args[0] is counters[0] else None


# Frozen batch norms: x * scale + shift

#: Operations of a frozen batch norm's arithmetic: analytic functions of their operands, without side effects.
_ARITHMETIC = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.getitem),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.rsqrt, torch.sqrt, torch.neg, torch.reciprocal),
    *(torch.reshape, torch.unsqueeze),
    *("add", "sub", "mul", "div", "pow", "rsqrt", "sqrt", "neg", "reciprocal"),
    *("reshape", "view", "unsqueeze", "to", "type_as", "detach"),
}


def _match_arithmetic(
    graph: fx.Graph, module_of: Callable[[str], nn.Module], paths: Container[str]
) -> Iterator[tuple[fx.Node, NormCall]]:
    """Yield the batch norms that are arithmetic on the tensors of one of the modules at `paths`.

    The spellings of a batch norm are analytic functions of the same variables: they are equal if they agree in random
    points.
    """
    path_of: dict[fx.Node, str] = {}  # of operations that depend on the tensors of one module, which no norm contains
    for node in graph.nodes:
        if node.op == "get_attr" and (path := _path_of(node)) in paths:
            path_of[node] = path
            continue
        near = {path_of[operand] for operand in node.all_input_nodes if operand in path_of}
        if len(near) != 1 or not _is_arithmetic(node):
            continue
        (path,) = near
        parts, inputs = _operands(node, path_of, path)
        if len(inputs) == 1 and all(user in parts for part in parts if part is not node for user in part.users):
            (input,) = inputs
            module = module_of(path)
            if _is_batch_norm(module, parts, input):
                _note_settings(node, path, module, "eps")
                yield node, NormCall(input, module, path, tuple([part for part in parts if part is not node]))
                continue
        path_of[node] = path


def _is_arithmetic(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ARITHMETIC


def _operands(end: fx.Node, path_of: Mapping[fx.Node, str], path: str) -> tuple[list[fx.Node], set[fx.Node]]:
    """Return the operations that a result depends on, in the order of execution, and the values that they read."""
    parts, inputs, dtypes, pending = {end}, set(), set(), [end]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if path_of.get(operand) == path:
                if operand not in parts:
                    parts.add(operand)
                    pending.append(operand)
            elif operand.target is getattr and operand.args[1] == "dtype":
                dtypes.add(operand)
            else:
                inputs.add(operand)
    for read in dtypes:
        if read.args[0] in inputs:
            parts.add(read)
        else:
            inputs.add(read)
    return [node for node in end.graph.nodes if node in parts], inputs


@torch.no_grad()
def _is_batch_norm(module: nn.Module, parts: Sequence[fx.Node], input: fx.Node) -> bool:
    """Return whether the last of `parts` is the batch norm of `input` with a module's fixed statistics."""
    expected = chain.read_norm(module.__dict__)
    if isinstance(expected, str):
        return False
    _, _, mean, var, *_ = expected
    assert mean is not None and var is not None
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)

    tensors = {name: draw(len(mean)) for name, tensor in zip(_TENSORS, expected, strict=False) if tensor is not None}
    tensors["running_var"] = 10 ** (4 * tensors["running_var"].tanh() - 4)  # 1e-8 to 1: eps matters
    values: dict[fx.Node, Any] = {input: draw(2, len(mean), 2, 3)}
    try:
        for node in parts:
            target: Any = node.target
            if node.op == "get_attr":
                values[node] = tensors[target.rpartition(".")[2]]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = (
                getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
            )
        weight, bias, mean, var = [tensors.get(name) for name in _TENSORS]
        stock = F.batch_norm(values[input], mean, var, weight, bias, eps=module.__dict__["eps"])
        actual = values[parts[-1]]
        return actual.dtype is stock.dtype and actual.shape == stock.shape and torch.allclose(actual, stock, 1e-9, 1e-9)
    except Exception:  # the operations do not accept these tensors
        return False
