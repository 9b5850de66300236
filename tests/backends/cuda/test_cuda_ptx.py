"""PTX that nvcc generates for the CUDA kernels, run by the PTX interpreter (``tools/ptx``) under the real host code.

The result of each operator must match float64 within a tolerance, and the simulator (``tools/cuda_sim``) bitwise; other
tests compare the simulator with float64 at many more shapes. Deliberate errors in the PTX must be detected.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_res
from fused_res.backends import cuda, registry
from fused_res.backends.reference import batch_norm_act as norm
from fused_res.backends.reference import batch_norm_sync as norm_sync

if not cuda.is_simulated():
    pytest.skip("the CUDA kernels are not simulated here", allow_module_level=True)

from tools.cuda_sim.simulator import load_simulator
from tools.ptx import machine, nvcc_runner
from tools.ptx.memory import Fault
from tools.ptx.nvcc_runner import interpret_cuda_launches

if nvcc_runner.NVCC is None:
    pytest.skip("nvcc not found", allow_module_level=True)

CPU = torch.device("cpu")
NHWC, NCHW = torch.channels_last, torch.contiguous_format
#: Relative to the largest value. A kernel that rounds operands to 16 bits has larger errors than float32 accumulation.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TF32 = 4e-3

Make = Callable[[], Sequence[Any]]


def tensors(*values: Any) -> list[torch.Tensor]:
    flat = (one for value in values for one in (value if isinstance(value, (list, tuple)) else (value,)))
    return [one for one in flat if isinstance(one, torch.Tensor)]


def to_float64(values: Sequence[Any]) -> list[Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return [convert(value) for value in values]


def results(backend: str, name: str, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Return the outputs of an operator followed by its arguments, which it may modify in place."""
    returned = getattr(registry.resolve(backend, CPU), name)(*arguments)
    return tensors(returned) + tensors(*arguments)


def interpreted(
    name: str, make: Make, schedule: int = 0, edit: Callable[[str], str] = str
) -> tuple[list[torch.Tensor], list[nvcc_runner.Launch]]:
    with interpret_cuda_launches(schedule, edit=edit) as launches:
        found = results("cuda", name, make())
    return found, launches


def assert_exact(name: str, make: Make, ours: list[torch.Tensor], tolerance: float) -> None:
    for index, (one, exact) in enumerate(zip(ours, results("reference", name, to_float64(make())), strict=True)):
        assert one.shape == exact.shape, f"{name}, {index}"
        if not one.is_floating_point():
            assert torch.equal(one, exact), f"{name}, {index}"
        elif one.numel():
            error = (one.double() - exact).abs().max()
            assert error <= tolerance * exact.abs().max(), f"{name}, {index}: {error:.3g} of {exact.abs().max():.3g}"


def check(name: str, make: Make, tolerance: float, schedule: int = 0) -> list[nvcc_runner.Launch]:
    """Compare the interpreted PTX of operator ``name`` bitwise with the simulator, and with the float64 reference.

    ``make`` returns equal arguments on every call: each execution needs tensors of its own, in memory that its
    kernels may access.
    """
    ours, launches = interpreted(name, make, schedule)
    assert launches
    with load_simulator().guard_allocations():
        from_simulator = results("cuda", name, make())
    for index, (one, other) in enumerate(zip(ours, from_simulator, strict=True)):
        torch.testing.assert_close(
            one, other, rtol=0, atol=0, equal_nan=True, msg=f"{name}, {index}, against the simulator"
        )
    assert_exact(name, make, ours, tolerance)
    return launches


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


# --- norms --------------------------------------------------------------------------------------------------

NORMS = [  # aligned and unaligned, several parts and channel blocks
    ((2, 72, 9, 11), NHWC, torch.bfloat16),
    ((3, 35, 5, 3), NHWC, torch.float32),
    ((3, 3, 17, 19), NCHW, torch.bfloat16),
    ((2, 3, 16, 8), NCHW, torch.float16),
]
norms = pytest.mark.parametrize(("shape", "format", "dtype"), NORMS, ids=str)


