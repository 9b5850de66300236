"""Registry of the backends: availability, resolution of ``backend=`` to kernels, and selection of conv algorithms."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
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

#: Function of a selection and its problem that returns the weight operand of the selected algorithm, packed if the
#: algorithm requires it.
WeightPacker = Callable[[Selection, Problem], PackedWeight | Tensor]


class BackendUnavailableError(RuntimeError):
    """A backend was selected by name but cannot run on this machine or device; the message has the reason."""


_, *_NAMES = env.BACKEND.allowed
_BACKENDS = {name: cast(Backend, importlib.import_module(f"fused_res.backends.{name}")) for name in _NAMES}

#: Device type -> the backends that ``"auto"`` tries, best first; the reference is the last. On a GPU, norms and
#: convolutions are resolved separately: a launch from C++ takes less CPU time than one from Python, and Triton's
#: `tl.dot` compiles to `wgmma` on Hopper, whereas csrc/cuda multiplies with `mma.sync`, at two thirds of its rate.
_AUTO_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_AUTO_CONVOLUTION_ORDER = {"cuda": ("triton", "cuda")}
_CONVOLUTION_FAMILIES = tuple(op_family for op_family in OP_FAMILIES if op_family.startswith("conv_"))


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

    Where ``"auto"`` takes norms and convolutions from two backends, the name is of the form ``"cuda+triton"``, norms
    first. This function accepts it, so that a backward runs on the kernels of its forward.

    Args:
        name: one of :func:`names`; ``"auto"`` is the best available backend for ``device``, per operator family.
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
    attribute = f"{name}_{device}".replace("+", "_")
    setattr(_dynamo_constants, attribute, _resolve(name, torch.device(device)))
    return attribute


def _resolve(name: str, device: torch.device) -> Kernels:
    chosen = name
    if name == "auto":
        orders = (_AUTO_ORDER, _AUTO_CONVOLUTION_ORDER)
        best = [_first_available(order[device.type]) for order in orders if device.type in order]
        chosen = "+".join(dict.fromkeys(best)) or "reference"
    for part in chosen.split("+") if name != "auto" else ():
        reason, devices = unavailable(part), _BACKENDS[part].devices()
        if reason is None and devices is not None and device.type not in devices:
            reason = f"it supports {' and '.join(devices)} tensors, and the input is on {device}"
        if reason is not None:
            raise BackendUnavailableError(f"backend {part!r} is not available: {reason}")
    kernels = _resolve_cache[name, device.type] = _load(chosen)
    return kernels


def _first_available(candidates: Iterable[str]) -> str:
    return next((name for name in candidates if unavailable(name) is None), "reference")


@cache
def _load(name: str) -> Kernels:
    """Load a backend, or with a name of the form ``"cuda+triton"`` the first with the convolutions of the second."""
    norms, _, convolutions = name.partition("+")
    if not convolutions:
        kernels = _BACKENDS[name].load()
        kernels.op_families = op_families(name)
    else:
        kernels, other = Kernels(**vars(_load(norms))), _load(convolutions)
        kernels.algorithms, kernels.float32_bias = other.algorithms, other.float32_bias
        kernels.op_families |= other.op_families
        for operator in (operator for family in _CONVOLUTION_FAMILIES for operator in OP_FAMILIES[family]):
            setattr(kernels, operator, getattr(other, operator))
    kernels.name = name
    return kernels


def check_devices(backend: str, devices: set[torch.device]) -> None:
    """Raise BackendUnavailableError if a backend selected by name cannot run on one of the devices."""
    for device in devices if backend != "auto" else ():
        if device.type != "meta":
            resolve(backend, device)


# Selection of convolution algorithms


def conv_preference() -> str:
    """Return the algorithm preference: ``"planned"`` (heuristics), ``"aten"`` or ``"fused"``, see :func:`use`."""
    return _conv_preference


def algorithms(name: str) -> tuple[Algorithm, ...]:
    """Return a backend's convolution algorithms in order of priority."""
    return _load(name).algorithms


def selection_settings(name: str) -> tuple[bool, Machine]:
    """Return what the selection depends on besides the tensors: whether Winograd is allowed, and the machine."""
    return _winograd_allowed, _machine(name.rpartition("+")[2])


@_torch_compat.assume_constant_result
def _machine(name: str) -> Machine:
    return _BACKENDS[name].machine()


