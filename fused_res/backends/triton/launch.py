"""Launch of Triton kernels: every launch of this backend goes through :class:`Launch`, where it can be intercepted.

``kernel[grid](...)`` is the ordinary path. Most of its time goes into finding the compiled kernel: it binds and
specializes every argument, and reads all settings that a compilation depends on. A :class:`Launch` fixes everything but
the tensors, takes the ordinary path once, and then calls the compiled launcher of the kernel directly, with the same
arguments. Whatever the direct path does not cover takes the ordinary one: the interpreter, hooks, another device, and
tensors of another dtype or with another alignment.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver as _driver

Grid = tuple[int, ...]
#: Called with (kernel, grid, arguments, options) in place of the launch.
LaunchInterceptor = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]
#: Current device and stream of direct launches.
Queue = tuple[int, int]
#: Launches with (stream, *tensors) if the tensors are as those it was made for; returns whether it has launched.
DirectLaunch = Callable[..., bool]

_interceptor: LaunchInterceptor | None = None
_MAX_DIRECT = 8
_runtime, _compilation = knobs.runtime, knobs.compilation
_enter_hooks, _exit_hooks = _runtime.launch_enter_hook.calls, _runtime.launch_exit_hook.calls


def queue_of(tensor: Tensor) -> Queue | None:
    """Return where kernels on ``tensor`` are launched directly, or None if they have to take the ordinary path.

    Direct launches call no hooks and ignore the settings of Triton that select another compilation. Triton launches on
    the current device, so ``tensor`` must be there. The result is for the launches of one operator, because the current
    stream may change.
    """
    if _interceptor is not None or _enter_hooks or _exit_hooks or _compilation.instrumentation_mode:
        return None
    if _runtime.__dict__ and _has_unusual_settings():
        return None
    try:
        driver = _driver.active
    except RuntimeError:  # no GPU: the interpreter runs the kernels
        return None
    device = driver.get_current_device()
    return (device, driver.get_current_stream(device)) if tensor.get_device() == device else None


def _has_unusual_settings() -> bool:
    """Return whether hooks were replaced, or a setting that is part of Triton's cache key was changed."""
    return bool(
        getattr(_runtime.launch_enter_hook, "calls", True)
        or getattr(_runtime.launch_exit_hook, "calls", True)
        or _runtime.debug
        or _runtime.add_stages_inspection_hook is not None
    )


class Launch:
    """A kernel with its grid, its arguments other than tensors, and its options.

    Args:
        kernel: the ``triton.jit`` function; its tensors are its first parameters.
        grid: number of programs in each of up to three dimensions.
        scalars: the arguments after the tensors, by position.
        options: launch options such as ``num_warps``.
    """

    __slots__ = ("_direct", "_options", "_pre_run_hooks", "grid", "kernel", "scalars")

    def __init__(self, kernel: Any, grid: Grid, scalars: Sequence[Any], options: dict[str, Any] | None = None) -> None:
        self.kernel, self.grid, self.scalars = kernel, grid, tuple(scalars)
        # The compiler must not contract multiplications and additions: kernels call ``fma`` explicitly. Contraction
        # depends on the surrounding code, but the normalized value that a backward recomputes has to equal the
        # forward's bitwise.
        self._options = {**(options or {}), "enable_fp_fusion": False}
        self._direct: dict[int, tuple[DirectLaunch, ...]] = {}  # by device; for absent tensors and dtypes seen so far
        self._pre_run_hooks: Sequence[Any] = getattr(kernel, "pre_run_hooks", ())

    def __call__(self, queue: Queue | None, *tensors: Tensor | None) -> None:
        """Launch asynchronously on the device of the first tensor, on that device's current stream.

        Args:
            queue: :func:`queue_of` a tensor on that device.
            tensors: the first arguments of the kernel; the first one is not None.
        """
        if queue is None:
            self._launch(*tensors)
            return
        device, stream = queue
        known = self._direct.get(device, ())
        if not self._pre_run_hooks:
            for direct in known:
                if direct(stream, *tensors):
                    return
        made = _direct_launch(self._launch(*tensors), self.grid, tensors, self.scalars)
        if made is not None and not self._pre_run_hooks:
            self._direct[device] = (made, *known[: _MAX_DIRECT - 1])

    def _launch(self, *tensors: Tensor | None) -> Any:
        """Launch by the ordinary path; return what it returns, the compiled kernel."""
        if _interceptor is not None:
            return _interceptor(self.kernel, self.grid, (*tensors, *self.scalars), self._options.copy())
        first = tensors[0]
        assert first is not None
        # Triton launches on the current device, which may differ from the tensors' device.
        here = not first.is_cuda or first.get_device() == torch.cuda.current_device()
        with contextlib.nullcontext() if here else torch.cuda.device(first.device):
            return self.kernel[self.grid](*tensors, *self.scalars, **self._options)


