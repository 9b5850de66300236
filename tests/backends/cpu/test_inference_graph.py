"""Inference graphs on the CPU: the arena plan, outputs compared with float64, and cache invalidation."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fused_res
from fused_res.dispatch import Machine
from fused_res.spec import BlockSpec, GlobalAveragePoolSpec, PoolSpec, UnitSpec
from fused_res.testing import stub_torchvision_operators
from tests.support.cpu_backends import BACKENDS
from tests.support.model_comparison import randomize_norms, small_resnet

stub_torchvision_operators()

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")

THREE, ONE = UnitSpec(padding=(1, 1)), UnitSpec()
STRIDED = UnitSpec(stride=(2, 2), padding=(1, 1))
PROJECTION = UnitSpec(stride=(2, 2), activation="identity")
BASIC, BOTTLENECK = BlockSpec((THREE, THREE), "identity"), BlockSpec((ONE, THREE, ONE), "identity")

POOLING, LINEAR = GlobalAveragePoolSpec(), BlockSpec((UnitSpec(activation="identity"),))

#: Blocks, shapes of their weights, input shape (C, H, W).
CASES: dict[str, tuple[tuple[BlockSpec | GlobalAveragePoolSpec, ...], list[tuple[int, ...]], tuple[int, ...]]] = {
    "basic": ((BASIC,), [(64, 64, 3, 3)] * 2, (64, 13, 11)),
    "bottleneck": ((BOTTLENECK,), [(32, 96, 1, 1), (32, 32, 3, 3), (96, 32, 1, 1)], (96, 9, 14)),
    "stage": (
        (BlockSpec((STRIDED, THREE), PROJECTION), BASIC, BASIC),
        [(48, 32, 3, 3), (48, 48, 3, 3), (48, 32, 1, 1), *[(48, 48, 3, 3)] * 4],
        (32, 14, 14),
    ),
    "bottlenecks": (
        (BlockSpec((ONE, STRIDED, ONE), PROJECTION), BOTTLENECK, BOTTLENECK),
        [(32, 64, 1, 1), (32, 32, 3, 3), (128, 32, 1, 1), (128, 64, 1, 1)]
        + [(32, 128, 1, 1), (32, 32, 3, 3), (128, 32, 1, 1)] * 2,
        (64, 15, 14),
    ),
    "stem": ((BlockSpec((UnitSpec((2, 2), (3, 3)),), "none", PoolSpec()),), [(64, 3, 7, 7)], (3, 45, 64)),
    # The identity shortcut is the input of the convolution that it is added to.
    "one unit": ((BlockSpec((THREE,)), BlockSpec((THREE,), "identity")), [(4, 4, 3, 3)] * 2, (4, 9, 9)),
    "no shortcut": ((BlockSpec((ONE, THREE)),), [(40, 24, 1, 1), (24, 40, 3, 3)], (24, 7, 7)),
    "classifier": ((BASIC, POOLING, LINEAR), [*[(20, 20, 3, 3)] * 2, (37, 20, 1, 1)], (20, 7, 7)),
    "pooling": ((BlockSpec((ONE,)), POOLING), [(531, 5, 1, 1)], (5, 12, 23)),
    "only a classifier": ((POOLING, LINEAR), [(1000, 1025, 1, 1)], (1025, 3, 1)),
}


#: Largest relative error of rounding once to the dtype, and of a convolution in float32.
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


def plan_case(case: str, batch: int, dtype: torch.dtype) -> Any:
    from fused_res import _extension
    from fused_res.backends.cpu import inference_graph

    blocks, weights, shape = CASES[case]
    return inference_graph.plan(blocks, tuple(weights), (batch, *shape), dtype, True, Machine(_extension.cpu_isa()))


def float64_reference(
    blocks: tuple[BlockSpec | GlobalAveragePoolSpec, ...], x: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    tensors = iter(zip(weights, biases, strict=True))

    def convolve(x: Tensor, unit: UnitSpec, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight.double(), bias.double(), unit.stride, unit.padding, unit.dilation)

    x = x.double()
    for block in blocks:
        if isinstance(block, GlobalAveragePoolSpec):
            x = x.mean((2, 3), keepdim=True)
            continue
        parameters = [next(tensors) for _ in block.convolutions]
        residual = x if block.shortcut == "identity" else None
        if block.projection is not None:
            residual = convolve(x, block.projection, *parameters[-1])
        for index, unit in enumerate(block.units):
            x = convolve(x, unit, *parameters[index])
            if index == len(block.units) - 1 and residual is not None:
                x = x + residual
            x = x.relu() if unit.relu else x
        if block.pool is not None:
            x = F.max_pool2d(x, block.pool.kernel_size, block.pool.stride, block.pool.padding)
    return x


@pytest.mark.parametrize("arena", [4, 1 << 18, 1 << 32])  # bytes: chunks of one batch element, of some, of all
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_graph_matches_float64(
    case: str, dtype: torch.dtype, batch: int, arena: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_res.backends.cpu import convolution, inference_graph

    blocks, shapes, input_shape = CASES[case]
    monkeypatch.setattr(inference_graph, "_MAX_ARENA_BYTES", arena)
    inference_graph.plan.cache_clear()
    plan = plan_case(case, batch, dtype)
    inference_graph.plan.cache_clear()
    generator = torch.Generator().manual_seed(prod(input_shape))
    x = (torch.randn(batch, *input_shape, generator=generator) + 1).to(dtype)
    weights = [(torch.randn(shape, generator=generator) / prod(shape[1:]) ** 0.5).to(dtype) for shape in shapes]
    biases = [torch.randn(shape[0], generator=generator) for shape in shapes]
    specs = [spec for block in blocks if isinstance(block, BlockSpec) for spec in block.convolutions]
    packed = [
        convolution.pack(weight, convolution.KERNELS[selection.name], spec.stride)
        for weight, selection, spec in zip(weights, plan.selections, specs, strict=True)
    ]
    output = plan.run(x, packed, biases)
    expected = float64_reference(blocks, x, weights, biases)
    assert output.shape == expected.shape and output.is_contiguous(memory_format=torch.channels_last)
    assert output.dtype is dtype
    # Values are rounded once after each step; the errors of consecutive steps add in quadrature.
    count = len(shapes) + blocks.count(POOLING)
    assert (output - expected).norm() <= ROUNDING[dtype] * count**0.5 * expected.norm()
    copied = output.clone()
    plan.run(x * 2, packed, biases)
    assert torch.equal(output, copied), "the next call overwrote the output"


@pytest.mark.parametrize("case", CASES)
def test_arena_has_no_overlapping_live_buffers(case: str) -> None:
    from fused_res.backends.cpu import inference_graph

    blocks, _, _ = CASES[case]
    nodes = inference_graph._graph_nodes(blocks)
    sizes = [100 + 7 * value for value in range(len(nodes) + 1)]
    if any(block.shortcut != "none" for block in blocks if isinstance(block, BlockSpec)):
        sizes = [100] * len(sizes)  # a residual that is overwritten by a sum must have the sum's size
    offsets, arena = inference_graph._plan_arena(nodes, sizes)
    for index, node in enumerate(nodes):
        later = nodes[index + 1 :]
        # Live while node `index` runs: its input, every value that a later node reads, and its output.
        live = {node.input_value} | {v for other in later for v in (other.input_value, other.residual) if v is not None}
        live = {value for value in live if value <= index}
        if node.residual is not None and node.residual in live and offsets[node.residual] == offsets[index + 1]:
            assert node.residual != node.input_value  # the convolution reads its input while it writes the sum
            assert not any(node.residual in (other.input_value, other.residual) for other in later)
            live.discard(node.residual)  # overwritten in place at its last use
        spans = sorted((offsets[v], offsets[v] + sizes[v]) for v in {*live, index + 1} if offsets[v] >= 0)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        assert all(end <= arena for _, end in spans)
        outside = [offsets[v] for v in {*live, index + 1} if offsets[v] < 0]
        assert len(outside) == len(set(outside))


def network() -> Any:
    from fused_res.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=10).eval()


def selected(frozen: Any) -> dict[nn.Module, str]:
    """Return the algorithm that each convolution of a frozen model ran last."""
    return {conv: selection.name for conv, selection in frozen._fused_res.packed.selected().items()}


@torch.inference_mode()
def test_winograd_disabled_accuracy_vs_stock() -> None:
    model = network()
    x = torch.randn(2, 3, 64, 64)
    expected = fused_res.unfuse(network()).double()(x.double())
    stock_error = (fused_res.unfuse(network())(x) - expected).norm()
    with fused_res.backends.use("auto", winograd=False):
        frozen = fused_res.freeze(model)
        assert (frozen(x) - expected).norm() <= 2 * stock_error + 1e-6 * expected.norm()
    algorithms = selected(frozen)
    assert len(algorithms) == 21 and set(algorithms.values()) == {"direct"}
    assert (fused_res.freeze(model)(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="winograd must be"):
        fused_res.backends.use("auto", winograd="no")  # type: ignore[arg-type]


@pytest.fixture
def graph_dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each run of an inference graph."""
    from fused_res import _extension
    from fused_res.backends.cpu.inference_graph import InferenceGraph

    pytest.importorskip("torchvision")
    if _extension.cpu_isa() == "baseline":
        pytest.skip("baseline: oneDNN computes the convolutions")
    dtypes: list[torch.dtype] = []
    run = InferenceGraph.run

    def record(graph: InferenceGraph, x: Tensor, *operands: Any) -> Tensor:
        dtypes.append(x.dtype)
        return run(graph, x, *operands)

    monkeypatch.setattr(InferenceGraph, "run", record)
    return dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_error_under_autocast_is_at_most_stocks(dtype: torch.dtype, graph_dtypes: list[torch.dtype]) -> None:
    """The error of the last feature map against float64, over three networks: each runs as one graph.

    It is 0.5 to 1.1 times stock's in 12 networks. That of the logits, 0.4 to 1.5 times, is mostly their own rounding.
    """
    x, errors = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1)), torch.zeros(2).double()
    for seed in range(3):
        model = randomize_norms(small_resnet("Bottleneck")).float().eval()
        model.avgpool = model.fc = nn.Identity()
        torch.manual_seed(seed)
        for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
            conv.reset_parameters()
        with torch.autocast("cpu", dtype):
            outputs = fused_res.freeze(model)(x), model(x)
        exact = deepcopy(model).double()(x.double())
        assert outputs[0].dtype is outputs[1].dtype is dtype
        errors += torch.stack([(y - exact).square().sum() / exact.square().sum() for y in outputs])
    assert graph_dtypes == [dtype] * 3
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_eight_threads_of_a_float32_model_in_half_precision(
    dtype: torch.dtype, graph_dtypes: list[torch.dtype]
) -> None:
    """With ``freeze(dtype=...)`` and under autocast, all threads get the bits of a call alone."""
    source = randomize_norms(small_resnet("Bottleneck")).float().eval()
    inputs = [torch.randn(n, 3, 8 * n + 33, 40) for n in range(1, 9)]
    frozen = fused_res.freeze(source, dtype=dtype)
    expected = [frozen(x) for x in inputs]
    with torch.autocast("cpu", dtype):
        assert torch.equal(fused_res.freeze(source)(inputs[0]), expected[0])
    assert graph_dtypes == [dtype] * 9 and expected[0].dtype is dtype
    with ThreadPoolExecutor(len(inputs)) as threads:
        for model in (frozen, deepcopy(frozen)):  # the copy packs its weights in all threads at once
            for _ in range(5):
                for actual, alone in zip(threads.map(torch.inference_mode()(model), inputs), expected, strict=True):
                    assert torch.equal(actual, alone)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@torch.inference_mode()