def norm_case(shape: tuple[int, ...], format: torch.memory_format, dtype: torch.dtype) -> SimpleNamespace:
    """Return operands whose mean and deviation differ between channels."""
    view, channels = (1, -1, 1, 1), shape[1]
    x = randn(*shape) * (randn(channels).abs() + 0.5).view(view) + 10 * randn(channels, seed=1).view(view)
    activations = (
        one.to(dtype).contiguous(memory_format=format) for one in (x, randn(*shape, seed=2), randn(*shape, seed=5))
    )
    x, residual, dy = activations
    weight, bias = 1 + randn(channels, seed=3).float(), randn(channels, seed=4).float()
    stats = norm.batch_norm_stats(x, weight, bias, None, None, True, 1e-5)
    residual_stats = norm.batch_norm_stats(residual, bias, weight, None, None, True, 1e-5)
    mask = norm.pack_mask(residual > 0)
    sums = norm_sync.batch_norm_sums(dy, x, stats, mask, "identity", None, None)
    return SimpleNamespace(**{name: value for name, value in locals().items() if isinstance(value, torch.Tensor)})


NORM_OPERATORS: dict[str, tuple[str, Callable[[SimpleNamespace], Sequence[Any]]]] = {
    "stats": ("batch_norm_stats", lambda c: (c.x, c.weight, c.bias, None, None, True, 1e-5)),
    "apply": ("batch_norm_act_apply", lambda c: (c.x, c.stats, c.residual, c.residual_stats, "relu", True)),
    "plain apply": ("batch_norm_act_apply", lambda c: (c.x, c.stats, None, None, "identity", False)),
    "inference": (
        "batch_norm_act_inference_",
        lambda c: (c.x, c.residual, None, c.weight, c.bias, c.bias * 9, c.weight**2 + 0.5, 1e-5, "relu"),
    ),
    "pair": (
        "batch_norm_act_backward_pair",
        lambda c: (
            *(c.dy, c.x, c.weight, c.stats, c.residual, c.bias, c.residual_stats, c.mask, True, False, [True] * 6),
        ),
    ),
    "add_masked": ("add_masked_", lambda c: (c.x, c.dy, c.mask)),
    "update": (
        "update_running_stats",
        lambda c: ([c.weight, c.bias], [c.weight + 1, c.bias + 1], [c.stats, c.residual_stats], [0.1, 0.3]),
    ),
    "partials": ("batch_norm_partials", lambda c: (c.x,)),
    "merge": (
        "merge_stats",
        lambda c: (torch.cat([norm_sync.batch_norm_partials(c.x)] * 3), c.weight, None, 1e-5, False),
    ),
    "sums": ("batch_norm_sums", lambda c: (c.dy, c.x, c.stats, None, "relu", None, None)),
    "dx": ("batch_norm_act_dx", lambda c: (c.dy, c.x, c.stats, c.mask, "identity", c.sums, c.x[:, 0].numel())),
}


@norms
@pytest.mark.parametrize("operator", NORM_OPERATORS)
def test_norm(operator, shape, format, dtype):
    name, arguments = NORM_OPERATORS[operator]
    schedule = list(NORM_OPERATORS).index(operator) % 3
    check(name, lambda: arguments(norm_case(shape, format, dtype)), TOLERANCE[dtype], schedule)


