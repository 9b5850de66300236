"""Registry of the backends: availability, resolution of ``backend=`` to kernels, and selection of conv algorithms."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import cast

import torch
from torch import Tensor

from fused_res import _torch_compat, dispatch, env
from fused_res.dispatch import Algorithm, Machine, Operation, PackedWeight, Problem, Selection
from fused_res.dispatch.backend import Backend, Kernels
from fused_res.ops import OP_FAMILIES
from fused_res.ops.geometry import Geometry
from fused_res.ops.memory_format import conv_output_is_channels_last, is_channels_last

#: Function of a selection, its problem and the input that returns the weight operand of the selected algorithm, packed
#: if the algorithm requires it.
WeightPacker = Callable[[Selection, Problem, Tensor], PackedWeight | Tensor]


class BackendUnavailableError(RuntimeError):
    """A backend was selected by name but cannot run on this machine or device; the message has the reason."""


_, *_NAMES = env.BACKEND.allowed
_BACKENDS = {name: cast(Backend, importlib.import_module(f"fused_res.backends.{name}")) for name in _NAMES}


def names() -> tuple[str, ...]:
    """Return every value that ``backend=`` accepts, ``"auto"`` first."""
    return env.BACKEND.allowed


def unavailable(name: str) -> str | None:
    """Return the reason why a backend cannot run on this machine, or None if it can.

    Args:
        name: name of a backend; ``"auto"`` is not one.

    Raises:
        ValueError: for an unknown name.
    """
    return _BACKENDS[_validate_name(name)].unavailable()


def table() -> dict[str, dict[str, str]]:
    """Return, for each operator family and backend, ``"yes"`` or the reason why the backend has no kernels to run."""

    def cell(name: str, op_family: str) -> str:
        absent = f"not implemented by backend {name!r} in this version: unfused operators run instead"
        return unavailable(name) or ("yes" if op_family in op_families(name) else absent)

    return {op_family: {name: cell(name, op_family) for name in _BACKENDS} for op_family in OP_FAMILIES}


@cache
def op_families(name: str) -> frozenset[str]:
    """Return the operator families that a backend has kernels for, whether or not they can run on this machine."""
    return frozenset(_BACKENDS[name].OP_FAMILIES)


def resolve(name: str, device: torch.device) -> Kernels:
    """Return the kernels of the backend that runs on ``device``; their attribute ``name`` is the backend's.

    Args:
        name: one of :func:`names`; ``"auto"`` is the available backend with the highest priority for ``device``.
        device: device of the input.

    Raises:
        ValueError, TypeError: for an invalid argument.
        BackendUnavailableError: if the backend was selected by name (argument, :func:`use` or ``FUSED_RES_BACKEND``)
            and cannot run on ``device``.
    """
    if name == "auto":
        name = _default_backend
    elif type(name) is not str:
        _validate_name(name)
    if torch.compiler.is_compiling():
        return getattr(_dynamo_constants, _dynamo_constant_name(name, device.type))
    try:
        found = _resolve_cache.get((name, device.type))
    except AttributeError:
        raise TypeError(f"device must be a torch.device, got {device!r}") from None
    return found if found is not None else _resolve(name, device)


class _DynamoConstants:
    """Namespace of the backends that compiled code refers to, as attributes.

    With a dictionary instead, each new entry would fail Dynamo's guards and recompile.
    """


_dynamo_constants = _DynamoConstants()


@_torch_compat.assume_constant_result  # Dynamo cannot trace the import of kernels
def _dynamo_constant_name(name: str, device: str) -> str:
    attribute = f"{name}_{device}"
    setattr(_dynamo_constants, attribute, _resolve(name, torch.device(device)))
    return attribute


def _resolve(name: str, device: torch.device) -> Kernels:
    if name == "auto":
        priorities = {candidate: backend.AUTO_PRIORITY.get(device.type, -1) for candidate, backend in _BACKENDS.items()}
        supported = (candidate for candidate, priority in priorities.items() if priority >= 0)
        ranked = sorted(supported, key=priorities.__getitem__, reverse=True)
        chosen = next((candidate for candidate in ranked if unavailable(candidate) is None), "reference")
    else:
        chosen = name
        reason, devices = unavailable(name), _BACKENDS[name].devices()
        if reason is None and devices is not None and device.type not in devices:
            reason = f"it supports {' and '.join(devices)} tensors, and the input is on {device}"
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    kernels = _resolve_cache[name, device.type] = _load(chosen)
    return kernels


@cache
def _load(name: str) -> Kernels:
    kernels = _BACKENDS[name].load()
    kernels.name, kernels.op_families = name, op_families(name)
    return kernels


def check_devices(backend: str, devices: set[torch.device]) -> None:
    """Raise BackendUnavailableError if a backend selected by name cannot run on one of the devices."""
    for device in devices if backend != "auto" else ():
        if device.type != "meta":
            resolve(backend, device)


# Selection of convolution algorithms


def conv_preference(backend: str) -> str:
    """Return the algorithm preference of ``backend``: ``"planned"`` (heuristics), ``"aten"`` or ``"fused"``."""
    if _conv_preference != "auto":
        return _conv_preference
    named = _default_backend if backend == "auto" else backend
    return "planned" if named == "auto" else _BACKENDS[named].DEFAULT_PREFERENCE


def algorithms(name: str) -> tuple[Algorithm, ...]:
    """Return a backend's convolution algorithms in order of priority."""
    return _load(name).algorithms


def selection_settings(name: str) -> tuple[bool, Machine]:
    """Return what the selection depends on besides the tensors: whether Winograd is allowed, and the machine."""
    return _winograd_allowed, _BACKENDS[name].machine()


