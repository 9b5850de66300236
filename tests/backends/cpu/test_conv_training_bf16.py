"""The CPU backend's convolutions with products of bfloat16 in training: the operators, and the blocks that use them.

References are float64. A weight's gradient is accumulated in float32 and stored as float32 for a float32 master weight,
so its limit is that of float32; outputs and input gradients are rounded to bfloat16 once.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_res
from fused_res import BlockSpec, UnitSpec, _extension
from fused_res.backends import registry
from fused_res.block.plan import BlockConfig
from fused_res.block.planner import plan
from fused_res.functional import residual_block
from fused_res.testing import stub_torchvision_operators
from tests.backends.cpu.test_conv_training import relative_error, threads
from tests.backends.cpu.test_convolution import BF16_ISAS as ISAS  # skips this file without the extension or AVX2
from tests.support.conv_training import Case as AnyCase
from tests.support.conv_training import norm_stats, run_block
from tests.support.guard_pages import GuardedTensor

_C = _extension._module
#: Those that `fuse` can select: amx_emulated is selected by name only, and slow.
FAST_ISAS = [isa for isa in ISAS if isa != "amx_emulated"]
pytestmark = pytest.mark.skipif(not FAST_ISAS, reason="needs products of bfloat16")

#: RMS errors relative to the reference's RMS. One rounding to bfloat16 is at most 2**-9, on average 1.7e-3 of the RMS.
ROUNDED, ACCUMULATED = 3e-3, 1e-6


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


def images(*shape: int, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) + mean).bfloat16().contiguous(memory_format=torch.channels_last)


Case = partial(AnyCase, dtype=torch.bfloat16)
CASES = [
    Case("1x1", (2, 64, 8, 8), 64, 1),
    Case("1x1, K larger than a chunk", (6, 32, 24, 24), 40, 1),
    Case("1x1, staged accumulators", (4, 768, 7, 7), 512, 1),
    Case("1x1, stride 2", (2, 64, 9, 9), 64, 1, 2),
    Case("1x1, channels not in blocks", (2, 40, 7, 5), 24, 1),
    Case("3x3", (2, 32, 9, 7), 40, 3, 1, 1),
    Case("3x3, staged accumulators", (3, 192, 9, 9), 192, 3, 1, 1),
    Case("3x3, chunks of lines", (2, 32, 40, 33), 32, 3, 1, 1),
    Case("3x3, without padding", (2, 64, 13, 13), 64, 3),
    Case("3x3, one pixel", (3, 32, 1, 1), 32, 3, 1, 1),
    Case("3x3, images of 2x2", (40, 32, 2, 2), 32, 3, 1, 1),
    Case("3x3, im2col", (2, 48, 10, 10), 33, 3, 1, 1),
    Case("3x3, dilated", (2, 64, 12, 12), 32, 3, 1, 2, 2),
    Case("3x3, stride 2, odd size", (2, 64, 15, 13), 96, 3, 2, 1),
    Case("3x3, stride 2, even size", (4, 64, 24, 24), 128, 3, 2, 1),
    Case("3x3, stride 2, without padding", (2, 32, 11, 11), 64, 3, 2),
    Case("5x5, stride 3", (2, 32, 11, 11), 32, 5, 3),
    Case("stem", (2, 3, 32, 32), 64, 7, 2, 3),
    Case("images wider than a chunk", (1, 32, 3, 700), 32, 3, 1, 1),
]


def conv_backward(
    case: AnyCase, x: Tensor, weight: Tensor, dz: Tensor, output_mask: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator without norms."""
    no_norms = None, None, None, False, None, 0, weight, x, None, False, None, None
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.fused_res_cpu.conv_backward(
        dz, *no_norms, *case.geometry, list(output_mask)
    )
    return result


def has_input_grad(case: AnyCase) -> bool:
    return case.name != "stem"  # of an image, which needs no gradient