def test_concurrent_calls_of_one_frozen_model_are_bitwise_equal(dtype: torch.dtype) -> None:
    """Threads that call one model with different shapes at the same time do not affect each other's results."""
    frozen = fused_res.freeze(network().to(dtype))
    inputs = [torch.randn(n, 3, size, size).to(dtype) for n, size in ((1, 64), (3, 64), (2, 75), (5, 33))]
    expected = [frozen(x) for x in inputs]
    errors: list[int] = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                if not torch.equal(frozen(inputs[index]), expected[index]):
                    errors.append(index)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_results_are_bitwise_equal_for_any_thread_count() -> None:
    frozen = fused_res.freeze(network())
    stem = fused_res.freeze(nn.Sequential(frozen.conv1, frozen.bn1, frozen.relu, frozen.maxpool))
    x = torch.randn(3, 3, 70, 64)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append([frozen.layer1(torch.ones(3, 64, 17, 16)), stem(x), frozen(x)])
    finally:
        torch.set_num_threads(before)
    assert len(selected(frozen.layer1)) == 4 and len(selected(stem)) == 1
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))


def test_packed_weights_use_at_most_four_times_the_memory() -> None:
    """Each weight is packed once, also if a part of the model is called by itself; no folded copy of it is kept."""
    frozen = fused_res.freeze(network())
    frozen(torch.randn(1, 3, 64, 64))
    frozen.layer1(torch.randn(1, 64, 16, 16))
    programs = [frozen._fused_res.packed, frozen.layer1._fused_res.packed]
    used = [[conv._layer for one in p._sequences.values() for conv in one.last.convolutions] for p in programs]
    assert [len(layers) for layers in used] == [21, 4] and set(used[1]) <= set(used[0])
    for layer in used[0]:
        (packed,) = layer._packed.values()
        assert 0 < packed.nbytes <= 4.5 * layer.tensors.weight.nbytes


