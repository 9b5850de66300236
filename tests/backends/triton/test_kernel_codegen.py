"""Checks on the PTX and the ptxas report of every kernel in the AOT manifest, without a GPU: spills, shared memory,
tensor core instructions and vectorized global accesses.

All variants are compiled for sm_80, and one of each kernel and dtype for sm_90 (wgmma) and sm_100 (tcgen05);
`make test-full` checks all variants for every architecture.
"""

import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from fused_res import __main__ as command
from fused_res.backends.triton import aot, aot_manifest
from fused_res.backends.triton.kernels import batch_norm_act, channel_vectors, conv1x1_backward, convolution, max_pool
from fused_res.backends.triton.launch import intercept_launches, launch
from tools.ptx import sample_kernels
from tools.ptx.compiled_session import needs_compiled_triton

#: KiB of shared memory available to a thread block, by compute capability.
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
TENSOR_CORE_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
#: Pointers to activations and weights; all other pointers are to masks and to per-channel vectors.
TENSOR_POINTERS = {
    f"{name}_ptr"
    for name in ("x", "y", "z", "w", "dx", "dy", "dw", "residual", "dresidual", "into", "grad", "shortcut_grad")
}


@cache
def compile_manifest(capability: int, every: bool) -> list[aot.KernelReport]:
    """Compile the manifest for one architecture: every variant, or the first of each kernel, dtype and prologue."""
    if every:
        return aot_manifest.compile_all(capability)
    launches: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch, intercept_launches(lambda *launched: launches.append(launched)):
        patch.setattr(aot_manifest, "compile_launches", lambda call, capability: call() or [])
        aot_manifest.compile_all(capability)
    first: dict[tuple, tuple] = {}
    for kernel, grid, arguments, options in launches:
        dtype = next(argument.dtype for argument in arguments if isinstance(argument, torch.Tensor))
        named = kernel.signature.bind(
            *arguments, **{k: v for k, v in options.items() if k in kernel.arg_names}
        ).arguments
        kind = kernel.__name__, dtype, *(named.get(name) for name in ("PRECISION", "INPUT_RELU"))
        first.setdefault(kind, (kernel, grid, arguments, options))

    def call() -> None:
        for kernel, grid, arguments, options in first.values():
            launch(kernel, grid, *arguments, **options)

    return aot.compile_launches(call, capability)