class TestGradients:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_errors_against_float64(self, isa: str, case: AnyCase) -> None:
        x, weight, dz = case.tensors()
        dx, dweight = case.gradients(x, weight, dz)
        found = conv_backward(case, x, weight, dz, (has_input_grad(case), True))
        assert found[2].dtype == torch.float32 and found[2].stride() == weight.stride()
        assert relative_error(found[2], dweight) <= ACCUMULATED
        if has_input_grad(case):
            assert found[0].shape == dx.shape and relative_error(found[0], dx) <= ROUNDED

    @pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[13], CASES[17]], ids=str)
    def test_weight_dtypes_and_layouts(self, case: AnyCase) -> None:
        x, weight, dz = case.tensors()
        mask = (has_input_grad(case), True)
        expected = conv_backward(case, x, weight, dz, mask)
        contiguous = conv_backward(case, x, weight.contiguous(), dz.contiguous(), mask)
        assert contiguous[2].is_contiguous()
        rounded = conv_backward(case, x.contiguous(), weight.bfloat16(), dz, mask)
        assert rounded[2].dtype == torch.bfloat16
        for found in (contiguous, rounded):
            assert torch.equal(found[0], expected[0])
        assert torch.equal(contiguous[2], expected[2]) and torch.equal(rounded[2], expected[2].bfloat16())

    def test_same_bits_for_any_number_of_threads(self) -> None:
        for case in CASES:
            x, weight, dz = case.tensors()
            results = []
            for count in (1, 2, 3):
                with threads(count):
                    results.append(conv_backward(case, x, weight, dz, (has_input_grad(case), True)))
            for found in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True)), case

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_reads_only_its_operands(self, case: AnyCase) -> None:
        x, weight, dz = case.tensors()
        expected = conv_backward(case, x, weight, dz, (has_input_grad(case), True))
        for before_upper_guard in (True, False):
            guarded = [GuardedTensor(t, before_upper_guard) for t in (x, weight, dz)]
            found = conv_backward(case, *(g.copy for g in guarded), (has_input_grad(case), True))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_nan_in_a_gradient_stays_in_its_channel(self) -> None:
        case = CASES[5]
        x, weight, dz = case.tensors()
        dz[0, 3, 4, 4] = float("nan")
        dx, _, dweight = conv_backward(case, x, weight, dz)
        assert dweight[3].isnan().all() and not dweight[:3].isnan().any() and not dweight[4:].isnan().any()
        assert dx[0, :, 3:6, 3:6].isnan().all() and dx.isnan().sum() == 9 * x.shape[1]

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"dz": torch.ones(1, 40, 9, 7).bfloat16()}, "grad_output: expected the gradient of this convolution"),
            ({"dz": torch.ones(2, 40, 9, 7)}, "grad_output: expected the dtype of input"),
            ({"x": torch.ones(2, 32, 9, 7)}, "grad_output: expected the dtype of input"),
            ({"x": torch.ones(2, 32, 9, 7).half()}, "input: expected float32 or bfloat16"),
            ({"x": torch.ones(2, 30, 9, 7).bfloat16()}, "grad_output: expected the gradient of this convolution"),
            ({"weight": torch.ones(40, 32, 3)}, r"input: expected \(N, C, H, W\)"),
        ],
        ids=str,
    )
    def test_invalid_arguments_raise(self, changed: dict[str, Tensor], match: str) -> None:
        case = CASES[5]
        x, weight, dz = case.tensors()
        with pytest.raises((ValueError, TypeError), match=match):
            conv_backward(case, **({"x": x, "weight": weight, "dz": dz} | changed))


