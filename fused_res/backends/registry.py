"""One visible table: rows are operators' stems, columns backends, a cell kernels or the reason why not."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
        "add_masked_",
        "update_running_stats",
    ),
    "max_pool": ("max_pool_forward", "max_pool_backward"),
}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def _reference() -> None:
    return None


def _cpu() -> str | None:
    return None if _extension.loaded else _extension.reason


def _planned(part: str) -> Callable[[], str]:
    return lambda: f"this version of fused_res has no {part} kernels yet"


@dataclass(frozen=True)
class _Column:
    devices: tuple[str, ...] | None  # None: every device
    unavailable: Callable[[], str | None]


_COLUMNS = {
    "reference": _Column(None, _reference),
    "cpu": _Column(("cpu",), _cpu),
    "triton": _Column(("cuda",), _planned("Triton")),
    "cuda": _Column(("cuda",), _planned("CUDA")),
}
#: What "auto" means on a device, best first.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class Backend(SimpleNamespace):
    """A column of the table: ``name``, and every operator of :mod:`fused_res.ops` as an attribute."""

    name: str


def names() -> tuple[str, ...]:
    """Every value that ``backend=`` takes."""
    return ("auto", *_COLUMNS)


def unavailable(name: str) -> str | None:
    """Why the backend cannot run here, or None if it can."""
    return _COLUMNS[_checked(name)].unavailable()


def table() -> dict[str, dict[str, str]]:
    """Rows are stems, columns are backends; a cell says ``"yes"`` or why not."""
    return {stem: {name: unavailable(name) or "yes" for name in _COLUMNS} for stem in STEMS}


def resolve(name: str, device: torch.device) -> Backend:
    """The backend to run on ``device``.

    Raises :class:`BackendUnavailableError` when it was asked for by name (argument, :func:`use` or
    ``FUSED_RES_BACKEND``) and cannot run there; ``"auto"`` takes the best that can.
    """
    if name == "auto":
        name = _default
    found = _resolved.get((name, device.type))
    return found if found is not None else _resolve(name, device)


def _resolve(name: str, device: torch.device) -> Backend:
    chosen = name
    if name == "auto":
        preference = _PREFERENCE.get(device.type, ("reference",))
        chosen = next(candidate for candidate in preference if unavailable(candidate) is None)
    else:
        reason = unavailable(name)
        devices = _COLUMNS[name].devices
        if reason is None and devices is not None and device.type not in devices:
            reason = f"it runs on {' and '.join(devices)} tensors, and the input is on {device}"
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    backend = _resolved[name, device.type] = _load(chosen)
    return backend


def require(name: str) -> None:
    """Raises unless ``backend=name`` is a known backend that could run here on some device."""
    if name != "auto" and (reason := unavailable(name)) is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")


@contextlib.contextmanager
def _restore(previous: str) -> Iterator[None]:
    global _default
    try:
        yield
    finally:
        _default = previous


def use(name: str) -> contextlib.AbstractContextManager[None]:
    """Sets what ``backend="auto"`` means from here on; as a context manager, until its end."""
    global _default
    if name != "auto":
        require(name)
    previous, _default = _default, name
    return _restore(previous)


def _checked(name: str) -> str:
    if name not in _COLUMNS:
        raise ValueError(f"backend must be one of {names()}, got {name!r}")
    return name


def _load(name: str) -> Backend:
    if name not in _loaded:
        kernels: dict[str, Callable] = {}
        for stem, operators in STEMS.items():
            module = importlib.import_module(f"fused_res.backends.{name}.{stem}")
            kernels |= {operator: getattr(module, operator) for operator in operators}
        _loaded[name] = Backend(name=name, **kernels)
    return _loaded[name]


_default: str = env.BACKEND.read()
_loaded: dict[str, Backend] = {}
_resolved: dict[tuple[str, str], Backend] = {}
