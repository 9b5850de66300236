"""The environment variables of fused_res: allowed values, defaults and descriptions.

This module imports only the standard library, because setup.py runs it before anything is installed.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable; if it is unset or empty, it has its default value.

    Args:
        allowed: allowed values, in lower case; empty for a non-negative integer.
        doc: description for `python -m fused_res info` and the documentation.
        path: the value is a path, which is not validated.
        sizes: the value may also be this many sizes, see :func:`parse_sizes`.
    """

    name: str
    default: str
    allowed: tuple[str, ...]
    doc: str
    path: bool = False
    sizes: int = 0

    def read(self, environ: Mapping[str, str] = os.environ) -> str:
        """Return the variable's value; raise ValueError if it is not allowed."""
        value = environ.get(self.name, "").strip() or self.default
        if self.path:
            return value
        value = value.lower()
        if not self.allowed and not (value.isascii() and value.isdigit()):
            raise ValueError(f"{self.name}={value!r} is not a known value: use a non-negative integer")
        if self.allowed and value not in self.allowed:
            if self.sizes and len(parse_sizes(value)) == self.sizes:
                return value
            alternative = f", or {self.sizes} sizes such as {_SIZES_EXAMPLE}" if self.sizes else ""
            names = ", ".join(self.allowed)
            raise ValueError(f"{self.name}={value!r} is not a known value: use one of {names}{alternative}")
        return value


_SIZES_EXAMPLE = "48K,2M,300M"


def parse_sizes(text: str) -> tuple[int, ...]:
    """Return the bytes of sizes such as ``48K,2M,300M`` (powers of 1024), or an empty tuple if one is not valid.

    A size is a positive integer below 10**9 with an optional suffix K, M or G.
    """
    matches = [re.fullmatch(r"([0-9]{1,9})([kmg]?)", size.strip().lower()) for size in text.split(",")]
    sizes = [int(match[1]) << 10 * " kmg".index(match[2] or " ") for match in matches if match]
    return tuple(sizes) if len(sizes) == len(matches) and all(sizes) else ()


ENABLED = Variable(
    "FUSED_RES",
    default="1",
    allowed=("1", "0"),
    doc="0 makes fused, frozen and fused_res.nn modules compute with stock PyTorch operators, without a change of code;"
    " read when fused_res is imported. Functions of fused_res.functional that are called directly are not affected",
)
BACKEND = Variable(
    "FUSED_RES_BACKEND",
    default="auto",
    allowed=("auto", "reference", "cpu", "triton", "cuda"),
    doc='backend that backend="auto" selects; auto is the fastest one available',
)
CONVOLUTION = Variable(
    "FUSED_RES_CONVOLUTION",
    default="planned",
    allowed=("planned", "aten", "fused"),
    doc="selection of convolution algorithms: planned by heuristics, aten only, or fused wherever supported, which is"
    " for tests and benchmarks",
)
WINOGRAD = Variable(
    "FUSED_RES_WINOGRAD",
    default="auto",
    allowed=("auto", "0"),
    doc="0 disables Winograd convolution on the CPU, which is faster but has errors of up to 3e-6 of the output",
)
CPU_ISA = Variable(
    "FUSED_RES_CPU_ISA",
    default="auto",
    allowed=("auto", "baseline", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"),
    doc="instruction set of the C++ kernels; auto is the widest one that the processor supports",
)
CPU_CACHE = Variable(
    "FUSED_RES_CPU_CACHE",
    default="4096",
    allowed=(),
    doc="capacity in MiB of the C++ kernels' cache of freed output buffers, which later outputs reuse, and which holds"
    " no more than were in use at once; 0 disables it",
)
CPU_CACHES = Variable(
    "FUSED_RES_CPU_CACHES",
    default="auto",
    allowed=("auto",),
    doc="sizes of the L1 data cache and the L2 of a core, and of the L3 that it uses, such as 48K,2M,300M, from which"
    " block sizes, streaming stores and algorithms are chosen; auto is what the processor reports",
    sizes=3,
)
SINGLE_PASS = Variable(
    "FUSED_RES_SINGLE_PASS",
    default="0",
    allowed=("0", "1", "auto"),
    doc="batch norm training in one cooperative kernel per direction, backend cuda: 1 wherever it is possible, auto for"
    " small activations; the results are bitwise equal",
)
CPP = Variable(
    "FUSED_RES_CPP",
    default="auto",
    allowed=("auto", "0", "1"),
    doc="at installation: 0 omits the C++ extension, 1 requires it, auto builds it if possible",
)
CUDA = Variable(
    "FUSED_RES_CUDA",
    default="auto",
    allowed=("auto", "0", "1"),
    doc="at installation: 0 omits the CUDA C++ kernels, 1 requires them, auto builds them if torch and nvcc have the"
    " same major version of CUDA; TORCH_CUDA_ARCH_LIST and CUDA_HOME have the same meaning as for torch",
)
SIMULATOR = Variable(
    "FUSED_RES_SIMULATOR",
    default="",
    allowed=(),
    doc="for tests: library of the CUDA kernels compiled for the CPU (tools/cuda_sim), which implements backend cuda",
    path=True,
)
VARIABLES = (ENABLED, BACKEND, CONVOLUTION, WINOGRAD, CPU_ISA, CPU_CACHE, CPU_CACHES, SINGLE_PASS, CPP, CUDA, SIMULATOR)


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError for a value that is not allowed; warn of unknown names with the prefix ``FUSED_RES_``."""
    for variable in VARIABLES:
        variable.read(environ)
    known = [variable.name for variable in VARIABLES]
    for name in sorted(environ):
        if name.startswith("FUSED_RES_") and name not in known:
            warnings.warn(f"{name} has no effect: the variables are {', '.join(known)}", stacklevel=3)


check()