def select(
    name: str,
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    geometry: Geometry,
    preference: str,
    prepacked: bool,
    residual: bool = False,
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
        residual: whether a residual is added in the epilogue. Default: False.
    """
    allowed, machine = selection_settings(name)
    channels_last = conv_output_is_channels_last(input, weight) if operation == "inference" else is_channels_last(input)
    problem = Problem(
        operation, tuple(input.shape), tuple(weight.shape), *geometry, input.dtype, input.device.type, channels_last,
        prepacked=prepacked, residual=residual, under_torch_dispatch=_torch_compat.has_torch_dispatch_mode(),
        allow_winograd=allowed, machine=machine,
    )  # fmt: skip
    return problem, dispatch.select(algorithms(name), problem, preference)


def selects_aten(
    kernels: Kernels,
    weight: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    channels_last: bool,
    residual: bool,
    preference: str,
) -> bool:
    """Return whether compiled code calls ATen's convolution; decided without the input's size, which may be dynamic."""
    if preference == "aten" or kernels.selects_per_call:
        return preference == "aten"
    machine = selection_settings(kernels.name)[1]
    problem = Problem("inference", (), weight, *geometry, dtype, "", channels_last, residual=residual, machine=machine)
    return not dispatch.select_uncached(kernels.algorithms, problem, preference).algorithm.fused


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
) -> Tensor:
    """Return ``act(conv(input, weight) + bias [+ residual])``, computed by the selected algorithm.

    Args:
        kernels: the resolved backend's kernels.
        input: ``(N, C, ...)``.
        weight: ``(K, C / groups, ...)``; with `pack_weight` only its shape and memory format are read.
        bias: ``(K,)`` or None.
        residual: of the output's shape, or None.
        geometry: stride, padding, dilation and groups.
        relu: whether to apply a ReLU.
        preference: as of :func:`select`.
        pack_weight: function that returns the weight operand of the selected algorithm, for a caller that caches packed
            weights. Default: pack in every call where the algorithm requires it.
    """
    prepacked, has_residual = pack_weight is not None, residual is not None
    problem, selected = select(kernels.name, "inference", input, weight, geometry, preference, prepacked, has_residual)
    algorithm = selected.algorithm
    operand: Tensor | PackedWeight = weight
    if pack_weight is not None:
        operand = pack_weight(selected, problem)
    elif algorithm.weight_packing == "always" and algorithm.pack is not None:
        operand = PackedWeight(algorithm.pack(problem, weight), problem.weight)
    output: Tensor = kernels.implementation("inference", algorithm)(input, operand, bias, residual, geometry, relu)
    return output


def require_available(name: str) -> None:
    """Raise unless ``name`` is ``"auto"`` or a known backend that can run on some device of this machine."""
    if name != "auto" and (reason := unavailable(name)) is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")


@contextlib.contextmanager
def _restore(previous: tuple[str, str, bool]) -> Iterator[None]:
    try:
        yield
    finally:
        _set_defaults(*previous)


def use(
    name: str, convolution: str | None = None, winograd: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """Set the backend that ``backend="auto"`` resolves to, process-wide and with immediate effect.

    As a context manager, restore the previous settings on exit.

    Args:
        name: one of :func:`names`.
        convolution: selection of convolution algorithms, for every backend. ``"planned"``: by heuristics
            (:mod:`fused_res.dispatch`); ``"aten"``: ATen (cuDNN, oneDNN) only; ``"fused"``: the fused algorithms of a
            GPU backend wherever they are supported, which is slower and is for tests and benchmarks. Default: None,
            unchanged.
        winograd: whether the CPU backend may use Winograd convolution, which is faster but less accurate: its RMS error
            is up to 3e-6 of the RMS of the output. Default: None, unchanged.

    Raises:
        ValueError: for an unknown value; then nothing is changed.
        BackendUnavailableError: if the backend cannot run on this machine; then nothing is changed.
    """
    if name != "auto":
        require_available(name)
    if convolution not in (None, *env.CONVOLUTION.allowed):
        raise ValueError(f"convolution must be one of {env.CONVOLUTION.allowed}, got {convolution!r}")
    if winograd not in (None, True, False):
        raise ValueError(f"winograd must be True, False or None, got {winograd!r}")
    previous = _default_backend, _conv_preference, _winograd_allowed
    _set_defaults(name, convolution or _conv_preference, _winograd_allowed if winograd is None else winograd)
    return _restore(previous)


def _set_defaults(backend: str, conv_preference: str, winograd_allowed: bool) -> None:
    global _default_backend, _conv_preference, _winograd_allowed, _defaults_version
    _default_backend, _conv_preference, _winograd_allowed = backend, conv_preference, winograd_allowed
    _defaults_version += 1


def defaults_version() -> int:
    """Return a number that changes with the settings of :func:`use`, for callers that cache what depends on them."""
    return _defaults_version


def _validate_name(name: str) -> str:
    if name not in _NAMES:  # also if it is not a string
        raise ValueError(f"backend must be one of {names()}, got {name!r}")
    return name


_default_backend: str = env.BACKEND.read()
_conv_preference: str = env.CONVOLUTION.read()
_winograd_allowed: bool = env.WINOGRAD.read() != "0"
_defaults_version = 0
_resolve_cache: dict[tuple[str, str], Kernels] = {}