def find_accesses(report):
    """Return pointer argument, opcode and bytes of every global memory access in the PTX."""
    origins: dict[str, set[str]] = {}
    found = set()
    lines = [line for line in report.ptx.splitlines() if "%rd" in line]
    for _ in range(2):  # the second pass resolves loop-carried pointers
        for line in lines:
            if parameter := re.search(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
                register, number = parameter[1], int(parameter[2])
                if number < len(report.arguments) and report.arguments[number].type[0] == "*":
                    origins[register] = {report.arguments[number].name}
            elif access := re.search(r"(ld|st)\.global\S*?(?:\.v(\d))?\.\w(\d+) .*\[ (%rd\d+)", line):
                size = int(access[2] or 1) * int(access[3]) // 8
                found |= {(name, access[1], size) for name in origins.get(access[4], ())}
            elif access := re.search(r"(cp\.async)\.c\w\.shared\.global .*\[ (%rd\d+) [^]]*\], (\w+)", line):
                found |= {(name, access[1], int(access[3], 0)) for name in origins.get(access[2], ())}
            elif computed := re.search(r"\t(?!ld|st|cp)\S+\s*\t(%rd\d+), (.*)", line):
                sources = (origins.get(register, set()) for register in re.findall(r"%rd\d+", computed[2]))
                origins[computed[1]] = origins.get(computed[1], set()).union(*sources)
    return found


def find_narrow_accesses(report):
    """Return descriptions of accesses to activations and weights that are less than 16 bytes wide."""
    return [
        f"{kind} of {size} bytes at {name}"
        for name, kind, size in find_accesses(report)
        if name in TENSOR_POINTERS and size < 16
    ]


def has_aligned_rows(report):
    """Return whether every row of the activations and weights begins at a multiple of 16 bytes."""
    rows = {"cols"} if "cols" in {argument.name for argument in report.arguments} else {"channels", "out_channels"}
    return all(argument.divisible for argument in report.arguments if argument.name in rows)


def find_violations(report):
    """Yield a description of each violation of the code generation requirements."""
    if report.stack or report.local_accesses:
        yield f"{report.stack} bytes of stack, {report.local_accesses} local memory accesses"
    # sm_120 has the mma.sync pipeline of sm_80 and less shared memory, so sm_80 code must fit its limit.
    if report.shared > (SHARED_KIB[120] if report.capability == 80 else SHARED_KIB[report.capability]) << 10:
        yield f"{report.shared / 1024:.1f} KiB of shared memory"
    is_half = any(argument.type in ("*bf16", "*fp16") for argument in report.arguments)
    is_gemm = "PRECISION" in report.constants
    if is_gemm and is_half and report.tensor_core_instructions != (TENSOR_CORE_INSTRUCTIONS[report.capability],):
        yield f"tensor core instructions: {report.tensor_core_instructions}"
    if "pool" not in report.name and (is_half or not is_gemm) and has_aligned_rows(report):
        yield from find_narrow_accesses(report)


@needs_compiled_triton
@pytest.mark.parametrize(
    ("capability", "every"),
    [
        (80, True),
        (90, False),
        (100, False),
        *(pytest.param(capability, True, marks=pytest.mark.full) for capability in (90, 100, 120)),
    ],
)
def test_manifest_kernels_have_no_violations(capability, every):
    reports = compile_manifest(capability, every)
    assert len(reports) > (100 if every else 25)
    violations = [
        f"{report.name} {report.variant}: {violation}" for report in reports for violation in find_violations(report)
    ]
    assert not violations, "\n".join(violations)


@needs_compiled_triton
def test_manifest_is_complete():
    """No variant occurs twice, every kernel and dtype occurs, and the checks above find the accesses they examine."""
    reports = compile_manifest(80, True)
    assert len({(report.name, report.variant, report.warps, report.stages) for report in reports}) == len(reports)
    assert {report.name for report in reports} == {
        name
        for module in (batch_norm_act, channel_vectors, convolution, max_pool, conv1x1_backward)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }
    assert {"*bf16", "*fp16", "*fp32", "*u8"} <= {argument.type for report in reports for argument in report.arguments}
    for report in reports:
        stored = {name for name, kind, _ in find_accesses(report) if kind == "st"}
        loaded = {name for name, kind, _ in find_accesses(report) if kind != "st"}
        written = {"y_ptr", "dx_ptr", "dresidual_ptr", "dw_ptr", "into_ptr"} & {a.name for a in report.arguments}
        assert stored >= written and stored and loaded, report.variant
    assert (
        sum(
            has_aligned_rows(report) and any(name in TENSOR_POINTERS for name, _, _ in find_accesses(report))
            for report in reports
        )
        > 100
    )
    assert any(
        report.arguments and not has_aligned_rows(report) and list(find_narrow_accesses(report)) for report in reports
    )


@needs_compiled_triton
def test_spilling_kernel_is_detected():
    a = torch.empty((128, 128), dtype=torch.bfloat16, device="meta")

    def spilling():
        launch(sample_kernels.matmul_kernel, (1, 1), a, a, a, 128, 128, 128, 128, 128, 32, num_warps=1)

    (report,) = aot.compile_launches(spilling, 80)
    assert any("bytes of stack" in violation for violation in find_violations(report))


@needs_compiled_triton
def test_kernels_command_prints_table_and_writes_ptx(tmp_path, monkeypatch, capsys):
    reports = aot.compile_launches(lambda: sample_kernels.add(*[torch.empty(4096, device="meta")] * 2), 90)
    monkeypatch.setattr(aot_manifest, "compile_all", lambda capability: reports)
    command.main(["kernels", "--sm", "90", "--ptx", str(tmp_path / "code")])
    printed = capsys.readouterr().out
    assert "sm_90: 1 kernels" in printed and "none with a stack frame" in printed and "add_kernel" in printed
    (file,) = (tmp_path / "code").iterdir()
    assert file.name == "sm_90_001_add_kernel.ptx" and ".target sm_90" in file.read_text()


def test_kernels_command_reports_missing_requirements(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="1"):
        command.main(["kernels"])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    without = "import sys; sys.modules['triton'] = None; from fused_res.__main__ import main; main(['kernels'])"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "pip install triton" in done.stderr
