"""The backends as one table, the one that a call uses, and the algorithm that it selects for a convolution."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import cast

import torch
from torch import Tensor

from fused_res import _torch_compat, dispatch, env
from fused_res.dispatch import Algorithm, Machine, Operation, PackedWeight, Problem, Selected
from fused_res.dispatch.backend import Backend, Kernels
from fused_res.ops import STEMS
from fused_res.ops.geometry import Geometry
from fused_res.ops.memory_format import is_channels_last, makes_channels_last

#: From an algorithm, a problem and an input to the weight, packed if the algorithm packs.
Keep = Callable[[Selected, Problem, Tensor], PackedWeight | Tensor]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


_, *_NAMES = env.BACKEND.allowed
_BACKENDS = {name: cast(Backend, importlib.import_module(f"fused_res.backends.{name}")) for name in _NAMES}


def names() -> tuple[str, ...]:
    """Every value that ``backend=`` takes, ``"auto"`` first."""
    return env.BACKEND.allowed


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None if it can.

    Raises:
        ValueError: there is no backend of this name (``"auto"`` is none).
    """
    return _BACKENDS[_checked(name)].unavailable()


def table() -> dict[str, dict[str, str]]:
    """What each backend has kernels for, here: rows are stems, columns backends, cells ``"yes"`` or why not."""

    def cell(name: str, stem: str) -> str:
        absent = (
            f"backend {name!r} has no kernels for it in this version: ATen's convolution and the norm's own passes run"
        )
        return unavailable(name) or ("yes" if stem in stems(name) else absent)

    return {stem: {name: cell(name, stem) for name in _BACKENDS} for stem in STEMS}


@cache
def stems(name: str) -> frozenset[str]:
    """The stems that a backend has kernels for, whether or not they can run here."""
    return frozenset(_BACKENDS[name].STEMS)


def resolve(name: str, device: torch.device) -> Kernels:
    """The backend that runs on ``device`` when this name is asked for; its ``name`` says which it is.

    Args:
        name: one of :func:`names`; ``"auto"`` takes the best that can.
        device: the input's.

    Raises:
        ValueError, TypeError: an argument does not fit.
        BackendUnavailableError: it was asked for by name (argument, :func:`use` or ``FUSED_RES_BACKEND``) and cannot
            run there.
    """
    if name == "auto":
        name = _default
    elif type(name) is not str:
        _checked(name)
    if torch.compiler.is_compiling():
        return getattr(_traced, _traced_name(name, device.type))
    try:
        found = _resolved.get((name, device.type))
    except AttributeError:
        raise TypeError(f"device must be a torch.device, got {device!r}") from None
    return found if found is not None else _resolve(name, device)


class _Traced:
    """Backends that compiled code refers to, by name: a growing dictionary would fail its guards."""


_traced = _Traced()


@_torch_compat.constant_while_compiling  # Dynamo cannot trace the import of kernels
def _traced_name(name: str, device: str) -> str:
    attribute = f"{name}_{device}"
    setattr(_traced, attribute, _resolve(name, torch.device(device)))
    return attribute


def _resolve(name: str, device: torch.device) -> Kernels:
    if name == "auto":
        ranks = {one: backend.AUTO.get(device.type, -1) for one, backend in _BACKENDS.items()}
        ranked = sorted((one for one in ranks if ranks[one] >= 0), key=ranks.__getitem__, reverse=True)
        chosen = next((one for one in ranked if unavailable(one) is None), "reference")
    else:
        chosen = name
        reason, devices = unavailable(name), _BACKENDS[name].devices()
        if reason is None and devices is not None and device.type not in devices:
            reason = f"it runs on {' and '.join(devices)} tensors, and the input is on {device}"
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    kernels = _resolved[name, device.type] = _load(chosen)
    return kernels


@cache
def _load(name: str) -> Kernels:
    kernels = _BACKENDS[name].load()
    kernels.name, kernels.stems = name, stems(name)
    return kernels


def check_devices(backend: str, devices: set[torch.device]) -> None:
    """Raises BackendUnavailableError where a backend asked for by name does not run on one of the devices."""
    for device in devices if backend != "auto" else ():
        if device.type != "meta":
            resolve(backend, device)


# The algorithm of a convolution


def convolution(backend: str) -> str:
    """How algorithms are selected when ``backend`` is asked for: ``"planned"``, ``"aten"`` or ``"fused"``."""
    if _convolution != "auto":
        return _convolution
    named = _default if backend == "auto" else backend
    return "planned" if named == "auto" else _BACKENDS[named].WHEN_NAMED


def winograd() -> bool:
    """Whether convolutions may use Winograd's algorithm."""
    return _winograd


def algorithms(name: str) -> tuple[Algorithm, ...]:
    """A backend's algorithms of convolutions, in the order in which they are tried."""
    return _load(name).algorithms