@contextlib.contextmanager
def count_wavefronts() -> Iterator[tuple[Callable[[str], str], dict[str, list[int]]]]:
    """Count the wavefronts of shared memory accesses by kernel, and those that bank conflicts add.

    An access of 4 bytes per lane takes one wavefront per warp, one of 8 bytes two for half a warp each, one of 16 bytes
    four; each takes more where lanes address different words of one of the 32 banks.

    Yields:
        The ``edit`` for :func:`interpret_cuda_launches`, and the counts ``[all, conflicts]`` by kernel.
    """
    counts: dict[str, list[int]] = {}
    current: list[list[int]] = []

    def edit(ptx: str) -> str:
        name = re.search(r"\.entry \w*?cuda\d+([a-z_]+_kernel)", ptx)
        assert name is not None
        current[:] = [counts.setdefault(name[1], [0, 0])]
        return ptx

    def count(addresses: Any, width: int, lanes: Any) -> None:
        words = max(1, width // 4)
        groups: dict[int, set[int]] = {}
        for address, lane in zip(addresses.tolist(), lanes.tolist(), strict=True):
            groups.setdefault(lane * words // 32, set()).update(address // 4 + i for i in range(words))
        for group in groups.values():
            banks = Counter(word % 32 for word in group)
            current[0][0] += max(banks.values())
            current[0][1] += max(banks.values()) - 1

    class CountingMemory(machine.SharedMemory):
        def load(self, addresses: Any, width: int, lanes: Any) -> Any:
            count(addresses, width, lanes)
            return super().load(addresses, width, lanes)

        def store(self, addresses: Any, values: Any, lanes: Any, poison: bool = False) -> None:
            count(addresses, values.itemsize, lanes)
            super().store(addresses, values, lanes, poison)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SharedMemory", CountingMemory)
        yield edit, counts


def test_wavefronts_of_norm_kernels():
    """No loop has bank conflicts in shared memory, and one block_sum of 64 channels needs 146 wavefronts."""
    with count_wavefronts() as (edit, counts):
        for name in ("partials", "apply", "sums", "dx"):
            operator, arguments = NORM_OPERATORS[name]
            interpreted(operator, lambda a=arguments: a(norm_case((1, 64, 8, 8), NHWC, torch.bfloat16)), 0, edit)
    # Of two warps that fill rows, once per threadblock: three rows of each norm, two more in dx.
    for kernel, conflicts in {"partials": 0, "apply": 12, "sums": 6, "dx": 10}.items():
        assert counts[f"{kernel}_kernel"][1] <= conflicts, counts
    assert counts["partials_kernel"][0] == 3 * 146, counts


def forward(c: SimpleNamespace) -> Sequence[Any]:
    return c.x, c.residual, None, c.weight, c.bias, None, None, True, 1e-5, "relu", True


def backward(c: SimpleNamespace) -> Sequence[Any]:
    return c.dy, c.x, c.weight, c.stats, c.mask, True, "identity", [True] * 4


FORWARD_AND_BACKWARD = {"batch_norm_act_forward": forward, "batch_norm_act_backward": backward}


@contextlib.contextmanager
def single_pass(mode: int) -> Iterator[None]:
    switch = load_simulator().library.fused_res_cuda_single_pass
    previous = switch(mode)
    try:
        yield
    finally:
        switch(previous)


@norms
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("name", FORWARD_AND_BACKWARD)
def test_forward_and_backward(name, mode, shape, format, dtype):
    """As several kernels, and as one cooperative kernel with a grid barrier."""
    with single_pass(mode):
        launches = check(
            name, lambda: FORWARD_AND_BACKWARD[name](norm_case(shape, format, dtype)), TOLERANCE[dtype], 1 + mode
        )
    assert [launch.cooperative for launch in launches] == [bool(mode)] * (1 if mode else len(launches))


@pytest.mark.parametrize("format", [NHWC, NCHW], ids=str)
def test_max_pool(format):
    window = [3, 3], [2, 2], [1, 1]

    def image(seed, *shape):
        return randn(*shape, seed=seed).bfloat16().contiguous(memory_format=format)

    def forward_arguments():
        stats = norm.batch_norm_stats(image(1, 2, 20, 9, 11) + 1, None, None, None, None, True, 1e-5)
        return image(0, 2, 20, 9, 11), stats, True, *window

    check("max_pool_forward", forward_arguments, TOLERANCE[torch.bfloat16], 1)
    indices = registry.resolve("reference", CPU).max_pool_forward(*forward_arguments())[1]
    check(
        "max_pool_backward",
        lambda: (
            image(2, *indices.shape),
            indices.clone(memory_format=torch.preserve_format),
            forward_arguments()[0],
            *window,
        ),
        TOLERANCE[torch.bfloat16],
        2,
    )


# --- convolutions -------------------------------------------------------------------------------------------

CONVOLUTIONS = [  # images, channels, height, width, outputs, kernel, stride, padding, dilation, groups
    ((2, 64, 5, 6), 40, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((2, 35, 4, 5), 20, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((1, 16, 6, 6), 24, (3, 2), (1, 2), (2, 0), (2, 1), 2),
    ((1, 640, 2, 3), 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),  # split-K
]
convolutions = pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS, ids=str
)
on_dtypes = pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)],
    ids=["bfloat16", "float16", "tf32", "float32"],
)


