"""Definition and registration of the operators with ``torch.library``, in one dispatcher namespace per backend."""

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
from fused_res.ops.schemas import OP_FAMILIES, SCHEMAS

# A Library undefines its operators when it is collected.
_libraries: dict[str, torch.library.Library] = {}


def define(
    namespace: str,
    schemas: Mapping[str, str] = SCHEMAS,
    fakes: Mapping[str, Callable[[Any], Any]] = FAKES,
    without_fakes: Mapping[str, str] | None = None,
) -> None:
    """Define operators and register their fake implementations.

    Args:
        namespace: dispatcher namespace, such as ``"fused_res_cpu"``.
        schemas: operator name -> schema.
        fakes: operator name -> fake implementation.
        without_fakes: schemas of further operators, which are never called during tracing.
    """
    library = _libraries[namespace] = torch.library.Library(namespace, "DEF")
    for name, schema in {**(without_fakes or {}), **schemas}.items():
        library.define(name + schema)
    for name in schemas:
        torch.library.register_fake(
            f"{namespace}::{name}", _bind_schema_arguments(schemas[name], fakes[name]), lib=library
        )


def _bind_schema_arguments(schema: str, fake: Callable[[Any], Any]) -> Callable[..., Any]:
    """Adapt a fake implementation to positional arguments, by the names in the schema. Missing arguments are None."""
    names = re.findall(r" (\w+)(?:=[\w.]+)?(?:,|$)", schema.partition(") ->")[0])
    return lambda *args, **kwargs: fake(SimpleNamespace(**dict(zip_longest(names, args)) | kwargs))


def overloads(namespace: str, names: Iterable[str]) -> list[Callable[..., Any]]:
    """Return the operators' ``default`` overloads. Resolving an overload packet costs a microsecond per call."""
    return [getattr(getattr(torch.ops, namespace), name).default for name in names]


def operator_overloads(namespace: str, op_families: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Return operator name -> overload for all operators of these families, for kernels registered from C++."""
    names = [name for op_family in op_families for name in OP_FAMILIES[op_family]]
    return dict(zip(names, overloads(namespace, names), strict=True))


def register_python_operator(
    namespace: str, name: str, implementation: Callable[..., Any], *keys: str
) -> Callable[..., Any]:
    """Register a Python implementation of an operator; return the callable to use instead of the operator.

    The returned callable runs ``implementation`` directly on plain tensors, because the dispatcher overhead, into C++
    and back into Python, is larger than the run time of a small kernel. Under compilation, and for fake tensors and
    other tensor subclasses, it calls the operator.

    Args:
        namespace, name: the operator, defined by :func:`define`.
        implementation: a function of the schema's arguments, by position.
        keys: dispatch keys to register it for, such as ``"CPU"`` and ``"CUDA"``.
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
