"""``torch.fx.GraphModule``: the functions that its forward may be.

Every graph module has a class of its own, whose ``forward`` is code generated from the graph. ``recompile`` and an
assignment to ``graph`` replace that function, and so does a switch of the training mode of torchvision's feature
extractors, which hold one graph for each mode. A recording is of one function, and the generated forward verifies its
identity. New functions that are equal to a recorded one are therefore replaced by the recorded one.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

_KNOWN = "_fused_res_forwards"  # attribute of a graph module's class


def opaque_graph_reason(kind: type[fx.GraphModule]) -> str | None:
    """Return why the forward of a graph module of class `kind` is not to be recorded, or None."""
    call: Any = kind.__call__
    wrapped: Any = getattr(kind, "_wrapped_call", None)
    is_generated = call.__module__ == fx.graph_module.__name__ and call.__qualname__.startswith(
        "GraphModule.recompile."
    )
    defining = next(base for base in kind.__mro__[1:] if "__call__" in vars(base))  # what the generated one calls
    if not is_generated or wrapped is None or wrapped.cls_call is not None or defining is not nn.Module:
        return "is a torch.fx graph that overrides __call__"
    if kind.recompile is not fx.GraphModule.recompile:
        return "is a torch.fx graph that is compiled in another way"
    return None


def forward_in(kind: type[fx.GraphModule], module: fx.GraphModule, training: bool) -> tuple[Any, bool]:
    """Return the function that is the forward of a graph module in a training mode, and whether it depends on the mode.

    Args:
        kind: class of the module, not a generated one.
        module: the graph module.
        training: the training mode.
    """
    current = known_forward(kind, kind.forward)
    if current is not kind.forward:
        kind.forward = current
    graphs = [module.__dict__.get(name) for name in ("eval_graph", "train_graph")]
    if not all(isinstance(graph, fx.Graph) for graph in graphs) or kind.train is fx.GraphModule.train:
        return current, False
    forwards = [known_forward(kind, _compile(graph)) for graph in graphs]
    signatures = [inspect.signature(forward) for forward in (current, *forwards)]
    if forwards[module.training] is not current or any(signature != signatures[0] for signature in signatures):
        return current, False  # edited since the last switch
    return forwards[training], forwards[0] is not forwards[1]


def known_forward(kind: type[fx.GraphModule], forward: Any) -> Any:
    """Return the recorded function that is equal to `forward`, or note `forward` as one and return it."""
    known = vars(kind).get(_KNOWN, ())
    for other in known:
        if other is forward or _is_same(other, forward):
            return other
    setattr(kind, _KNOWN, (*known, forward))
    return forward


def _compile(graph: Any) -> Any:
    """Return the forward that ``recompile`` would generate."""
    generated = graph.python_code(root_module="self")
    namespace = dict(generated.globals)
    exec(compile(generated.src, "<fused_res graph>", "exec", dont_inherit=True), namespace)
    return namespace["forward"]


def _is_same(first: Any, second: Any) -> bool:
    """Return whether two functions have equal code that refers to the same objects."""
    if first.__code__ != second.__code__ or first.__closure__ or second.__closure__:
        return False
    values = [
        [
            *(function.__defaults__ or ()),
            *(function.__globals__.get(name, _ABSENT) for name in _names(function.__code__)),
        ]
        for function in (first, second)
    ]
    return len(values[0]) == len(values[1]) and all(map(operator.is_, *values))


_ABSENT = object()


def _names(code: Any) -> Iterator[str]:
    """Yield the names of all global variables and attributes in a function."""
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)