@pytest.fixture(autouse=True)
def _tf32(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", "tf32" in request.node.name)


def filters(outputs: int, channels: int, *kernel: int, seed: int = 1) -> torch.Tensor:
    return randn(outputs, channels, *kernel, seed=seed) / (channels * kernel[0] * kernel[1]) ** 0.5


@on_dtypes
@convolutions
def test_convolution(shape, outputs, kernel, stride, padding, dilation, groups, dtype, tf32):
    geometry = list(stride), list(padding), list(dilation), groups
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(shape[2:], padding, dilation, kernel, stride, strict=True)
    ]

    def image(*shape, seed=0):
        return (randn(*shape, seed=seed) + 1).to(dtype).contiguous(memory_format=NHWC)

    def operands():
        return image(*shape), filters(outputs, shape[1] // groups, *kernel).to(dtype), randn(outputs).to(dtype)

    def with_residual():
        return *operands(), image(shape[0], outputs, *size, seed=3), *geometry, True

    def with_stats():
        stats = norm.batch_norm_stats(image(*shape), None, randn(shape[1]).float(), None, None, True, 1e-5)
        return *operands(), stats, True, *geometry, True

    tolerance = TF32 if tf32 else TOLERANCE[dtype]
    check("conv_bias_act", with_residual, tolerance, 1)
    check("conv_bn_stats", with_stats, tolerance, 2)


def assert_three_tiles(name: str, make: Make, elements: int, tolerance: float) -> None:
    """Run only the first two threadblocks and the last one; the elements of the others stay NaN."""
    with interpret_cuda_launches(1, ctas=lambda grid: [0, 1, grid[0] - 1]) as launches:
        ours = results("cuda", name, make())[0]
    assert len(launches) == 1
    written = ~ours.isnan()
    assert written.sum() == 3 * elements
    exact = results("reference", name, to_float64(make()))[0]
    assert ((ours - exact)[written].abs() <= tolerance * exact.abs().max()).all()


LARGE = [("bfloat16", 128, 256), ("tf32", 128, 256), ("float16", 256, 64), ("float32", 256, 64)]


@pytest.mark.parametrize(("kind", "width", "outputs"), LARGE)
def test_large_tiles(kind, width, outputs):
    """The number of pixels is large enough that tiles of 128 x 128 or 128 x 64 are chosen."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    tolerance = TF32 if kind == "tf32" else TOLERANCE[dtype]

    def image(channels, seed=0):
        return randn(1, channels, 128, width, seed=seed).to(dtype).contiguous(memory_format=NHWC)

    def forward():
        return image(16), filters(outputs, 16, 1, 1).to(dtype), None, None, [1, 1], [0, 0], [1, 1], 1, False

    def backward():
        weight, stats = filters(16, outputs, 1, 1).to(dtype), randn(5, 16).float()
        return image(16), image(16, 1), stats, None, True, None, 128 * width, weight, None, None, False

    elements = 128 * min(outputs, 128)
    assert_three_tiles("conv_bias_act", forward, elements, tolerance)
    if dtype != torch.float32:
        assert_three_tiles("conv_dgrad", backward, elements, tolerance)


CONV1X1 = [(64, 24, 4, 1, True), (35, 20, 3, 1, False), (16, 40, 7, 2, True)]


@on_dtypes
@pytest.mark.parametrize(("channels", "outputs", "size", "stride", "has_input_norm"), CONV1X1)
def test_conv1x1_backward(channels, outputs, size, stride, has_input_norm, dtype, tf32):
    pixels = (size - 1) // stride + 1
    output_shape = 2, outputs, pixels, pixels

    def image(*shape, seed=0, mean=0.0):
        return (randn(*shape, seed=seed) + mean).to(dtype).contiguous(memory_format=NHWC)

    def common():
        z, dy = image(*output_shape, seed=1, mean=3.0), image(*output_shape, seed=2)
        stats = norm.batch_norm_stats(z, *randn(2, outputs).float(), None, None, True, 1e-5)
        mask = norm.pack_mask(image(*output_shape, seed=4) > 0) if has_input_norm else None
        gradient = dy, z, stats, mask, not has_input_norm
        sums = norm_sync.batch_norm_sums(*gradient[:4], "identity", None, None) if has_input_norm else None
        return *gradient, sums, z.numel() // outputs, filters(outputs, channels, 1, 1).to(dtype)

    def input_and_stats():
        x = image(2, channels, size, size, mean=1.0)
        return x, norm.batch_norm_stats(x, *randn(2, channels).float(), None, None, True, 1e-5)

    tolerance = TF32 if tf32 else TOLERANCE[dtype]
    read_input = lambda: (*input_and_stats(), True) if has_input_norm else (input_and_stats()[0], None, False)  # noqa: E731
    check("conv_wgrad", lambda: (*common(), *read_input(), [stride, stride]), tolerance, 1)
    if stride == 1 and has_input_norm:
        check("conv_dgrad", lambda: (*common(), *input_and_stats(), True), tolerance, 2)
    elif stride == 1:
        added = functools.partial(image, 2, channels, size, size, seed=6)
        epilogue = lambda: (None, None, False, added(), norm.pack_mask(added() > 0))  # noqa: E731
        check("conv_dgrad", lambda: (*common(), *epilogue()), tolerance, 2)
        no_prologue = None, None, None, False, None, 0
        check("conv_dgrad", lambda: (common()[0], *no_prologue, common()[-1], *epilogue()), tolerance, 2)


# --- deliberate errors --------------------------------------------------------------------------------------


def replace_in_ptx(pattern: str, replacement: str) -> Callable[[str], str]:
    """Return an edit of a kernel's PTX that counts its replacements in ``edit.count``."""

    def edit(ptx: str) -> str:
        changed, count = re.subn(pattern, replacement, ptx)
        edit.count += count
        return changed

    edit.count = 0
    return edit


def convolution(dtype: torch.dtype = torch.bfloat16) -> Sequence[Any]:
    x = randn(1, 64, 4, 4).to(dtype).contiguous(memory_format=NHWC)
    return x, filters(32, 64, 3, 3).to(dtype), None, None, [1, 1], [1, 1], [1, 1], 1, False


_MMA = r"(mma\.sync\S+\s+\{[^}]*\}, \{)(%r\d+), (%r\d+), (%r\d+), (%r\d+)(\}, \{)(%r\d+), (%r\d+)"
_WAIT = r"cp\.async\.wait_group (\d)"
ERRORS = {  # name: pattern, replacement, and the message of the fault, or None where the result is wrong
    "rows of operand A": (_MMA, r"\1\3, \2, \4, \5\6\7, \8", None),
    "columns of operand A": (_MMA, r"\1\4, \5, \2, \3\6\7, \8", None),
    "operand B": (_MMA, r"\1\2, \3, \4, \5\6\8, \7", None),
    "ldmatrix.trans": (r"m8n8\.x4\.shared", "m8n8.x4.trans.shared", None),
    "no wait": (_WAIT, "cp.async.wait_group 3", None),
    "no barrier": (r"bar\.sync\s+0;", "", "no barrier in between"),
    "past the end": (r"(st\.global\.\S+\s+\[%rd\d+)(?=\])", r"\1+1024", "outside of every allocation"),
    "misaligned": (r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+)", r"\1+8", "misaligned"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_error_in_convolution_is_detected(error):
    pattern, replacement, fault = ERRORS[error]
    edit = replace_in_ptx(pattern, replacement)
    if fault is not None:
        with pytest.raises(Fault, match=fault):
            interpreted("conv_bias_act", convolution, 0, edit)
    else:
        ours, _ = interpreted("conv_bias_act", convolution, 0, edit)
        with pytest.raises(AssertionError, match="conv_bias_act, 0"):
            assert_exact("conv_bias_act", convolution, ours, TOLERANCE[torch.bfloat16])
    assert edit.count


def small_forward_arguments() -> Sequence[Any]:
    return forward(norm_case(*NORMS[0]))


def test_grid_barrier_deadlock_is_detected():
    edit = replace_in_ptx(
        r"red\.release\.gpu\.global\.add\.u32 \[(%rd\d+)\], 1", r"red.release.gpu.global.add.u32 [\1], 0"
    )
    with single_pass(1), pytest.raises(Fault, match="deadlock: spins on memory that no thread writes"):
        interpreted("batch_norm_act_forward", small_forward_arguments, 0, edit)
    assert edit.count


@pytest.mark.parametrize("schedule", [1, 2])
def test_missing_grid_barrier_wait_is_detected(schedule):
    """The first threadblock reads partial sums that the others have not written yet."""
    edit = replace_in_ptx(r"(ld\.acquire[^;]*;[^@]*)@%p\d+ bra", r"\1// ")
    with single_pass(1):
        ours, _ = interpreted("batch_norm_act_forward", small_forward_arguments, schedule, edit)
    assert edit.count
    with pytest.raises(AssertionError, match="batch_norm_act_forward, 0"):
        assert_exact("batch_norm_act_forward", small_forward_arguments, ours, TOLERANCE[torch.bfloat16])


def test_access_outside_of_every_allocation_is_detected():
    outside = small_forward_arguments()[0]
    with pytest.raises(Fault, match="outside of every allocation"):
        interpreted("batch_norm_act_forward", lambda: (outside, *small_forward_arguments()[1:]))


def test_launch_with_too_many_threads_is_rejected():
    edit = replace_in_ptx(r"\.maxntid \d+", ".maxntid 32")
    with pytest.raises(ValueError, match="threads, expected at most 32"):
        interpreted("batch_norm_act_forward", small_forward_arguments, 0, edit)


def test_cuda_backend_resolves_on_cpu():
    assert fused_res.backends.resolve("cuda", CPU).name == "cuda"
