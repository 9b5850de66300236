"""The CPU backend's float32 convolutions fused with norms, and all gradients by ``conv_backward``, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_res
from fused_res import BlockSpec, UnitSpec, _extension
from fused_res.backends import registry
from fused_res.block.plan import BlockConfig
from fused_res.block.planner import plan
from tests.backends.cpu.test_conv_training import relative_error, threads
from tests.backends.cpu.test_convolution import ISAS  # skips this file without the extension or AVX2
from tests.support.conv_training import Case, images, norm_stats, run_block
from tests.support.guard_pages import GuardedTensor

_C = _extension._module
#: RMS error relative to the reference's RMS, of one convolution and one norm.
LIMIT = 1e-6


@pytest.fixture(params=ISAS)
def isa(request: Any) -> Iterator[str]:
    previous = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(previous)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    registry.resolve("cpu", torch.device("cpu"))  # registers the operators


#: Those with a direct split-K weight gradient, which norms can be fused with.
FUSED_CASES = [
    Case("1x1", (2, 64, 8, 8), 64),
    Case("1x1, many chunks", (6, 32, 24, 24), 40),
    Case("1x1, one chunk", (1, 48, 3, 3), 96),
    Case("1x1, channels not in vectors", (2, 37, 7, 5), 21),
    Case("1x1, rows that alias", (3, 1024, 6, 6), 64),
    Case("1x1, stride 2", (2, 64, 9, 9), 64, 1, 2),
    Case("3x3", (2, 32, 19, 7), 40, 3, 1, 1),
    Case("3x3, stride 2", (2, 20, 15, 13), 24, 3, 2, 1),
]
CASES = [
    *FUSED_CASES,
    Case("1x1, staged accumulators", (4, 768, 7, 7), 512),
    Case("3x3, dilated", (2, 24, 12, 12), 32, 3, 1, 2, 2),
    Case("3x3, stride 2, even size", (4, 64, 24, 24), 128, 3, 2, 1),
    Case("3x3, stride 2, without padding", (2, 32, 11, 11), 64, 3, 2),
    Case("5x5, stride 3", (2, 32, 11, 11), 32, 5, 3),
    Case("stem", (2, 3, 32, 32), 64, 7, 2, 3),
]


def conv_backward(
    case: Case, x: Tensor, weight: Tensor, dz: Tensor, output_mask: tuple[bool, bool] = (True, True), tile: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator without norms."""
    no_norms = None, None, None, False, None, 0, weight, x, None, False, None, None
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.fused_res_cpu.conv_backward(
        dz, *no_norms, *case.geometry, list(output_mask), tile
    )
    return result


class TestGradients:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_errors_against_float64(self, isa: str, case: Case) -> None:
        x, weight, dz = case.tensors()
        dx, dweight = case.gradients(x, weight, dz)
        layouts = weight, weight.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3)
        for layout, mask in itertools.product(layouts, ((True, True), (True, False), (False, True))):
            found_dx, _, found_dweight = conv_backward(case, x, layout, dz, mask)
            assert not mask[0] or relative_error(found_dx, dx) <= LIMIT
            assert not mask[1] or relative_error(found_dweight, dweight) <= LIMIT

    def test_winograd(self, isa: str) -> None:
        for case in (
            Case("split-K", (2, 40, 13, 9), 33, 3, 1, 1),
            Case("staged", (2, 300, 9, 9), 330, 3, 1, 1),
            Case("passes over the panels", (1, 400, 6, 6), 420, 3, 1, 1),
        ):
            x, weight, dz = case.tensors()
            found = conv_backward(case, x, weight, dz, tile=4)
            for gradient, exact in zip(found[::2], case.gradients(x, weight, dz), strict=True):
                assert relative_error(gradient, exact) <= 5 * LIMIT

    def test_same_bits_for_any_number_of_threads(self) -> None:
        for case in CASES:
            x, weight, dz = case.tensors()
            results = []
            for count in (1, 2, 3):
                with threads(count):
                    results.append(conv_backward(case, x, weight, dz))
            for found in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True)), case

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_reads_only_its_operands(self, case: Case) -> None:
        x, weight, dz = case.tensors()
        expected = conv_backward(case, x, weight, dz)
        for before_upper_guard in (True, False):
            guarded = [GuardedTensor(t, before_upper_guard) for t in (x, weight, dz)]
            found = conv_backward(case, *(g.copy for g in guarded))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"dz": torch.ones(1, 40, 19, 7)}, "grad_output: expected the gradient of this convolution"),
            ({"dz": torch.ones(2, 40, 19, 7).double()}, "grad_output: expected the dtype of input"),
            ({"x": torch.ones(2, 32, 19, 7).double()}, "input: expected float32, bfloat16 or float16"),
            ({"x": torch.ones(2, 32, 19, 7).half()}, "input: expected float32 or bfloat16"),
            ({"weight": torch.ones(40, 32, 3, 3).double()}, "weight: expected float32"),
            ({"tile": 5}, "tile: Winograd supports"),
        ],
        ids=str,
    )
    def test_invalid_arguments_raise(self, changed: dict[str, Any], match: str) -> None:
        case = CASES[6]
        x, weight, dz = case.tensors()
        with pytest.raises((ValueError, TypeError), match=match):
            conv_backward(case, **({"x": x, "weight": weight, "dz": dz} | changed))


