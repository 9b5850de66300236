"""Restricts all providers of a process to one instruction set (ISA).

The libraries read these environment variables when they are loaded, so the measuring process is started with them.
"""

from collections.abc import Mapping

import torch

#: ONEDNN_MAX_CPU_ISA restricts oneDNN in PyTorch and in OpenVINO (every convolution of ResNet-18 then runs as
#: brgconv_avx2_f32 instead of brgconv_avx512_f32), OV_CPU_MAX_ISA OpenVINO's own kernels, ATEN_CPU_CAPABILITY the
#: kernels of ATen and Inductor. The GEMM of the last layer is not restricted: PyTorch runs it in MKL, OpenVINO in MLAS.
SETTINGS = {
    isa: {"FUSED_RES_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": isa, "ONEDNN_MAX_CPU_ISA": onednn, "OV_CPU_MAX_ISA": onednn}
    for isa, onednn in (("avx2", "AVX2"), ("avx512", "AVX512_CORE_BF16"))
}
VARIABLES = tuple(SETTINGS["avx2"])


def environment_for(isa: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with the variables of `isa`, or unchanged if it is None."""
    return {**environment, **SETTINGS[isa]} if isa else dict(environment)


def check(isa: str | None, device: str) -> None:
    """Exit with a message if `isa` is not available here.

    This runs in the parent process, which is not restricted: in the restricted one, an instruction that the processor
    does not support would end the process with a signal.
    """
    if isa is None:
        return
    if device != "cpu":
        raise SystemExit(f"--isa {isa}: needs --device cpu")
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if not capability.startswith((isa, "avx512")):
        raise SystemExit(f"--isa {isa}: not supported here, PyTorch detects {capability}")