def select(
    name: str, operation: Operation, input: Tensor, weight: Tensor, geometry: Geometry, preference: str, prepacked: bool
) -> tuple[Problem, Selection]:
    """Describe a convolution of these tensors as a problem, and select the backend's algorithm for it.

    Args:
        name: name of the backend.
        operation: ``"inference"`` or ``"forward"``.
        input: ``(N, C, ...)``.
        weight: ``(K, C / groups, ...)``.
        geometry: stride, padding, dilation and groups.
        preference: ``"planned"`` (heuristics), ``"aten"`` or ``"fused"``, see :func:`fused_res.dispatch.select`.
        prepacked: whether the caller caches the packed weight.
    """
    allowed, machine = selection_settings(name)
    channels_last = conv_output_is_channels_last(input, weight) if operation == "inference" else is_channels_last(input)
    problem = Problem(
        operation, tuple(input.shape), tuple(weight.shape), *geometry, input.dtype, input.device.type, channels_last,
        prepacked=prepacked, under_torch_dispatch=_torch_compat.has_torch_dispatch_mode(), allow_winograd=allowed,
        machine=machine,
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
    """Return whether compiled code calls ATen's convolution; decided without the input's size, which may be dynamic."""
    if preference == "aten" or kernels.selects_per_call:
        return preference == "aten"
    problem = Problem("inference", (), weight, *geometry, dtype, "", channels_last)
    return dispatch.select_uncached(kernels.algorithms, problem, preference).name == "aten"


def dispatch_conv_bias_act(
    kernels: Kernels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
    preference: str,
    pack_weight: WeightPacker | None = None,
    tune: Callable[..., Selection | None] | None = None,
) -> Tensor:
    """Return ``act(conv(input, weight) + bias [+ residual])``, computed by the selected algorithm.

    Args:
        kernels: the resolved backend's kernels.
        input: ``(N, C, ...)``.
        weight: ``(K, C / groups, ...)``.
        bias: ``(K,)`` or None.
        residual: of the output's shape, or None.
        geometry: stride, padding, dilation and groups.
        relu: whether to apply a ReLU.
        preference: as of :func:`select`.
        pack_weight: function that returns the weight operand of the selected algorithm, for a caller that caches packed
            weights. Default: pack in every call where the algorithm requires it.
        tune: function that returns a selection by measured times, or None. Default: no tuning.
    """
    problem, selected = select(kernels.name, "inference", input, weight, geometry, preference, pack_weight is not None)
    if tune is not None:
        selected = tune(kernels, problem, input, weight, bias, residual, geometry, relu) or selected
    algorithm = selected.algorithm
    operand: Tensor | PackedWeight = weight
    if pack_weight is not None:
        operand = pack_weight(selected, problem, input)
    elif algorithm.weight_packing == "always" and algorithm.pack is not None:
        operand = PackedWeight(algorithm.pack(problem, input, weight), problem.weight)
    output: Tensor = kernels.implementation("inference", algorithm)(input, operand, bias, residual, geometry, relu)
    return output


def require_available(name: str) -> None:
    """Raise unless ``name`` is ``"auto"`` or a known backend that can run on some device of this machine."""
    if name != "auto" and (reason := unavailable(name)) is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")


@contextlib.contextmanager
def _restore(previous: tuple[str, str, bool]) -> Iterator[None]:
    global _default_backend, _conv_preference, _winograd_allowed
    try:
        yield
    finally:
        _default_backend, _conv_preference, _winograd_allowed = previous


def use(
    name: str, convolution: str | None = None, winograd: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """Set the backend that ``backend="auto"`` resolves to, process-wide and with immediate effect.

    As a context manager, restore the previous settings on exit.

    A GPU backend that is selected by name, here or as an argument, computes every convolution that it supports. With
    ``"auto"``, heuristics select the algorithm by shape and dtype.

    Args:
        name: one of :func:`names`.
        convolution: selection of convolution algorithms. ``"aten"``: ATen (cuDNN, oneDNN) only; ``"fused"``: fused
            algorithms where supported; ``"planned"``: by heuristics (:mod:`fused_res.dispatch`); ``"auto"``: the
            backend's default. Default: None, unchanged.
        winograd: whether the CPU backend may use Winograd convolution, which is faster but less accurate: its RMS error
            is up to 3e-6 of the RMS of the output. Default: None, unchanged.

    Raises:
        ValueError: for an unknown value; then nothing is changed.
        BackendUnavailableError: if the backend cannot run on this machine; then nothing is changed.
    """
    global _default_backend, _conv_preference, _winograd_allowed
    if name != "auto":
        require_available(name)
    if convolution not in (None, *env.CONVOLUTION.allowed):
        raise ValueError(f"convolution must be one of {env.CONVOLUTION.allowed}, got {convolution!r}")
    if winograd not in (None, True, False):
        raise ValueError(f"winograd must be True, False or None, got {winograd!r}")
    previous = _default_backend, _conv_preference, _winograd_allowed
    _default_backend, _conv_preference = name, convolution or _conv_preference
    _winograd_allowed = _winograd_allowed if winograd is None else winograd
    return _restore(previous)


def _validate_name(name: str) -> str:
    if name not in _NAMES:  # also if it is not a string
        raise ValueError(f"backend must be one of {names()}, got {name!r}")
    return name


_default_backend: str = env.BACKEND.read()
_conv_preference: str = env.CONVOLUTION.read()
_winograd_allowed: bool = env.WINOGRAD.read() != "0"
_resolve_cache: dict[tuple[str, str], Kernels] = {}