def test_hook_inside_a_stage_is_called() -> None:
    frozen = fused_res.freeze(network())
    x = torch.randn(1, 3, 64, 64)
    expected, hook_calls = frozen(x), []
    layer: nn.Module = frozen.layer2[1].conv1
    handle = layer.register_forward_hook(lambda *_: hook_calls.append(1))
    assert torch.allclose(frozen(x), expected, rtol=1e-4, atol=1e-5) and hook_calls == [1]
    handle.remove()
    assert torch.equal(frozen(x), expected) and hook_calls == [1]


def test_weight_changed_in_place_is_repacked() -> None:
    frozen = fused_res.freeze(network())
    x = torch.randn(1, 3, 64, 64)
    before = frozen(x)
    frozen.layer1[0].conv1.weight.mul_(2)
    after = frozen(x)
    assert not torch.allclose(before, after)
    assert torch.equal(after, frozen(x))


@torch.no_grad()
def test_cached_graphs_are_invalidated() -> None:
    """Graphs are cached by shape, and rebuilt for replaced tensors and layers, changed settings and copied models."""
    frozen = fused_res.freeze(network())
    small, large = torch.randn(1, 3, 64, 64), torch.randn(2, 3, 96, 64)
    expected = [frozen(small), frozen(large)]
    other = fused_res.freeze(network())
    for _ in range(2):
        assert torch.equal(frozen(small), expected[0]) and torch.equal(frozen(large), expected[1])
    twin = deepcopy(frozen)
    frozen.layer1[1].bn2.bias = nn.Parameter(frozen.layer1[1].bn2.bias + 1, requires_grad=False)
    assert not torch.allclose(frozen(small), expected[0]) and torch.equal(twin(small), expected[0])
    conv = twin.layer2[1].conv1
    with fused_res.backends.use("auto", winograd=False):
        assert not torch.equal(twin(small), expected[0])
        assert selected(twin)[conv] == "direct"
    assert torch.equal(twin(small), expected[0]) and selected(twin)[conv].startswith("winograd")
    assert torch.equal(other(large), expected[1])
    twin.layer2[1].conv1 = other.layer2[1].conv2
    assert not torch.allclose(twin(small), expected[0])
    twin.layer2[1].conv1 = conv
    assert torch.equal(twin(small), expected[0])
    block = other.layer3[1]
    relu, block.relu = block.relu, nn.Identity()
    assert not torch.allclose(other(small), expected[0])
    block.relu = relu
    assert torch.equal(other(small), expected[0])
    removed = other.layer1[1]
    del other.layer1[1]
    assert not torch.allclose(other(small), expected[0])
    other.layer1.append(removed)
    assert torch.equal(other(small), expected[0])


