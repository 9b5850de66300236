"""Every environment variable that fused_res reads: its values, its default and what it does.

Only the standard library is imported here, because setup.py runs this file before anything is installed.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """Unset or empty means the default; a value that is not in `allowed` (if empty: a whole number) is an error."""

    name: str
    default: str
    allowed: tuple[str, ...]
    doc: str
    path: bool = False  # of a file: any text

    def read(self, environ: Mapping[str, str] = os.environ) -> str:
        value = environ.get(self.name, "").strip() or self.default
        if self.path:
            return value
        value = value.lower()
        if not self.allowed and not (value.isascii() and value.isdigit()):
            raise ValueError(f"{self.name}={value!r} is not a known value: use a whole number, 0 or more")
        if self.allowed and value not in self.allowed:
            raise ValueError(f"{self.name}={value!r} is not a known value: use one of {', '.join(self.allowed)}")
        return value


BACKEND = Variable(
    "FUSED_RES_BACKEND",
    default="auto",
    allowed=("auto", "reference", "cpu", "triton", "cuda"),
    doc='what backend="auto" means; auto is the fastest one available',
)
CONVOLUTION = Variable(
    "FUSED_RES_CONVOLUTION",
    default="auto",
    allowed=("auto", "planned", "aten", "fused"),
    doc="algorithms of convolutions: planned, ATen's alone, fused if supported; auto is fused for a named GPU backend",
)
WINOGRAD = Variable(
    "FUSED_RES_WINOGRAD",
    default="auto",
    allowed=("auto", "0"),
    doc="0: no convolution by Winograd's algorithm on the CPU; it is faster, and off by up to 3e-6 of the output",
)
CPU_ISA = Variable(
    "FUSED_RES_CPU_ISA",
    default="auto",
    allowed=("auto", "baseline", "avx2", "avx512"),
    doc="instruction set of the C++ kernels; auto is the widest one that this machine has",
)
CPU_CACHE = Variable(
    "FUSED_RES_CPU_CACHE",
    default="256",
    allowed=(),
    doc="MB of freed outputs that the C++ kernels keep for their next ones, as malloc keeps small ones; 0 keeps none",
)
CPP = Variable(
    "FUSED_RES_CPP",
    default="auto",
    allowed=("auto", "0", "1"),
    doc="at installation: 0 leaves the C++ extension out, 1 insists on it, auto does what it can",
)
CUDA = Variable(
    "FUSED_RES_CUDA",
    default="auto",
    allowed=("auto", "0", "1"),
    doc="at installation: 0 leaves the CUDA C++ kernels out, 1 insists on them, auto builds them where torch and nvcc"
    " have CUDA of one major version; TORCH_CUDA_ARCH_LIST and CUDA_HOME mean what they mean to torch",
)
SIMULATOR = Variable(
    "FUSED_RES_SIMULATOR",
    default="",
    allowed=(),
    doc="for tests: a library of the CUDA kernels compiled for the CPU, which then are backend cuda (tools/cuda_sim)",
    path=True,
)
VARIABLES = (BACKEND, CONVOLUTION, WINOGRAD, CPU_ISA, CPU_CACHE, CPP, CUDA, SIMULATOR)


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raise for a bad value; warn of an unknown name with our prefix, most likely a typing error."""
    for variable in VARIABLES:
        variable.read(environ)
    known = [variable.name for variable in VARIABLES]
    for name in sorted(environ):
        if name.startswith("FUSED_RES_") and name not in known:
            warnings.warn(f"{name} does nothing: fused_res knows {', '.join(known)}", stacklevel=3)


check()