def launch(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Launch ``kernel`` by a cached :class:`Launch`.

    Args:
        kernel, grid: as of :class:`Launch`.
        arguments: the arguments by position, the tensors first.
        options: the last arguments by name, then the launch options.
    """
    count = 0
    while arguments[count] is None or isinstance(arguments[count], Tensor):
        count += 1
    tensors = arguments[:count]
    _cached_launch(kernel, grid, arguments[count:], tuple(options.items()))(queue_of(tensors[0]), *tensors)


@lru_cache(maxsize=4096)
def _cached_launch(kernel: Any, grid: Grid, scalars: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> Launch:
    by_name = [value for name, value in options if name in kernel.arg_names]
    return Launch(kernel, grid, (*scalars, *by_name), {k: v for k, v in options if k not in kernel.arg_names})


def _direct_launch(
    compiled: Any, grid: Grid, tensors: Sequence[Tensor | None], scalars: tuple[Any, ...]
) -> DirectLaunch | None:
    """Return a function that launches a compiled kernel for tensors like these, or None if it cannot be called so.

    The tensors must have the same dtypes and be aligned to 16 bytes, for which Triton specialized the kernel.
    """
    if type(compiled) is not CompiledKernel or len(tensors) + len(scalars) != len(compiled.src.fn.arg_names):
        return None
    if any(t is not None and t.data_ptr() % 16 for t in tensors):
        return None
    launcher = compiled.run
    if getattr(launcher, "global_scratch_size", 1) or getattr(launcher, "profile_scratch_size", 1):
        return None
    # The compiled launcher's arguments differ between Triton's versions. A copy of the Python object that calls it
    # shows them.
    probe, calls = copy.copy(launcher), []
    probe.launch = lambda *arguments: calls.append(arguments)
    stream, pointers = object(), [None if t is None else object() for t in tensors]
    size = (*grid, 1, 1)[:3]
    probe(*size, stream, compiled.function, compiled.packed_metadata, None, None, None, *pointers, *scalars)
    (seen,) = calls
    arguments = (*pointers, *scalars)
    nested = seen[-1] == arguments  # one tuple, from Triton 3.7 on
    head = seen[:-1] if nested else seen[: -len(arguments)]
    if seen != (*size, stream, *head[4:], *((arguments,) if nested else arguments)):
        return None
    make = _direct_launch_factory(tuple(t is None for t in tensors), nested)
    dtypes = [t.dtype for t in tensors if t is not None]
    return make(launcher.launch, size, head[4:], scalars, *dtypes)


@cache
def _direct_launch_factory(absent: tuple[bool, ...], nested: bool) -> Callable[..., DirectLaunch]:
    """Return a function of (compiled launcher, grid, fixed arguments, scalars, dtypes) that returns a direct launch.

    Its code is unrolled over the tensors, as Triton unrolls its own binding of arguments: a loop takes twice the time.
    """
    names = [f"t{i}" for i in range(len(absent))]
    given = [name for name, none in zip(names, absent, strict=True) if not none]
    other = [f"{name} is not None" for name, none in zip(names, absent, strict=True) if none]
    other += [f"{name} is None or {name}.dtype is not {name}_dtype" for name in given]
    pointers = "".join(f"{'None' if none else f'{name}_pointer'}, " for name, none in zip(names, absent, strict=True))
    arguments = f"({pointers}*scalars)" if nested else f"{pointers}*scalars"
    source = f"""
def make(launcher, grid, fixed, scalars, {", ".join(f"{name}_dtype" for name in given)}):
    x, y, z = grid
    def direct(stream, {", ".join(names)}):
        if {" or ".join(other)}:
            return False
        {"; ".join(f"{name}_pointer = {name}.data_ptr()" for name in given)}
        if ({" | ".join(f"{name}_pointer" for name in given)}) & 15:
            return False
        launcher(x, y, z, stream, *fixed, {arguments})
        return True
    return direct
"""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    make: Callable[..., DirectLaunch] = namespace["make"]
    return make


@contextlib.contextmanager
def intercept_launches(interceptor: LaunchInterceptor) -> Iterator[None]:
    """Pass every launch in this context to ``interceptor`` instead of running it; tensors may be on the meta device."""
    global _interceptor
    previous, _interceptor = _interceptor, interceptor
    try:
        yield
    finally:
        _interceptor = previous