@torch.no_grad()
def test_non_contiguous_norms() -> None:
    frozen = fused_res.freeze(network())
    x = torch.randn(1, 3, 64, 64)
    expected = frozen(x)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 1)[:, 0]

    norms = [module for module in frozen.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight, norm.bias = (nn.Parameter(spread(t), requires_grad=False) for t in (norm.weight, norm.bias))
        norm.running_mean, norm.running_var = spread(norm.running_mean), spread(norm.running_var)
    assert len(norms) == 20 and not norms[0].bias.is_contiguous()
    assert torch.equal(frozen(x), expected) and len(selected(frozen)) == 21


def test_flop_count_with_native_convolutions() -> None:
    """FlopCounterMode, a dispatch mode, counts ATen's convolutions; they run in place of the native kernels."""
    x = torch.randn(4, 32, 28, 28).to(memory_format=torch.channels_last)
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)
    spec = BlockSpec((THREE,))
    norm = [torch.ones(32), torch.zeros(32), torch.zeros(32), torch.ones(32)]
    forward = 2 * x.numel() * 32 * 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fused_res.functional.conv_bias_act(x, weight, None, None, 1, 1)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        fused_res.functional.residual_block(
            x, spec, [weight, None, *norm], training=True, momentum=0.1
        ).sum().backward()
    assert counter.get_total_flops() == 2 * forward  # the forward and the weight gradient


@torch.inference_mode()
def test_dilated_filter_of_few_channels_in_bfloat16() -> None:
    """Products of bfloat16 do not support it, so that another algorithm is selected."""
    layers = nn.Conv2d(3, 40, 3, padding=2, dilation=2), nn.BatchNorm2d(40)
    model = randomize_norms(nn.Sequential(*layers)).float().eval()
    x = torch.randn(2, 3, 20, 21).bfloat16().to(memory_format=torch.channels_last)
    rounded = deepcopy(model).bfloat16()
    exact = deepcopy(rounded).double()(x.double())
    errors = [(y - exact).square().mean().sqrt() for y in (fused_res.freeze(rounded)(x), rounded(x))]
    assert errors[0] <= 1.05 * errors[1]
