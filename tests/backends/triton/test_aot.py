"""Ahead-of-time compilation without a GPU: specialization, and the reports on the compiled kernels."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from fused_res.backends.triton import aot
from tools.ptx import sample_kernels
from tools.ptx.compiled_session import needs_compiled_triton


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@needs_compiled_triton
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_matmul_report(capability):
    before = triton.runtime.driver._active

    def call():
        for _ in range(2):
            sample_kernels.matmul(meta(128, 256), meta(256, 64))

    (report,) = aot.compile_launches(call, capability)
    assert (report.name, report.capability, report.warps) == ("matmul_kernel", capability, 4)
    assert report.constants == {"BM": 64, "BN": 64, "BK": 32}
    assert [argument.name for argument in report.arguments] == ["a_ptr", "b_ptr", "c_ptr", "M", "N", "K"]
    assert {argument.type for argument in report.arguments} == {"*bf16", "i32"}
    assert all(argument.divisible for argument in report.arguments)
    assert report.tensor_core_instructions == ({90: "wgmma", 100: "tcgen05"}.get(capability, "mma.sync"),)
    assert all(size == 16 for _, size in report.global_accesses)
    assert {"cp.async", "st"} <= {kind for kind, _ in report.global_accesses}
    assert 32 <= report.registers <= 255 and report.shared >= 2 * 2 * 64 * 32 * 2
    assert f".target sm_{capability}" in report.ptx
    assert triton.runtime.driver._active is before


@needs_compiled_triton
def test_arguments_are_specialized():
    def variants(*calls):
        return [[*aot.compile_launches(call, 80)] for call in calls]

    aligned, odd, shifted, single, large = variants(
        lambda: sample_kernels.add(meta(4096), meta(4096)),
        lambda: sample_kernels.add(meta(4095), meta(4095)),
        lambda: sample_kernels.add(meta(4097)[1:], meta(4096)),
        lambda: sample_kernels.add(meta(1), meta(1)),
        lambda: sample_kernels.add(meta(2**31), meta(2**31)),
    )
    assert aligned[0].arguments[3] == ("n", "i32", True) and odd[0].arguments[3] == ("n", "i32", False)
    assert aligned[0].arguments[0].divisible and not shifted[0].arguments[0].divisible
    assert single[0].constants == {"n": 1, "BLOCK": 1024} and len(single[0].arguments) == 3
    assert large[0].arguments[3] == ("n", "i64", True)
    assert aligned[0].global_accesses == {("ld", 16): 2, ("st", 16): 1}
    assert shifted[0].global_accesses["ld", 2] == 8
    assert len({repr(report.variant) for (report,) in (aligned, odd, shifted, single, large)}) == 5


@needs_compiled_triton
def test_table_has_a_line_per_kernel():
    def call():
        sample_kernels.matmul(meta(128, 256), meta(256, 64))
        sample_kernels.add(meta(4096), meta(4096))

    lines = aot.table(aot.compile_launches(call, 80)).splitlines()
    assert len(lines) == 3 and lines[0].startswith("kernel")
    assert "mma.sync" in lines[1] and "ld 2/2, st 1/1" in lines[2]


def make_report(**changes):
    values = {
        **{"name": "k", "constants": {}, "arguments": (), "capability": 80, "warps": 4, "stages": 3},
        **{"registers": 32, "stack": 0, "local_accesses": 0, "shared": 0, "ptx": ""},
    }
    return aot.KernelReport(**values | changes)


def test_occupancy_matches_nvidia_calculator():
    assert make_report().occupancy == 1
    assert make_report(registers=255).occupancy == 8 / 64  # 2 blocks: 2 warps on each scheduler
    assert make_report(registers=40).occupancy == 48 / 64
    assert make_report(registers=33, warps=8).occupancy == 48 / 64
    assert make_report(shared=48 << 10).occupancy == 3 * 4 / 64
    assert make_report(shared=48 << 10, capability=90).occupancy == 4 * 4 / 64
    assert make_report(shared=48 << 10, capability=120).occupancy == 2 * 4 / 48
    assert make_report(warps=1).occupancy == 32 / 64  # limited by resident blocks
    assert make_report(capability=120, warps=1).occupancy == 24 / 48


def test_compile_under_interpreter_raises():
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles kernels in this session")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_launches(lambda: sample_kernels.add(meta(16), meta(16)), 80)


def test_unknown_capability_raises():
    with pytest.raises(ValueError, match="80, 90, 100, 120"):
        aot.compile_launches(lambda: None, 75)
