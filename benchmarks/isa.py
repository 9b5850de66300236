"""Holding everybody in a process to one instruction set: these variables are read when libraries load, so the process
that measures is started with them."""

from collections.abc import Mapping

import torch

#: ONEDNN_MAX_CPU_ISA holds oneDNN in PyTorch and in OpenVINO (of ResNet-18 every convolution then is brgconv_avx2_f32
#: instead of brgconv_avx512_f32), OV_CPU_MAX_ISA OpenVINO's own kernels, ATEN_CPU_CAPABILITY ATen's and Inductor's.
#: Not held: the last layer's product, which is MKL's in PyTorch and MLAS's in OpenVINO.
SETTINGS = {
    isa: {"FUSED_RES_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": isa, "ONEDNN_MAX_CPU_ISA": onednn, "OV_CPU_MAX_ISA": onednn}
    for isa, onednn in (("avx2", "AVX2"), ("avx512", "AVX512_CORE_BF16"))
}
VARIABLES = tuple(SETTINGS["avx2"])


def environment_for(isa: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with the variables of `isa`; None leaves them as they are."""
    return {**environment, **SETTINGS[isa]} if isa else dict(environment)


def check(isa: str | None, device: str) -> None:
    """In the process that is not held to it yet: what the processor lacks would end the other one by a signal."""
    if isa is None:
        return
    if device != "cpu":
        raise SystemExit(f"--isa {isa}: needs --device cpu")
    has = torch.backends.cpu.get_cpu_capability().lower()
    if not has.startswith((isa, "avx512")):
        raise SystemExit(f"--isa {isa}: PyTorch finds no more than {has} here")
