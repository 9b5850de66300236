"""Blocks in a row as one call on the CPU: where their values lie, and what comes out, against float64."""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import replace
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
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec
from tests.support.cpu_backends import BACKENDS

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")

THREE, ONE = UnitSpec(padding=(1, 1)), UnitSpec()
STRIDED = UnitSpec(stride=(2, 2), padding=(1, 1))
PROJECTION = UnitSpec(stride=(2, 2), activation="identity")
BASIC, BOTTLENECK = BlockSpec((THREE, THREE), "identity"), BlockSpec((ONE, THREE, ONE), "identity")

#: blocks, shapes of their weights, image
CASES: dict[str, tuple[tuple[BlockSpec, ...], list[tuple[int, ...]], tuple[int, ...]]] = {
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
    "no shortcut": ((BlockSpec((ONE, THREE)),), [(40, 24, 1, 1), (24, 40, 3, 3)], (24, 7, 7)),
}


def planned(case: str, images: int, winograd: bool = True) -> Any:
    from fused_res import _extension
    from fused_res.backends.cpu import inference_graph as program

    blocks, weights, image = CASES[case]
    return program.plan(blocks, tuple(weights), (images, *image), winograd, Machine(_extension.cpu_isa()))


def exact(blocks: tuple[BlockSpec, ...], x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    tensors = iter(zip(weights, biases, strict=True))

    def convolve(x: Tensor, unit: UnitSpec, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight.double(), bias.double(), unit.stride, unit.padding, unit.dilation)

    x = x.double()
    for block in blocks:
        own = [next(tensors) for _ in block.convolutions]
        residual = x if block.shortcut == "identity" else None
        if block.projection is not None:
            residual = convolve(x, block.projection, *own[-1])
        for index, unit in enumerate(block.units):
            x = convolve(x, unit, *own[index])
            if index == len(block.units) - 1 and residual is not None:
                x = x + residual
            x = x.relu() if unit.relu else x
        if block.pool is not None:
            x = F.max_pool2d(x, block.pool.kernel_size, block.pool.stride, block.pool.padding)
    return x


@pytest.mark.parametrize("arena", [1, 1 << 16, 1 << 30])  # floats: one image at a time, some, all
@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, images: int, arena: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_res.backends.cpu import convolution
    from fused_res.backends.cpu import inference_graph as program

    blocks, shapes, image = CASES[case]
    monkeypatch.setattr(program, "_ARENA", arena)
    program.plan.cache_clear()
    plan = planned(case, images)
    program.plan.cache_clear()
    generator = torch.Generator().manual_seed(prod(image))
    x = torch.randn(images, *image, generator=generator) + 1
    weights = [torch.randn(shape, generator=generator) / prod(shape[1:]) ** 0.5 for shape in shapes]
    biases = [torch.randn(shape[0], generator=generator) for shape in shapes]
    specs = [spec for block in blocks for spec in block.convolutions]
    packed = [
        convolution.pack(weight, convolution.TILES[kernel.name], spec.stride)
        for weight, kernel, spec in zip(weights, plan.kernels, specs, strict=True)
    ]
    output = plan.run(x, packed, biases)
    expected = exact(blocks, x, weights, biases)
    assert output.shape == expected.shape and output.is_contiguous(memory_format=torch.channels_last)
    # Every convolution may be off by 3e-6 of its output; a sum of squares over those in a row.
    assert (output - expected).norm() <= 3e-6 * len(shapes) ** 0.5 * expected.norm()
    kept = output.clone()
    plan.run(x * 2, packed, biases)
    assert torch.equal(output, kept), "an output lies in memory that the next call writes"


@pytest.mark.parametrize("case", CASES)
def test_places_of_living_values_do_not_overlap(case: str) -> None:
    from fused_res.backends.cpu import inference_graph as program

    blocks, _, _ = CASES[case]
    layers = program._layers(blocks)
    sizes = [100 + 7 * value for value in range(len(layers) + 1)]
    if len(blocks) > 1 or case in ("basic", "bottleneck"):
        sizes = [100] * len(sizes)  # what is written over by a sum has the sum's size
    places, arena = program._places(layers, sizes)
    for index, layer in enumerate(layers):
        later = layers[index + 1 :]
        # Alive when layer `index` runs: what it reads, and what a later layer will read; and what it writes.
        alive = {layer.reads} | {v for other in later for v in (other.reads, other.residual) if v is not None}
        alive = {value for value in alive if value <= index}
        if layer.residual is not None and layer.residual in alive and places[layer.residual] == places[index + 1]:
            assert not any(layer.residual in (other.reads, other.residual) for other in later)
            alive.discard(layer.residual)  # written over as it is read for the last time
        spans = sorted((places[v], places[v] + sizes[v]) for v in {*alive, index + 1} if places[v] >= 0)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        assert all(end <= arena for _, end in spans)
        outside = [places[v] for v in {*alive, index + 1} if places[v] < 0]
        assert len(outside) == len(set(outside))


def network() -> Any:
    from fused_res.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=10).eval()


