"""Checks the machine code of every kernel that ships, with no GPU: no spills, and the instructions that the kernels
were written for. All variants for sm_80, and one of each kernel and dtype for sm_90 (wgmma) and sm_100 (tcgen05); `make
test-full` checks all variants for every architecture."""

import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from fused_res import __main__ as command
from fused_res.backends.triton import aot, shipped
from fused_res.backends.triton.kernels import batch_norm_act, convolution, max_pool, pointwise_backward
from fused_res.backends.triton.launch import launch, observed
from tools.ptx import sample_kernels as samples
from tools.ptx.compiled_session import compiled

#: KiB of shared memory that a block may have.
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
#: Pointers to activations and weights. All others are to masks, and to vectors with one value a channel.
LARGE = {
    f"{name}_ptr" for name in ("x", "y", "z", "w", "dx", "dy", "dw", "residual", "dresidual", "into", "grad", "added")
}


@cache
def compiled_for(capability: int, every: bool) -> list[aot.Compiled]:
    """Kernels compiled for one architecture: every variant, or the first of each kernel, dtype and operand prologue."""
    if every:
        return shipped.compile_all(capability)
    launches: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch, observed(lambda *one: launches.append(one)):
        patch.setattr(shipped, "compile_launches", lambda call, capability: call() or [])
        shipped.compile_all(capability)
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


def accesses(one):
    """Pointer, opcode and bytes of every access to global memory."""
    origins: dict[str, set[str]] = {}
    found = set()
    lines = [line for line in one.ptx.splitlines() if "%rd" in line]
    for _ in range(2):  # what a loop carries is known the second time
        for line in lines:
            if parameter := re.search(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
                register, number = parameter[1], int(parameter[2])
                if number < len(one.arguments) and one.arguments[number].type[0] == "*":
                    origins[register] = {one.arguments[number].name}
            elif access := re.search(r"(ld|st)\.global\S*?(?:\.v(\d))?\.\w(\d+) .*\[ (%rd\d+)", line):
                size = int(access[2] or 1) * int(access[3]) // 8
                found |= {(name, access[1], size) for name in origins.get(access[4], ())}
            elif access := re.search(r"(cp\.async)\.c\w\.shared\.global .*\[ (%rd\d+) [^]]*\], (\w+)", line):
                found |= {(name, access[1], int(access[3], 0)) for name in origins.get(access[2], ())}
            elif computed := re.search(r"\t(?!ld|st|cp)\S+\s*\t(%rd\d+), (.*)", line):
                sources = (origins.get(register, set()) for register in re.findall(r"%rd\d+", computed[2]))
                origins[computed[1]] = origins.get(computed[1], set()).union(*sources)
    return found


def narrow(one):
    """Accesses to large tensors that are less than 16 bytes wide."""
    return [f"{kind} of {size} bytes at {name}" for name, kind, size in accesses(one) if name in LARGE and size < 16]


def aligned(one):
    """Whether every row of the large tensors begins at a multiple of 16 bytes."""
    rows = {"cols"} if "cols" in {argument.name for argument in one.arguments} else {"channels", "out_channels"}
    return all(argument.divisible for argument in one.arguments if argument.name in rows)


def complaints(one):
    """What is wrong with a compilation."""
    if one.stack or one.spills:
        yield f"{one.stack} bytes of stack, {one.spills} spills"
    # sm_120 runs the same mma.sync pipeline as sm_80 in less shared memory.
    if one.shared > (SHARED[120] if one.capability == 80 else SHARED[one.capability]) << 10:
        yield f"{one.shared / 1024:.1f} KiB of shared memory"
    half = any(argument.type in ("*bf16", "*fp16") for argument in one.arguments)
    product = "PRECISION" in one.constants
    if product and half and one.matrix_instructions != (MATRIX[one.capability],):
        yield f"matrix instructions: {one.matrix_instructions}"
    if "pool" not in one.name and (half or not product) and aligned(one):
        yield from narrow(one)


@compiled
@pytest.mark.parametrize(
    ("capability", "every"),
    [
        (80, True),
        (90, False),
        (100, False),
        *(pytest.param(capability, True, marks=pytest.mark.full) for capability in (90, 100, 120)),
    ],
)
def test_every_kernel_that_ships(capability, every):
    made = compiled_for(capability, every)
    assert len(made) > (100 if every else 25)
    wrong = [f"{one.name} {one.variant}: {what}" for one in made for what in complaints(one)]
    assert not wrong, "\n".join(wrong)


@compiled
def test_what_ships():
    """Nothing twice, no kernel and no type is missing, and the checks above have something to look at."""
    made = compiled_for(80, True)
    assert len({(one.name, one.variant, one.warps, one.stages) for one in made}) == len(made)
    assert {one.name for one in made} == {
        name
        for module in (batch_norm_act, convolution, max_pool, pointwise_backward)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }
    assert {"*bf16", "*fp16", "*fp32", "*u8"} <= {argument.type for one in made for argument in one.arguments}
    for one in made:
        stored = {name for name, kind, _ in accesses(one) if kind == "st"}
        loaded = {name for name, kind, _ in accesses(one) if kind != "st"}
        written = {"y_ptr", "dx_ptr", "dresidual_ptr", "dw_ptr", "into_ptr"} & {a.name for a in one.arguments}
        assert stored >= written and stored and loaded, one.variant
    assert sum(aligned(one) and any(name in LARGE for name, _, _ in accesses(one)) for one in made) > 100
    assert any(one.arguments and not aligned(one) and list(narrow(one)) for one in made)


@compiled
def test_a_kernel_that_spills_is_caught():
    a = torch.empty((128, 128), dtype=torch.bfloat16, device="meta")

    def spilling():
        launch(samples.matmul_kernel, (1, 1), a, a, a, 128, 128, 128, 128, 128, 32, num_warps=1)

    (one,) = aot.compile_launches(spilling, 80)
    assert any("bytes of stack" in complaint for complaint in complaints(one))


@compiled
def test_the_command_prints_a_table_and_writes_ptx(tmp_path, monkeypatch, capsys):
    made = aot.compile_launches(lambda: samples.add(*[torch.empty(4096, device="meta")] * 2), 90)
    monkeypatch.setattr(shipped, "compile_all", lambda capability: made)
    command.main(["kernels", "--sm", "90", "--ptx", str(tmp_path / "code")])
    printed = capsys.readouterr().out
    assert "sm_90: 1 kernels" in printed and "none with a stack" in printed and "add_kernel" in printed
    (file,) = (tmp_path / "code").iterdir()
    assert file.name == "sm_90_001_add_kernel.ptx" and ".target sm_90" in file.read_text()


def test_the_command_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="1"):
        command.main(["kernels"])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    without = "import sys; sys.modules['triton'] = None; from fused_res.__main__ import main; main(['kernels'])"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "pip install triton" in done.stderr