class TestNorms:
    """The norms around a convolution: what the operators fuse equals the operators of the separate passes."""

    @pytest.mark.parametrize("case", FUSED_CASES, ids=str)
    def test_gradients(self, isa: str, case: Case) -> None:
        kernels = registry.resolve("cpu", torch.device("cpu"))
        x, weight, dy = case.tensors()
        z = images(*dy.shape, mean=0.5)
        stats, input_stats = norm_stats(z), None if case.compact else norm_stats(x)
        count = z.numel() // z.shape[1]
        sums = kernels.batch_norm_sums(dy, z, stats, None, "relu", None, None)
        dz = kernels.batch_norm_act_dx(dy, z, stats, None, "relu", sums, count)
        a = x
        if input_stats is not None:
            a, _ = kernels.batch_norm_act_apply(x, input_stats, None, None, "relu", False)
        dx, dweight = case.gradients(a, weight, dz)
        shortcut = images(*dx.shape)
        following = (dy, z, stats, None, True, sums, count), (dz, None, None, None, False, None, 0)
        masks = (True, True), (True, False), (False, True)
        for norm, added, mask in itertools.product(following, (None, shortcut), masks):
            found_dx, found_sums, found_dweight = kernels.conv_backward(
                *norm, weight, x, input_stats, True, added, None, *case.geometry, mask
            )
            if mask[0]:
                assert relative_error(found_dx, dx if added is None else dx + added.double()) <= LIMIT
            if mask[0] and input_stats is not None:
                exact = kernels.batch_norm_sums(
                    found_dx.double(), x.double(), input_stats.double(), None, "relu", None, None
                )
                assert relative_error(found_sums, exact) <= 1e-5
            if mask[1]:
                assert relative_error(found_dweight, dweight) <= LIMIT

    @pytest.mark.parametrize("case", FUSED_CASES, ids=str)
    def test_same_bits_for_any_number_of_threads(self, case: Case) -> None:
        kernels = registry.resolve("cpu", torch.device("cpu"))
        x, weight, dy = case.tensors()
        z = images(*dy.shape, mean=0.5)
        stats, input_stats = norm_stats(z), None if case.compact else norm_stats(x)
        results = []
        for count in (1, 2, 5):
            with threads(count):
                gradients = kernels.conv_backward(
                    dy, z, stats, None, True, None, 0, weight, x, input_stats, True, None, None, *case.geometry,
                    (True, True),
                )  # fmt: skip
                forward = kernels.conv_bn_stats(x, weight, None, input_stats, True, *case.geometry, 1, True)
                results.append((*gradients, *forward))
        for found in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))

    @pytest.mark.parametrize("mean", [0.0, 100.0])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward(self, isa: str, case: Case, mean: float) -> None:
        kernels = registry.resolve("cpu", torch.device("cpu"))
        x, weight, _ = case.tensors()
        bias = torch.full((case.outputs,), mean)
        input_stats = norm_stats(x)
        a, _ = kernels.batch_norm_act_apply(x, input_stats, None, None, "relu", False)
        z, partials = kernels.conv_bn_stats(x, weight, bias, input_stats, True, *case.geometry, 1, True)
        exact = F.conv2d(a.double(), weight.double(), bias.double(), case.stride, case.padding, case.dilation)
        assert relative_error(z, exact) <= 4 * LIMIT  # by Winograd, too
        count, found_mean, m2 = partials[0]
        wide = z.double().transpose(0, 1).flatten(1)
        assert count.eq(wide.shape[1]).all()
        torch.testing.assert_close(found_mean, wide.mean(1), rtol=1e-6, atol=1e-6)
        deviations = (wide - wide.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(m2, deviations, rtol=1e-4, atol=1e-6 * wide.shape[1])

    def test_unsupported_fusions_raise(self) -> None:
        kernels = registry.resolve("cpu", torch.device("cpu"))
        x, weight, dz = CASES[len(FUSED_CASES)].tensors()
        norm = dz, None, None, None, False, None, 0, weight, x, norm_stats(x), True, None, None
        with pytest.raises(ValueError, match="weight: expected at most 262144 elements"):
            kernels.conv_backward(*norm, *CASES[len(FUSED_CASES)].geometry, (True, True))
        case = CASES[6]
        x, weight, dz = case.tensors()
        norm = dz, None, None, None, False, None, 0, weight, x, norm_stats(x), True, None, None
        addition = (*norm[:9], None, False, torch.ones_like(x), None)
        for operands, mask in itertools.product((norm, addition), ((True, True), (True, False), (False, True))):
            with pytest.raises(ValueError, match="tile: expected 0"):
                kernels.conv_backward(*operands, *case.geometry, mask, 4)

    def test_baseline_raises(self) -> None:
        previous = _C.cpu_isa()
        _C.set_cpu_isa("baseline")
        try:
            x, weight, dz = CASES[0].tensors()
            with pytest.raises(RuntimeError, match="baseline, has no convolution kernels"):
                conv_backward(CASES[0], x, weight, dz)
        finally:
            _C.set_cpu_isa(previous)


def bottleneck(inner: int, size: int, projection: bool) -> tuple[BlockSpec, Tensor, list[Tensor | None]]:
    """Return a bottleneck's spec, an input and its tensors."""
    units = (UnitSpec(), UnitSpec(padding=(1, 1)), UnitSpec(activation="relu"))
    spec = BlockSpec(units, UnitSpec(activation="identity") if projection else "identity")
    wide = inner * 4
    inputs = 64 if projection else wide
    shapes = [(inner, inputs, 1, 1), (inner, inner, 3, 3), (wide, inner, 1, 1)]
    shapes += [(wide, inputs, 1, 1)] * projection
    tensors: list[Tensor | None] = []
    for shape in shapes:
        weight = (torch.randn(shape) / (shape[1] * shape[2] ** 2) ** 0.5).contiguous(memory_format=torch.channels_last)
        norm = (torch.rand(shape[0]) + 0.5, torch.randn(shape[0]) * 0.2, torch.zeros(shape[0]), torch.ones(shape[0]))
        tensors += [weight, None, *norm]
    return spec, images(4, inputs, size, size), tensors


@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("inner", [16, 32, 160], ids=["fused", "fused, wider", "without the following norm's backward"])
def test_block_error_is_at_most_that_of_separate_passes(inner: int, projection: bool, winograd: bool) -> None:
    spec, x, tensors = bottleneck(inner, 10, projection)
    names = {
        unit.algorithms.weight_gradient.name
        for unit in plan(BlockConfig(spec, (True,) * len(spec.convolutions), "cpu"), x, tensors).all_units
    }
    assert ("fused_fp32" if inner < 160 else "fused_input_fp32") in names
    with fused_res.backends.use("reference"):
        exact = run_block(spec, x.double(), [None if t is None else t.double() for t in tensors])
    with fused_res.backends.use("auto", winograd=winograd):
        ours = run_block(spec, x, tensors)
    with fused_res.backends.use("auto", convolution="aten"):
        separate = run_block(spec, x, tensors)
    for index, (a, b, c) in enumerate(zip(ours, separate, exact, strict=True)):
        # 1e-5: Winograd, and cancellation in the sums of a norm before another norm.
        assert relative_error(a, c) <= 2 * relative_error(b, c) + 1e-5, index


@pytest.mark.parametrize("inner", [16, 160])
def test_recompute_levels_have_equal_bits(inner: int) -> None:
    spec, x, tensors = bottleneck(inner, 10, True)
    expected = run_block(spec, x, tensors)
    for level in ("norm", "conv"):
        found = run_block(spec, x, tensors, recompute=level)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), level
