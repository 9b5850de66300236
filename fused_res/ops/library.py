"""Definition and registration of the operators with ``torch.library``: one namespace for each backend."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_res.ops.fakes import FAKES
from fused_res.ops.schemas import SCHEMAS, STEMS

# A Library undefines its operators when it is collected.
_libraries: dict[str, torch.library.Library] = {}


def define(
    namespace: str,
    schemas: Mapping[str, str] = SCHEMAS,
    fakes: Mapping[str, Callable[[Any], Any]] = FAKES,
    internal: Mapping[str, str] | None = None,
) -> None:
    """Defines operators, each with its fake, in ``namespace``; ``internal`` ones are called by no one who traces."""
    library = _libraries[namespace] = torch.library.Library(namespace, "DEF")
    for name, schema in {**(internal or {}), **schemas}.items():
        library.define(name + schema)
    for name in schemas:
        torch.library.register_fake(f"{namespace}::{name}", _by_name(schemas[name], fakes[name]), lib=library)


def _by_name(schema: str, fake: Callable[[Any], Any]) -> Callable[..., Any]:
    """Binds an operator's arguments to the names in its schema; optional ones are None by default."""
    names = re.findall(r" (\w+)(?:=\w+)?(?:,|$)", schema.partition(") ->")[0])
    return lambda *args, **kwargs: fake(SimpleNamespace(**dict(zip_longest(names, args)) | kwargs))


def overloads(namespace: str, names: Iterable[str]) -> list[Callable[..., Any]]:
    """Overloads, not packets: resolving a packet costs a microsecond a call."""
    return [getattr(getattr(torch.ops, namespace), name).default for name in names]


def bind(namespace: str, stems: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Every operator of these stems by its name, for a backend whose kernels are registered from C++."""
    names = [name for stem in stems for name in STEMS[stem]]
    return dict(zip(names, overloads(namespace, names), strict=True))


def operator(namespace: str, name: str, implementation: Callable[..., Any], *keys: str) -> Callable[..., Any]:
    """Registers a Python ``implementation`` for dispatch keys (``"CPU"``, ``"CUDA"``); returns what is to be called.

    For plain tensors that is ``implementation``: the way through the dispatcher and back into Python takes longer than
    a small kernel. While something traces (compilation, fake tensors, subclasses) it is the operator.
    """
    for key in keys:
        _libraries[namespace].impl(name, implementation, key)
    overload = getattr(getattr(torch.ops, namespace), name).default

    @functools.wraps(implementation)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*arguments)
        first = arguments[0]
        while isinstance(first, (list, tuple)):
            first = first[0]
        plain = type(first) is Tensor or type(first) is Parameter
        return implementation(*arguments) if plain else overload(*arguments)

    return call
