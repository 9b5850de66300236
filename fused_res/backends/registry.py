"""One visible table: rows are operators' stems, columns backends, a cell kernels or the reason why not."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch

from fused_res import _extension, env

#: Which operators of :mod:`fused_res.ops` make up a stem.
STEMS: dict[str, tuple[str, ...]] = {
    "batch_norm_act": (
        "batch_norm_stats",
        "batch_norm_act_forward",
        "batch_norm_act_apply",
        "batch_norm_act_inference_",
        "batch_norm_act_backward",
        "batch_norm_act_backward_pair",
        "add_masked_",
        "update_running_stats",
    ),
    "batch_norm_sync": ("batch_norm_partials", "merge_stats", "batch_norm_sums", "batch_norm_act_dx"),
    "max_pool": ("max_pool_forward", "max_pool_backward"),
    "conv_bias_act": ("conv_bias_act",),
    "conv_bn_stats": ("conv_bn_stats",),
    "conv_dgrad": ("conv_dgrad",),
    "conv_wgrad": ("conv_wgrad",),
}
#: What a backend may offer besides: an operand in the form that its kernels like best; several layers as one call, and
#: what that depends on; ATen's convolution and its backward, but faster, and with statistics.
_EXTRAS = ("pack_weight", "prepare_blocks", "convolution_settings", "conv_forward", "conv_backward")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def _reference() -> None:
    return None


def _cpu() -> str | None:
    return None if _extension.loaded else _extension.reason


OLDEST_TRITON = (3, 6)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors (on CUDA tensors too, by a copy)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old: pip install 'triton>={'.'.join(map(str, OLDEST_TRITON))}'"
    return None


def _triton() -> str | None:
    reason = _triton_missing()
    if reason is None and not interpreting() and not torch.cuda.is_available():
        return "there is no NVIDIA GPU here that this torch can use (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return reason


#: What the CUDA C++ kernels are compiled for.
OLDEST_GPU = (8, 0)


def simulating() -> bool:
    """Whether the CUDA C++ kernels are simulated on CPU tensors: ``tests/cuda_sim``."""
    return bool(env.SIMULATOR.read())


def _cuda() -> str | None:
    if simulating():
        library = env.SIMULATOR.read()
        return None if os.path.exists(library) else f"{env.SIMULATOR.name} names {library}, and there is no such file"
    _, reason = _extension.cuda_library()
    return reason or _gpu_missing()


def _gpu_missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here that this torch can use"
    found = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if found < OLDEST_GPU:
        needed, has = (".".join(map(str, version)) for version in (OLDEST_GPU, found))
        return f"its kernels need a GPU of compute capability {needed} or newer, and this one has {has}"
    return None


@dataclass(frozen=True)
class _Column:
    devices: Callable[[], tuple[str, ...]] | None  # None: every device
    unavailable: Callable[[], str | None]


_COLUMNS = {
    "reference": _Column(None, _reference),
    "cpu": _Column(lambda: ("cpu",), _cpu),
    "triton": _Column(lambda: ("cuda", "cpu") if interpreting() else ("cuda",), _triton),
    "cuda": _Column(lambda: ("cpu",) if simulating() else ("cuda",), _cuda),
}
#: What "auto" means on a device, best first.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class Backend(SimpleNamespace):
    """A column of the table: ``name``, its ``stems``, and their operators of :mod:`fused_res.ops` as attributes."""

    name: str
    stems: frozenset[str]


def names() -> tuple[str, ...]:
    """Every value that ``backend=`` takes, ``"auto"`` first."""
    return ("auto", *_COLUMNS)


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None if it can.

    Raises:
        ValueError: there is no backend of this name (``"auto"`` is none).
    """
    return _COLUMNS[_checked(name)].unavailable()


def table() -> dict[str, dict[str, str]]:
    """Who has kernels for what, here: rows are operators, columns backends, a cell says ``"yes"`` or why not."""
    return {stem: {name: unavailable(name) or _absent(name, stem) or "yes" for name in _COLUMNS} for stem in STEMS}


def _absent(name: str, stem: str) -> str | None:
    """Why a backend that runs here does not compute this stem: it has no file of that name."""
    if importlib.util.find_spec(f"fused_res.backends.{name}.{stem}") is not None:
        return None
    return f"backend {name!r} has no kernels for it in this version: ATen's convolution and the norm's own passes run"


def resolve(name: str, device: torch.device) -> Backend:
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


def _traced_name(name: str, device: str) -> str:
    attribute = f"{name}_{device}"
    setattr(_traced, attribute, _resolve(name, torch.device(device)))
    return attribute


# Dynamo cannot trace the import of kernels. (torch.compiler.assume_constant_result does this, and imports Dynamo.)
_traced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _resolve(name: str, device: torch.device) -> Backend:
    chosen = name
    if name == "auto":
        preference = _PREFERENCE.get(device.type, ("reference",))
        chosen = next(candidate for candidate in preference if unavailable(candidate) is None)
    else:
        reason = unavailable(name)
        devices = _COLUMNS[name].devices
        if reason is None and devices is not None and device.type not in devices():
            reason = f"it runs on {' and '.join(devices())} tensors, and the input is on {device}"
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    backend = _resolved[name, device.type] = _load(chosen)
    return backend


@cache
def stems(name: str) -> frozenset[str]:
    """The stems that a backend has kernels for, whether or not they can run here."""
    return frozenset(stem for stem in STEMS if _absent(name, stem) is None)


def convolution(backend: str) -> str:
    """Who computes convolutions when ``backend`` is asked for: ``"planned"``, ``"aten"`` or ``"fused"``."""
    if _convolution != "auto":
        return _convolution
    named = _default if backend == "auto" else backend
    return "fused" if named in ("triton", "cuda") else "planned"


def winograd() -> bool:
    """Whether convolutions may use Winograd's algorithm."""
    return _winograd


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
        convolution: overrides who computes convolutions: ``"aten"`` leaves every one to ATen (cuDNN, oneDNN),
            ``"fused"`` takes the backend's kernels wherever there are any, ``"planned"`` leaves it to the planner,
            ``"auto"`` takes the override back; None changes nothing.
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
    if name not in tuple(_COLUMNS):  # which a list may be asked about, too
        raise ValueError(f"backend must be one of {names()}, got {name!r}")
    return name


def _load(name: str) -> Backend:
    if name not in _loaded:
        kernels: dict[str, Callable] = {}
        for stem in stems(name):
            module = importlib.import_module(f"fused_res.backends.{name}.{stem}")
            kernels |= {operator: getattr(module, operator) for operator in STEMS[stem]}
            kernels |= {extra: getattr(module, extra) for extra in _EXTRAS if hasattr(module, extra)}
        _loaded[name] = Backend(name=name, stems=stems(name), **kernels)
    return _loaded[name]


_default: str = env.BACKEND.read()
_convolution: str = env.CONVOLUTION.read()
_winograd: bool = env.WINOGRAD.read() != "0"
_loaded: dict[str, Backend] = {}
_resolved: dict[tuple[str, str], Backend] = {}