def settings(name: str) -> tuple[bool, Machine]:
    """What the selection depends on, besides the tensors: whether Winograd is allowed, and the machine."""
    return _winograd, _BACKENDS[name].machine()


def select(
    name: str, operation: Operation, input: Tensor, weight: Tensor, geometry: Geometry, preference: str, packed: bool
) -> tuple[Problem, Selected]:
    """One convolution of these tensors as a problem, and the algorithm that the backend has for it."""
    allowed, machine = settings(name)
    channels_last = makes_channels_last(input, weight) if operation == "inference" else is_channels_last(input)
    problem = Problem(
        operation, tuple(input.shape), tuple(weight.shape), *geometry, input.dtype, input.device.type, channels_last,
        packed=packed, traced=_torch_compat.is_observed(), winograd=allowed, machine=machine,
    )  # fmt: skip
    return problem, dispatch.select(algorithms(name), problem, preference)


def selects_aten(
    kernels: Kernels,
    weight: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    channels_last: bool,
    preference: str,
) -> bool:
    """Whether compiled code calls ATen's convolution with its epilogue, decided without the input's size."""
    if preference == "aten" or kernels.selects_when_run:
        return preference == "aten"
    problem = Problem("inference", (), weight, *geometry, dtype, "", channels_last)
    return dispatch.select_uncached(kernels.algorithms, problem, preference).name == "aten"


def infer(
    kernels: Kernels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
    preference: str,
    keep: Keep | None = None,
    tune: Callable[..., Selected | None] | None = None,
) -> Tensor:
    """``act(conv(input, weight) + bias [+ residual])`` by the selected algorithm.

    Args:
        keep: returns the weight as the algorithm reads it, for a caller who keeps it packed.
        tune: returns a measured selection, or None.
    """
    problem, selected = select(kernels.name, "inference", input, weight, geometry, preference, keep is not None)
    if tune is not None:
        selected = tune(kernels, problem, input, weight, bias, residual, geometry, relu) or selected
    algorithm = selected.algorithm
    operand: Tensor | PackedWeight = weight
    if keep is not None:
        operand = keep(selected, problem, input)
    elif algorithm.packs == "always" and algorithm.pack is not None:
        operand = PackedWeight(algorithm.pack(problem, input, weight), problem.weight)
    output: Tensor = kernels.implementation("inference", algorithm)(input, operand, bias, residual, geometry, relu)
    return output


def require(name: str) -> None:
    """Raises unless ``backend=name`` is a known backend that could run here on some device."""
    if name != "auto" and (reason := unavailable(name)) is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")


@contextlib.contextmanager
def _restore(previous: tuple[str, str, bool]) -> Iterator[None]:
    global _default, _convolution, _winograd
    try:
        yield
    finally:
        _default, _convolution, _winograd = previous


def use(
    name: str, convolution: str | None = None, winograd: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """Sets what ``backend="auto"`` means in this process from here on; as a context manager, until its end.

    A GPU's backend that is named so, or as an argument, computes convolutions wherever it can; otherwise the planner
    decides by shape and dtype.

    Args:
        name: one of :func:`names`.
        convolution: overrides how algorithms are selected: ``"aten"`` leaves every convolution to ATen (cuDNN, oneDNN)
            and nothing else, ``"fused"`` selects fused algorithms where supported, ``"planned"`` the first that no rule
            excludes (:mod:`fused_res.dispatch`), ``"auto"`` takes the override back; None changes nothing.
        winograd: False keeps the CPU's convolutions from Winograd's algorithm, which is faster and less exact: its RMS
            error is up to 3e-6 of the output's. True allows it; None changes nothing.

    Raises:
        ValueError: an argument is not a known value; nothing has been changed then.
        BackendUnavailableError: the backend cannot run here; likewise.
    """
    global _default, _convolution, _winograd
    if name != "auto":
        require(name)
    if convolution not in (None, *env.CONVOLUTION.allowed):
        raise ValueError(f"convolution must be one of {env.CONVOLUTION.allowed}, got {convolution!r}")
    if winograd not in (None, True, False):
        raise ValueError(f"winograd must be True, False or None, got {winograd!r}")
    previous = _default, _convolution, _winograd
    _default, _convolution = name, convolution or _convolution
    _winograd = _winograd if winograd is None else winograd
    return _restore(previous)


def _checked(name: str) -> str:
    if name not in _NAMES:  # also where it is no string
        raise ValueError(f"backend must be one of {names()}, got {name!r}")
    return name


_default: str = env.BACKEND.read()
_convolution: str = env.CONVOLUTION.read()
_winograd: bool = env.WINOGRAD.read() != "0"
_resolved: dict[tuple[str, str], Kernels] = {}