@torch.inference_mode()
def test_winograd_off_is_as_exact_as_stock() -> None:
    model = network()
    x = torch.randn(2, 3, 64, 64)
    expected = fused_res.unfuse(network()).double()(x.double())
    stock = (fused_res.unfuse(network())(x) - expected).norm()
    with fused_res.backends.use("auto", winograd=False):
        frozen = fused_res.freeze(model)
        assert (frozen(x) - expected).norm() <= 2 * stock + 1e-6 * expected.norm()
        kernels = {m.kernel.name for m in frozen.modules() if getattr(m, "kernel", None)}
    assert kernels == {"direct"}
    assert (fused_res.freeze(model)(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="winograd must be"):
        fused_res.backends.use("auto", winograd="no")  # type: ignore[arg-type]


@torch.inference_mode()
def test_threads_sizes_and_batches_share_one_model() -> None:
    """Every caller gets its own answer, whatever the others run at the same time."""
    frozen = fused_res.freeze(network())
    inputs = [torch.randn(n, 3, size, size) for n, size in ((1, 64), (3, 64), (2, 75), (5, 33))]
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


def test_bits_do_not_depend_on_threads() -> None:
    frozen = fused_res.freeze(network())
    x = torch.randn(3, 3, 70, 64)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append([frozen.layer1(torch.ones(3, 64, 17, 16)), frozen.conv1(x)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in outputs[1:] for a, b in zip(outputs[0], one, strict=True))


def test_a_weight_packed_takes_four_times_its_memory_at_most() -> None:
    frozen = fused_res.freeze(network())
    frozen(torch.randn(1, 3, 64, 64))
    layers = [module for module in frozen.modules() if hasattr(module, "_packed")]
    packed = [(sum(p.tensor.nbytes for p in layer._packed.values()), layer.weight.nbytes) for layer in layers]
    assert len(packed) == 20 and all(0 < made <= 4.5 * plain for made, plain in packed)


def test_a_hook_inside_a_stage_is_called() -> None:
    frozen = fused_res.freeze(network())
    x = torch.randn(1, 3, 64, 64)
    expected, seen = frozen(x), []
    layer: nn.Module = frozen.layer2[1].conv1
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(frozen(x), expected, rtol=1e-4, atol=1e-5) and seen == [1]
    handle.remove()
    assert torch.equal(frozen(x), expected) and seen == [1]


def test_a_weight_changed_in_place_is_packed_again() -> None:
    frozen = fused_res.freeze(network())
    x = torch.randn(1, 3, 64, 64)
    before = frozen(x)
    frozen.layer1[0].conv1.weight.mul_(2)
    after = frozen(x)
    assert not torch.allclose(before, after)
    assert torch.equal(after, frozen(x))


def test_calls_are_prepared_for_shapes_and_looked_at_again() -> None:
    """A stage keeps what it has prepared; replaced tensors, other settings and copies get their own."""
    frozen = fused_res.freeze(network())
    small, large = torch.randn(1, 3, 64, 64), torch.randn(2, 3, 96, 64)
    expected = [frozen(small), frozen(large)]
    other = fused_res.freeze(network())
    for _ in range(2):
        assert torch.equal(frozen(small), expected[0]) and torch.equal(frozen(large), expected[1])
    twin = deepcopy(frozen)
    frozen.layer1[1].conv2.bias = frozen.layer1[1].conv2.bias + 1
    assert not torch.allclose(frozen(small), expected[0]) and torch.equal(twin(small), expected[0])
    with fused_res.backends.use("auto", winograd=False):
        assert not torch.equal(twin(small), expected[0])
        assert twin.layer2[1].conv1.kernel.name == "direct"
    assert torch.equal(twin(small), expected[0]) and twin.layer2[1].conv1.kernel.name.startswith("winograd")
    assert torch.equal(other(large), expected[1])
    twin.layer2[1].conv1 = other.layer2[1].conv2
    assert not torch.allclose(twin(small), expected[0])
    layer = other.layer3[1].conv1
    layer.spec = replace(layer.spec, activation="identity")
    assert not torch.allclose(other(small), expected[0])
    layer.spec = replace(layer.spec, activation="relu")
    assert torch.equal(other(small), expected[0])
    removed = other.layer1[1]
    del other.layer1[1]
    assert not torch.allclose(other(small), expected[0])
    other.layer1.append(removed)
    assert torch.equal(other(small), expected[0])


@torch.inference_mode()
def test_biases_that_are_not_dense() -> None:
    frozen = fused_res.freeze(network())
    x = torch.randn(1, 3, 64, 64)
    expected = frozen(x)
    for module in frozen.modules():
        if "bias" in module._buffers and module.bias is not None:
            module.bias = torch.stack((module.bias, torch.full_like(module.bias, torch.nan)), 1)[:, 0]
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)


def test_flops_are_counted() -> None:
    """By those who look at what reaches the dispatcher: they know ATen's convolution, and not ours."""
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
    assert counter.get_total_flops() == 2 * forward  # and the gradient of the weight