class TestNorms:
    """The norms around a convolution: what the operator fuses equals the operators of the separate passes."""

    @pytest.mark.parametrize("case", [c for c in CASES if has_input_grad(c)], ids=str)
    def test_gradients(self, isa: str, case: AnyCase) -> None:
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
        for added, mask in itertools.product((None, shortcut), ((True, True), (True, False), (False, True))):
            found_dx, found_sums, found_dweight = kernels.conv_backward(
                dy, z, stats, None, True, sums, count, weight, x, input_stats, True, added, None, *case.geometry, mask
            )
            if mask[0]:
                expected = dx if added is None else dx + added.double()
                # The sum with the shortcut's gradient is rounded once more.
                assert relative_error(found_dx, expected) <= ROUNDED * (1 if added is None else 1.5)
            if mask[0] and input_stats is not None:
                exact = kernels.batch_norm_sums(
                    found_dx.double(), x.double(), input_stats.double(), None, "relu", None, None
                )
                assert relative_error(found_sums, exact) <= 1e-5
            if mask[1]:
                assert relative_error(found_dweight, dweight) <= ACCUMULATED

    def test_masked_shortcut_gradient(self) -> None:
        case = CASES[0]
        kernels = registry.resolve("cpu", torch.device("cpu"))
        x, weight, dy = case.tensors()
        shortcut, mask = images(*x.shape), torch.randint(0, 256, (x.numel() // 8,), dtype=torch.uint8)
        operands = dy, None, None, None, False, None, 0, weight, x, None, False
        plain, *_ = kernels.conv_backward(*operands, None, None, *case.geometry, (True, False))
        expected = plain.clone(memory_format=torch.preserve_format)
        kernels.add_masked_(expected, shortcut, mask)
        found, *_ = kernels.conv_backward(*operands, shortcut, mask, *case.geometry, (True, False))
        assert torch.equal(found, expected) and not torch.equal(found, plain)

    @pytest.mark.parametrize("mean", [0.0, 100.0])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward(self, isa: str, case: AnyCase, mean: float) -> None:
        """The output, and its statistics, which are those of the rounded values."""
        kernels = registry.resolve("cpu", torch.device("cpu"))
        x, weight, _ = case.tensors()
        bias = torch.full((case.outputs,), mean)
        input_stats = norm_stats(x)
        a, _ = kernels.batch_norm_act_apply(x, input_stats, None, None, "relu", False)
        for stats, operand in ((None, x), (input_stats, a)):
            z, partials = kernels.conv_bn_stats(x, weight, bias, stats, True, *case.geometry, 1, True)
            exact = F.conv2d(
                operand.double(), weight.bfloat16().double(), bias.double(), case.stride, case.padding, case.dilation
            )
            assert relative_error(z, exact) <= ROUNDED
            count, found_mean, m2 = partials[0]
            wide = z.double().transpose(0, 1).flatten(1)
            assert count.eq(wide.shape[1]).all()
            # float32 sums of differences from a value of the channel, 896 at most.
            torch.testing.assert_close(found_mean, wide.mean(1), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                m2, (wide - wide.mean(1, keepdim=True)).square().sum(1), rtol=1e-4, atol=1e-6 * wide.shape[1]
            )


# --- blocks ---


def bottleneck(
    channels: int = 32, size: int = 10, stride: int = 1, projection: bool = True
) -> tuple[BlockSpec, Tensor, list[Tensor | None]]:
    """Return a bottleneck's spec, an input and float32 tensors."""
    units = (UnitSpec(), UnitSpec((stride, stride), (1, 1)), UnitSpec(activation="relu"))
    spec = BlockSpec(units, UnitSpec((stride, stride), activation="identity") if projection else "identity")
    inner, wide = channels, channels * 4
    inputs = 64 if projection else wide
    shapes = [(inner, inputs, 1, 1), (inner, inner, 3, 3), (wide, inner, 1, 1)]
    shapes += [(wide, inputs, 1, 1)] * projection
    tensors: list[Tensor | None] = []
    for shape in shapes:
        weight = (torch.randn(shape) / (shape[1] * shape[2] ** 2) ** 0.5).contiguous(memory_format=torch.channels_last)
        norm = (torch.rand(shape[0]) + 0.5, torch.randn(shape[0]) * 0.2, torch.zeros(shape[0]), torch.ones(shape[0]))
        tensors += [weight, None, *norm]
    return spec, images(4, inputs, size, size), tensors


def widened(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Return float64 tensors, with the weights that a convolution of bfloat16 reads."""
    return [None if t is None else (t.bfloat16() if t.dim() == 4 else t).double() for t in tensors]


#: The last has gradients that are not fused with the norms, because of the size of the weights.
SHAPES = [
    {"projection": True}, {"projection": False}, {"stride": 2}, {"channels": 64, "size": 9}, {"channels": 96, "size": 7}
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_error_is_at_most_that_of_separate_passes(shape: dict[str, Any]) -> None:
    """Against float64, outputs and gradients are no worse than with ATen's convolutions and separate passes."""
    spec, x, tensors = bottleneck(**shape)
    with fused_res.backends.use("reference"):
        exact = run_block(spec, x.double(), widened(tensors))
    ours = run_block(spec, x, tensors)
    with fused_res.backends.use("auto", convolution="aten"):
        separate = run_block(spec, x, tensors)
    for index, (a, b, c) in enumerate(zip(ours, separate, exact, strict=True)):
        assert a.dtype == b.dtype
        # A ReLU whose input is zero up to rounding passes or blocks its gradient: single elements differ.
        assert relative_error(a, c) <= 1.25 * relative_error(b, c) + 1e-3, index
    assert all(gradient.dtype == torch.float32 for gradient in ours[2:])


@pytest.mark.parametrize("channels", [32, 96])
def test_bias_gradients_with_constant_norms(channels: int) -> None:
    """With batch statistics a bias has no gradient; both kinds of fused gradients have one with running statistics."""
    spec, x, tensors = bottleneck(channels, 7)
    for index in range(0, len(tensors), 6):
        weight = tensors[index]
        assert weight is not None
        tensors[index + 1] = (torch.randn(weight.shape[0]) * 0.1).bfloat16()
    with fused_res.backends.use("reference"):
        exact = run_block(spec, x.double(), widened(tensors), training=False)
    ours = run_block(spec, x, tensors, training=False)
    with fused_res.backends.use("auto", convolution="aten"):
        separate = run_block(spec, x, tensors, training=False)
    assert len(ours) == 2 + 4 * len(spec.convolutions)
    for index, (a, b, c) in enumerate(zip(ours, separate, exact, strict=True)):
        assert relative_error(a, c) <= 1.25 * relative_error(b, c) + 1e-3, index


def plan_of(spec: BlockSpec, x: Tensor, tensors: list[Tensor | None], **options: Any) -> Any:
    training = (True,) * len(spec.convolutions)
    return plan(BlockConfig(spec, training, "cpu", **options), x, tensors)


def test_no_pass_over_an_activation_between_convolutions() -> None:
    """The inner norms have no pass of their own, forward or backward, and their activations are not saved."""
    spec, x, tensors = bottleneck(projection=False)
    for t in (x, *tensors):
        if t is not None:
            t.requires_grad_()
    block_plan = plan_of(spec, x, tensors)
    assert [step.operator for step in block_plan.forward.steps if step.operator.startswith("batch_norm")] == [
        "batch_norm_act_apply"
    ]
    operators = [step.operator for step in block_plan.backward.steps]
    assert operators.count("conv_backward") == 3 and operators.count("batch_norm_sums") == 1
    assert not {"batch_norm_act_backward", "batch_norm_act_dx", "batch_norm_act_apply", "add_masked_"} & {*operators}
    names = {block_plan.slot_names[slot] for slot in block_plan.saved_slots}
    assert not names & {"a0", "a1"} and {"x", "z0", "z1", "z2"} <= names


def test_separate_norm_backward_of_large_weights() -> None:
    """Each norm's backward is one pass, which takes its sums from the next convolution, and nothing is normalized."""
    spec, x, tensors = bottleneck(96, 7, projection=False)
    for t in (x, *tensors):
        if t is not None:
            t.requires_grad_()
    block_plan = plan_of(spec, x, tensors)
    assert {selected.name for unit in block_plan.units[1:2] for selected in unit.algorithms[1:]} == {"fused_input_bf16"}
    operators = [step.operator for step in block_plan.backward.steps]
    assert operators.count("conv_backward") == 3 and operators.count("batch_norm_act_dx") >= 1
    assert not {"batch_norm_act_apply", "add_masked_", "convolution_backward"} & {*operators}
    assert not {"a0", "a1"} & {block_plan.slot_names[slot] for slot in block_plan.saved_slots}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recompute_levels_have_equal_bits(shape: dict[str, Any]) -> None:
    spec, x, tensors = bottleneck(**shape)
    expected = run_block(spec, x, tensors)
    for level in ("norm", "conv"):
        found = run_block(spec, x, tensors, recompute=level)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), level


def test_block_has_the_same_bits_for_any_number_of_threads() -> None:
    spec, x, tensors = bottleneck(channels=64, size=14)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run_block(spec, x, tensors))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_only_required_gradients_are_computed() -> None:
    spec, x, tensors = bottleneck()
    expected = run_block(spec, x, tensors)
    parameters = [index for index, t in enumerate(tensors) if t is not None and index % 6 < 4]
    for required in ([0], [6], [12, 14], [18], [2, 9], [15]):
        flat = [None if t is None else t.clone(memory_format=torch.preserve_format) for t in tensors]
        leaves = [flat[index].requires_grad_() for index in required]  # type: ignore[union-attr]
        y = residual_block(x, spec, flat, training=True)
        grad = torch.linspace(-1, 2, y.numel()).view(y.shape).cos().to(y.dtype)
        for index, found in zip(required, torch.autograd.grad(y, leaves, grad), strict=True):
            reference = expected[2 + parameters.index(index)]
            # Without an input gradient the two gradients of a convolution are computed in other chunks.
            assert relative_error(found, reference.double()) <= 2e-2, index


def test_pure_bfloat16() -> None:
    """Weights of bfloat16 get gradients of bfloat16: those of the same float32 weights, rounded."""
    spec, x, tensors = bottleneck()
    rounded = [t.bfloat16() if t is not None and t.dim() == 4 else t for t in tensors]
    master = [t.float() if t is not None and t.dim() == 4 else t for t in rounded]
    for a, b in zip(run_block(spec, x, rounded), run_block(spec, x, master), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_double_backward_of_master_weights() -> None:
    spec, x, tensors = bottleneck(size=4)
    results = []
    for backend, dtype in (("cpu", torch.bfloat16), ("reference", torch.float64)):
        flat = tensors if dtype == torch.bfloat16 else widened(tensors)
        flat = [None if t is None else t.clone() for t in flat]
        weight = flat[6]
        assert weight is not None
        leaf = x.to(dtype).requires_grad_()
        weight.requires_grad_()
        with fused_res.backends.use(backend):
            y = residual_block(leaf, spec, flat, training=True)
            (dx,) = torch.autograd.grad(y.double().square().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(dx.double().square().sum(), weight)
        assert second.dtype == weight.dtype
        results.append(second)
    # Twice through bfloat16.
    assert relative_error(results[0], results[1].double()) <= 0.1


def test_weight_changed_between_forward_and_backward_raises() -> None:
    spec, x, tensors = bottleneck()
    weight = tensors[6]
    assert weight is not None
    weight.requires_grad_()
    y = residual_block(x, spec, tensors, training=True)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stub_torchvision_operators()
        from torchvision.models.resnet import BasicBlock, Bottleneck

        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        down = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
        wide = nn.Sequential(nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128))
        self.blocks = nn.Sequential(
            BasicBlock(32, 32), BasicBlock(32, 64, 2, down), Bottleneck(64, 32, 1, wide), Bottleneck(128, 32)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return output


@pytest.mark.parametrize("channels_last", [True, False])
def test_autocast_network_matches_stock(channels_last: bool) -> None:
    """Under autocast, a fused network's error against float64 is that of the stock network under autocast."""
    torch.manual_seed(3)
    stock = SmallResNet().train()
    x, target = torch.randn(8, 3, 24, 24), torch.randint(0, 10, (8,))
    if channels_last:
        stock, x = stock.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)

    def gradients(network: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = network(x)
        F.cross_entropy(y if y.dtype == torch.float64 else y.float(), target).backward()
        found = {name: parameter.grad for name, parameter in network.named_parameters()}
        assert all(grad is not None for grad in found.values())
        return {"output": y.detach(), **found, **dict(network.named_buffers())}  # type: ignore[dict-item]

    exact = gradients(copy.deepcopy(stock).double(), x.double(), False)
    theirs = gradients(copy.deepcopy(stock), x, True)
    ours = gradients(fused_res.fuse(copy.deepcopy(stock)), x, True)
    for name, reference in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        limit = 1.5 * relative_error(theirs[name], reference.double()) + 2e-3
        assert relative_error(ours[name], reference.double()) <= limit, name


def test_training_maps_no_memory_in_the_steady_state() -> None:
    resource = pytest.importorskip("resource")
    network = fused_res.fuse(SmallResNet().to(memory_format=torch.channels_last))
    x = torch.randn(32, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(x).float().square().mean()
        loss.backward()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    for _ in range(4):
        step()
    gc.collect()
    # 4 MB, of 150 MB of activations: what malloc does with small blocks is not ours.
    assert min(faults() for _ in range(5)) <= 1000
