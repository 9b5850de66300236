"""Ahead-of-time compilation without a GPU: specialisation, and what is read from the compiler's output."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from fused_res.backends.triton import aot
from tools.ptx import sample_kernels as samples
from tools.ptx.compiled_session import compiled


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_matmul(capability):
    before = triton.runtime.driver._active

    def call():
        for _ in range(2):
            samples.matmul(meta(128, 256), meta(256, 64))

    (one,) = aot.compile_launches(call, capability)
    assert (one.name, one.capability, one.warps) == ("matmul_kernel", capability, 4)
    assert one.constants == {"BM": 64, "BN": 64, "BK": 32}
    assert [argument.name for argument in one.arguments] == ["a_ptr", "b_ptr", "c_ptr", "M", "N", "K"]
    assert {argument.type for argument in one.arguments} == {"*bf16", "i32"}
    assert all(argument.divisible for argument in one.arguments)
    assert one.matrix_instructions == ({90: "wgmma", 100: "tcgen05"}.get(capability, "mma.sync"),)
    assert all(size == 16 for _, size in one.accesses)
    assert {"cp.async", "st"} <= {kind for kind, _ in one.accesses}
    assert 32 <= one.registers <= 255 and one.shared >= 2 * 2 * 64 * 32 * 2
    assert f".target sm_{capability}" in one.ptx
    assert triton.runtime.driver._active is before


@compiled
def test_specialisation():
    def variants(*calls):
        return [[*aot.compile_launches(call, 80)] for call in calls]

    aligned, odd, shifted, one, large = variants(
        lambda: samples.add(meta(4096), meta(4096)),
        lambda: samples.add(meta(4095), meta(4095)),
        lambda: samples.add(meta(4097)[1:], meta(4096)),
        lambda: samples.add(meta(1), meta(1)),
        lambda: samples.add(meta(2**31), meta(2**31)),
    )
    assert aligned[0].arguments[3] == ("n", "i32", True) and odd[0].arguments[3] == ("n", "i32", False)
    assert aligned[0].arguments[0].divisible and not shifted[0].arguments[0].divisible
    assert one[0].constants == {"n": 1, "BLOCK": 1024} and len(one[0].arguments) == 3
    assert large[0].arguments[3] == ("n", "i64", True)
    assert aligned[0].accesses == {("ld", 16): 2, ("st", 16): 1}
    assert shifted[0].accesses["ld", 2] == 8
    assert len({repr(one.variant) for (one,) in (aligned, odd, shifted, one, large)}) == 5


@compiled
def test_table():
    def call():
        samples.matmul(meta(128, 256), meta(256, 64))
        samples.add(meta(4096), meta(4096))

    lines = aot.table(aot.compile_launches(call, 80)).splitlines()
    assert len(lines) == 3 and lines[0].startswith("kernel")
    assert "mma.sync" in lines[1] and "ld 2/2, st 1/1" in lines[2]


def example(**changes):
    values = {
        **{"name": "k", "constants": {}, "arguments": (), "capability": 80, "warps": 4, "stages": 3},
        **{"registers": 32, "stack": 0, "spills": 0, "shared": 0, "ptx": ""},
    }
    return aot.Compiled(**values | changes)


def test_occupancy():
    """Against NVIDIA's occupancy calculator."""
    assert example().occupancy == 1
    assert example(registers=255).occupancy == 8 / 64  # 2 blocks: 2 warps on each scheduler
    assert example(registers=40).occupancy == 48 / 64
    assert example(registers=33, warps=8).occupancy == 48 / 64
    assert example(shared=48 << 10).occupancy == 3 * 4 / 64
    assert example(shared=48 << 10, capability=90).occupancy == 4 * 4 / 64
    assert example(shared=48 << 10, capability=120).occupancy == 2 * 4 / 48
    assert example(warps=1).occupancy == 32 / 64  # blocks
    assert example(capability=120, warps=1).occupancy == 24 / 48


def test_refuses_the_interpreter():
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_launches(lambda: samples.add(meta(16), meta(16)), 80)


def test_refuses_an_unknown_capability():
    with pytest.raises(ValueError, match="80, 90, 100, 120"):
        aot.compile_launches(lambda: None, 75)
