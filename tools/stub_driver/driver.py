"""Stand-in for a Triton driver: kernels are compiled, loaded and launched by Triton's own code, and run nowhere.

The driver library ``libcuda.so.1`` is replaced by :file:`libcuda.c`. Everything above it is real: the compiler, the
specialization of arguments, the launcher that Triton compiles, and the packing of kernel parameters. Tensors are on the
CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel

_SOURCE = Path(__file__).with_name("libcuda.c")
_RECORDER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
_BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "fp16": 2, "bf16": 2, "i32": 4, "u32": 4, "fp32": 4}


class Launch(NamedTuple):
    """One kernel launch as the driver library receives it.

    Args:
        kernel: name of the kernel.
        function: handle of the loaded kernel.
        grid: thread blocks in x, y and z.
        threads: threads of a block.
        shared: bytes of dynamic shared memory.
        stream: handle of the stream.
        parameters: the packed bytes of every kernel parameter, including Triton's two scratch pointers.
    """

    kernel: str
    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    parameters: tuple[bytes, ...]


class StandInDriver:
    """A Triton driver of GPUs that do not exist.

    Attributes:
        device: index of the current device; -1 is the device index of CPU tensors.
        stream: handle of the current stream.
    """

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, capability: int) -> None:
        _library()
        self._capability = capability
        self.utils = nvidia.CudaUtils()
        self.device, self.stream = -1, 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Launch]]:
        """Record every launch of this context, in order."""
        launches: list[Launch] = []

        def recorder(function: int, grid: Any, threads: int, shared: int, stream: int, parameters: Any) -> None:
            kernel = _compiled_kernel(function)
            types = [type_ for type_ in kernel.src.signature.values() if type_ != "constexpr"]
            sizes = [_BYTES.get(type_, 8) for type_ in types] + [8, 8]
            packed = tuple(ctypes.string_at(parameters[at], size) for at, size in enumerate(sizes))
            launches.append(Launch(kernel.name, function, tuple(grid[:3]), threads, shared, stream, packed))

        callback = _RECORDER(recorder)
        library = _library()
        library.stub_set_recorder(callback)
        try:
            yield launches
        finally:
            library.stub_set_recorder(_RECORDER())


@functools.cache
def _compiled_kernel(function: int) -> Any:
    """Return Triton's compiled kernel with this function handle."""
    return next(o for o in gc.get_objects() if type(o) is CompiledKernel and o.function == function)


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile and load the stand-in for ``libcuda.so.1``, so that the dynamic linker finds no other one."""
    folder = Path(tempfile.mkdtemp(prefix="stub_driver"))
    library = folder / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    options = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(_SOURCE), "-o", str(library)]
    subprocess.run([os.environ.get("CC", "cc"), *options], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextlib.contextmanager
def use_stand_in_driver(capability: int = 90) -> Iterator[StandInDriver]:
    """Make Triton compile and launch for a stand-in GPU of this compute capability in this context."""
    config = triton.runtime.driver
    previous = config._active  # `active` raises where there is no GPU
    driver = StandInDriver(capability)
    config.set_active(driver)
    try:
        yield driver
    finally:
        config.set_active(previous)
