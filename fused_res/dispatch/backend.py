"""What the core needs of a backend: a module that declares it, and the kernels that the module loads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Protocol

from fused_res.dispatch.algorithm import Algorithm, Machine, Operation
from fused_res.ops import STEMS


class Kernels(SimpleNamespace):
    """A backend's operators as attributes, one for each operator of its stems.

    Attributes:
        name, stems: the backend's.
        algorithms: of convolutions, in the order in which they are tried; ATen's last.
        prepare_blocks: several frozen blocks as one call (:mod:`fused_res.backends.cpu.inference_graph`), or None.
        selects_when_run: the operator ``conv_bias_act`` selects the algorithm by the sizes of each call.
    """

    name: str
    stems: frozenset[str]
    algorithms: tuple[Algorithm, ...]
    prepare_blocks: Callable[..., Any] | None = None
    selects_when_run: bool = False

    def implementation(self, operation: Operation, algorithm: Algorithm) -> Callable[..., Any]:
        """The callable that serves an operation: the algorithm's own, or the backend's operator of this name."""
        found = algorithm.serves[operation]
        if not isinstance(found, str):
            return found
        operator: Callable[..., Any] = getattr(self, found)
        if operation != "inference":
            return operator
        return lambda input, weight, bias, residual, geometry, relu: operator(
            input, weight, bias, residual, *geometry, relu
        )


class Backend(Protocol):
    """A package ``fused_res.backends.<name>``. Importing it loads no kernels, so that it can say why there are none."""

    @property
    def STEMS(self) -> tuple[str, ...]:
        """The stems that it has kernels for, whether or not they can run here."""

    @property
    def AUTO(self) -> dict[str, int]:
        """The device types where ``backend="auto"`` may stand for it; the highest number is tried first."""

    @property
    def WHEN_NAMED(self) -> str:
        """How algorithms are selected for ``backend=<name>``: ``"planned"``, or ``"fused"`` wherever possible."""

    def devices(self) -> tuple[str, ...] | None:
        """The device types that its kernels run on here; None for every one."""

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""

    def machine(self) -> Machine:
        """What its algorithms depend on besides the problem."""

    def load(self) -> Kernels:
        """Imports the kernels."""


def import_operators(package: str, stems: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """The operators of a backend that is written in Python: one module a stem, one function an operator."""
    modules = {stem: importlib.import_module(f"{package}.{stem}") for stem in stems}
    return {name: getattr(module, name) for stem, module in modules.items() for name in STEMS[stem]}
