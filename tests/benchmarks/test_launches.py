"""`launches`: recording of launches without a GPU, the model of their times, and the committed predictions."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_model, launches, prediction, published
from benchmarks.events import Event, convolution_gemm
from benchmarks.gpu_model import GPUS, Cache, Product, Tile, Work
from benchmarks.launch_model import compiled_works, works_of
from benchmarks.network import build_network
from benchmarks.recording import Recorder
from benchmarks.resources import Kernel, Resources
from tests.support.benchmark_cli import assert_report_files, run_benchmark
from tools.cuda_sim.simulator import build

H200 = GPUS["h200"]
#: On a machine with a GPU the backend's library is loaded, not the simulator's.
needs_simulator = pytest.mark.skipif(
    isinstance(build(), str) or torch.cuda.is_available(), reason="the simulator cannot be built, or a GPU is available"
)
BACKENDS = ["triton", pytest.param("cuda", marks=needs_simulator)]


class CommittedResources(Resources):
    """The committed resource usage; a variant that is missing fails the test instead of being compiled."""

    def measure(self, events: Iterable[Event]) -> None:
        missing = [event.variant for event in self.missing(events)]
        assert not missing, f"run `python -m benchmarks launches --write`: not in {prediction.FILE.name}: {missing[:3]}"


@pytest.fixture(scope="module")
def resources() -> CommittedResources:
    return CommittedResources(json.loads(prediction.FILE.read_text())["resources"])


# Published timings


@pytest.mark.parametrize("timing", published.TIMINGS, ids=lambda timing: timing.name)
def test_model_predicts_a_published_timing(timing: published.Timing) -> None:
    assert abs(timing.error) <= 0.15, f"{timing.predicted * 1e6:.1f} us, published {timing.seconds * 1e6:.1f} us"


def test_published_timings_cover_the_model() -> None:
    assert {timing.kind for timing in published.TIMINGS} == {"convolution", "product", "pass", "step"}
    held_out = [timing for timing in published.TIMINGS if not timing.fitted]
    assert {timing.kind for timing in held_out} == {"convolution", "product", "pass", "step"}


# Recording


def _channels_last(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_norm_moves_the_bytes_counted_by_hand(backend: str) -> None:
    """Forward: statistics read x; apply reads x and the residual, and writes y and one bit per element."""
    from fused_res.functional import batch_norm_act

    x, residual = (_channels_last(256, 128, 28, 28, requires_grad=True) for _ in range(2))
    weight, bias, mean, var = (torch.empty(128, device="meta") for _ in range(4))
    with Recorder(backend) as recorder:
        y = batch_norm_act(x, mean, var, weight.requires_grad_(), bias.requires_grad_(), residual, True)
        forward = len(recorder.events)
        torch.autograd.grad(y, [x, residual], torch.empty_like(y))
    n = x.numel() * 2
    moved = {}
    for event in recorder.events:
        name = _plain_name(event)
        moved[name] = moved.get(name, 0) + sum(t.bytes for t in event.reads if t.bytes >= n // 16)
    mask = n // 16
    assert moved["partials_kernel"] == n
    assert moved["apply_kernel"] == 3 * n + mask
    assert moved["sums_kernel"] == 2 * n + mask
    assert moved["dx_kernel"] == 4 * n + mask  # dy, x, mask; dx and the residual's gradient
    ours = [event for event in recorder.events[:forward] if event.backend == backend]
    assert [_plain_name(event) for event in ours][:3] == ["partials_kernel", "merge", "apply_kernel"]
    assert all(event.threads % 32 == 0 and event.blocks > 0 for event in ours)


def _plain_name(event: Event) -> str:
    names = ("partials_kernel", "sums_kernel", "apply_kernel", "dx_kernel")
    if "sum_partials_kernel" in event.kernel or "merge" in event.kernel:
        return "merge"
    return next((name for name in names if name in event.kernel), event.kernel)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preference", ["aten", "planned", "fused"])
def test_recorded_step_has_the_flops_of_the_network(backend: str, preference: str) -> None:
    """Every convolution is computed three times, except for the input gradient of the stem, by whichever kernel."""
    events = launches.record_training("resnet50", 8, backend, preference)
    network = build_network("resnet50", 8, 224)
    convolutions = [layer for block in network.blocks for layer in block.convolutions]
    expected = 3 * sum(layer.flops for layer in convolutions) - convolutions[0].flops + 3 * 2 * 8 * 2048 * 1000
    assert sum(event.gemm.flops for event in events if event.gemm) == pytest.approx(expected, rel=1e-12)
    fused = {event.operator.partition("::")[2] for event in events if event.gemm and event.backend == backend}
    assert fused == (set() if preference == "aten" else {"conv_bn_stats", "conv_dgrad", "conv_wgrad"})
    formed = [event.formed[0] for event in events if event.operator.endswith("conv_dgrad") and event.gemm]
    # Where it is planned, the first unit of all but the first block of layer 3, and of layer 2 where that is not fused
    # with its norms, has no prologue.
    planned = {"triton": 5, "cuda": 3 + 5}[backend]
    assert formed.count(False) == (planned if preference == "planned" else 0)


def test_recorded_stock_step_is_stock_pytorch() -> None:
    events = launches.record_training("resnet50", 8)
    counts = Counter(event.kernel for event in events)
    assert counts["convolution"] == counts["native_batch_norm"] == counts["native_batch_norm_backward"] == 53
    assert counts["convolution_backward"] == 105  # two gradients each, one for the stem
    assert counts["relu_"] == counts["threshold_backward"] == 49
    assert counts["add"] == 16  # the gradients that meet at a block's input
    assert {event.backend for event in events} == {"aten"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_inference_is_the_packed_network(backend: str) -> None:
    """One operator per convolution, with norm, addition and ReLU in it; weights are folded before the recorded call."""
    expected = {"conv_bias_act": 53, "max_pool2d_with_indices": 1, "mean": 1, "addmm": 1}
    events = launches.record_inference("resnet50", 8, backend, "fused")
    operators = Counter(event.operator.partition("::")[2] for event in events if "split_k" not in event.kernel)
    assert operators == expected
    assert sum(event.gemm is not None for event in events) == 53 + 1
    aten = Counter(event.kernel for event in launches.record_inference("resnet50", 8, backend, "aten"))
    del expected["conv_bias_act"]
    assert aten == expected | {"convolution": 53, "relu_": 49, "add_": 16}


def test_strided_pointwise_convolution_skips_pixels() -> None:
    x, weight = _channels_last(4, 64, 56, 56), _channels_last(256, 64, 1, 1)
    with Recorder() as recorder, torch.no_grad():
        torch.conv2d(x, weight, None, stride=2)
    (event,) = recorder.events
    assert event.reads[0].bytes == x.numel() * 2 // 4
    assert event.gemm == convolution_gemm("forward", x.shape, weight.shape, (4, 256, 28, 28))


def test_recorder_leaves_the_backends_as_they_were() -> None:
    from fused_res.backends import registry

    before = dict(registry._resolve_cache), registry._conv_preference
    launches.record_inference("resnet18", 1, "triton", "aten")
    assert (dict(registry._resolve_cache), registry._conv_preference) == before


# The model


def test_cache_keeps_what_fits_and_only_that() -> None:
    cache = Cache(H200)
    small, large = cache.capacity // 4, cache.capacity + 1
    assert cache.misses([(0, small), (1, small)]) == 2 * small
    assert cache.misses([(0, small), (1, small)]) == 0
    assert cache.misses([(2, large)]) == large
    assert cache.misses([(0, small)]) == small  # evicted
    assert cache.misses([(2, large)]) == large  # never fits


def test_streaming_kernel_takes_its_bytes_at_the_streaming_bandwidth() -> None:
    size = 1 << 30
    one = gpu_model.predict(Work("copy", [(0, size), (1, size)]), H200)
    assert one.bound == "memory"
    assert one.device_bytes == 2 * size
    assert one.seconds == pytest.approx(2 * size / (4.8e12 * 0.918), rel=0.02)


def test_small_kernel_takes_a_launch() -> None:
    one = gpu_model.predict(Work("add", [(0, 256), (1, 256)]), H200)
    assert one.bound == "launch"
    assert one.seconds == pytest.approx(gpu_model.LAUNCH, rel=0.01)


def test_waves_count_the_slots_of_the_gpu() -> None:
    full = gpu_model.predict(Work("kernel", [(0, 1 << 28)], blocks=132 * 8, resident=8), H200)
    spilled = gpu_model.predict(Work("kernel", [(0, 1 << 28)], blocks=132 * 8 + 1, resident=8), H200)
    assert (full.waves, full.wave_efficiency) == (1.0, 1.0)
    assert spilled.wave_efficiency == pytest.approx(0.5, abs=0.01)


def test_few_blocks_cannot_use_the_bandwidth() -> None:
    one = gpu_model.predict(Work("merge", [(0, 1 << 28)], blocks=2, resident=4), H200)
    many = gpu_model.predict(Work("merge", [(0, 1 << 28)], blocks=2048, resident=4), H200)
    assert one.seconds > 50 * many.seconds


def test_product_is_quantized_to_tiles_and_waves() -> None:
    tile = Tile(128, 128)
    one, _, blocks = gpu_model.product_time(Product(128 * 132, 128, 4096), tile, 1, H200)
    two, _, more = gpu_model.product_time(Product(128 * 132 + 1, 128, 4096), tile, 1, H200)
    assert (blocks, more) == (132, 133)
    assert two > 1.8 * one
    assert gpu_model.tile_time(tile, 65, H200, False)[0] == gpu_model.tile_time(tile, 128, H200, False)[0]


@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [
        (Kernel("k", registers=32, shared=0, threads=256), 8),  # 2048 threads
        (Kernel("k", registers=96, shared=0, threads=256), 2),  # 65536 / (96 * 256), a quarter for each scheduler
        (Kernel("k", registers=128, shared=100 << 10, threads=128), 2),  # 228 KB
        (Kernel("k", registers=255, shared=0, threads=32), 8),
    ],
)
def test_resident_blocks(kernel: Kernel, blocks: int) -> None:
    assert kernel.resident_blocks(H200) == blocks


def test_compiled_network_moves_fewer_bytes_than_the_stock_one() -> None:
    events = launches.record_training("resnet50", 64)
    stock, compiled = works_of(events, H200), compiled_works(events, H200)
    # The ReLUs forward, the additions and the ReLUs backward are not separate passes.
    assert sum(w.bytes for w in compiled) < 0.85 * sum(w.bytes for w in stock)
    assert sum(w.flops for w in compiled) == sum(w.flops for w in stock)


def test_compiled_inference_has_one_elementwise_pass_for_each_norm() -> None:
    works = compiled_works(launches.record_inference("resnet50", 8), H200)
    assert sum(work.name == "elementwise" for work in works) == 53 - 4  # a projection's norm joins its block's addition


def test_compiled_norm_has_the_passes_counted_by_hand() -> None:
    """ReLU of a norm: statistics read x; one pass reads x and writes y. Backward: dy, y, x; then again, and dx."""
    x = _channels_last(64, 64, 56, 56, requires_grad=True)
    norm = torch.nn.BatchNorm2d(64, device="meta")
    with Recorder() as recorder:
        y = torch.relu_(norm(x))
        torch.autograd.grad(y, [x], _channels_last(64, 64, 56, 56))
    n = x.numel() * 2
    works = compiled_works(recorder.events, H200, [recorder.tensor_id(y)])
    large = [sum(size for _, size in work.touches if size >= n) // n for work in works]
    assert [count for count in large if count] == [1, 2, 3, 4]


# Predictions


@needs_simulator
@pytest.mark.parametrize("kind", ["op", "conv", "train", "infer"])
def test_committed_predictions_are_what_the_code_predicts(
    kind: str, resources: CommittedResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One batch size of each kind is enough to see a change, and quick.
    monkeypatch.setattr(prediction, "TRAIN_BATCHES", (256,))
    monkeypatch.setattr(prediction, "INFER_BATCHES", (1,))
    built = prediction.build(resources, [kind])["milliseconds"][kind]
    committed = json.loads(prediction.FILE.read_text())["milliseconds"][kind]
    assert built
    for case, times in built.items():
        assert times == pytest.approx(committed[case], rel=1e-3), f"{prediction.FILE.name} is out of date"


def test_tables_of_the_page_are_generated() -> None:
    page = prediction.PAGE.read_text()
    assert prediction.BEGIN + prediction.tables() + prediction.END in page


def test_predicted_looks_up_a_case() -> None:
    step = prediction.predicted("train", "resnet50 train 256x224x224", "eager-channels-last+graph")
    assert step is not None and 20 < step < 100
    assert prediction.predicted("op", "layer1 256x56x56 +add +relu", "ours-cuda") is not None
    assert prediction.predicted("train", "resnet50 train 256x224x224", "another") is None
    assert prediction.predicted("another", "case", "ours-cuda") is None


def test_predictions_name_the_cases_and_providers_of_the_benchmarks() -> None:
    from benchmarks import conv
    from benchmarks.cases import resnet50_op_cases
    from benchmarks.providers import INFERENCE_PROVIDERS, NETWORK_PROVIDERS, NORM_PROVIDERS

    committed = json.loads(prediction.FILE.read_text())["milliseconds"]
    assert set(committed["op"]) == {case.name for case in resnet50_op_cases(8, 224)}
    options = argparse.Namespace(model=["resnet50"], batch=8, size=224, quick=False, cases=None)
    assert set(committed["conv"]) == {case.name for case in conv.select_cases(options)}
    for kind, known in (("op", NORM_PROVIDERS), ("train", NETWORK_PROVIDERS), ("infer", INFERENCE_PROVIDERS)):
        for times in committed[kind].values():
            stock = [name for name in times if not name.startswith("ours")]
            assert set(stock) <= {*known, "compile-reduce-overhead"}


#: Kernels with launches above 20 us that fill less than 85 % of their waves, by backend, mode and batch size.
WAVE_FAILURES: dict[tuple[str, str, int], set[str]] = {
    # Two convolutions of layer 1, 24 us: 784 threadblocks of 128x64 for 528 slots, every byte read once. 64x64 would
    # fill the waves, and read the weight twice as often (csrc/cuda/gemm_partition.h).
    ("cuda", "train", 32): {"convolution_kernel"},
    ("cuda", "infer", 32): {"convolution_kernel"},
    # Two weight gradients of layer 1, 256 to 64 channels: one program on each multiprocessor, as every variant of the
    # tile is partitioned for. This variant, without a norm of the input, has the registers for two.
    # Four input gradients of layer 2, 24 us: 392 programs for 264 slots.
    ("triton", "train", 32): {"dgrad_kernel", "wgrad_kernel"},
    ("triton", "train", 256): {"wgrad_kernel"},
    ("cuda+triton", "train", 32): {"dgrad_kernel", "wgrad_kernel"},
    ("cuda+triton", "train", 256): {"wgrad_kernel"},
}


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("mode", launches.MODES)
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param(launches.AUTO, marks=needs_simulator)])
def test_long_launches_fill_their_waves(backend: str, mode: str, batch: int, resources: CommittedResources) -> None:
    events = launches.RECORD[mode]("resnet50", batch, backend, "planned")
    resources.measure(events)
    failures = launches.wave_failures(launches.predict_ours(backend, events, H200, resources).predictions)
    described = [f"{one.work.name} {one.work.blocks} blocks, {one.wave_efficiency:.0%}" for one in failures]
    assert {one.work.name for one in failures} == WAVE_FAILURES.get((backend, mode, batch), set()), described


def test_predicted_step_of_resnet50() -> None:
    """At most 33 ms at batch 256 with the default selection, and 1.15 times as fast as torch.compile's best."""
    step = "resnet50 train 256x224x224"
    ours, compiled = (prediction.predicted("train", step, name) for name in ("ours+graph", "compile-channels-last"))
    assert ours is not None and compiled is not None
    assert ours <= 33
    assert compiled / ours >= 1.15


@needs_simulator
def test_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_benchmark("launches", "--batch", "256", "--preference", "aten", out=tmp_path)
    assert_report_files(tmp_path, "launches")
    (case,) = document["runs"][0]["cases"]
    assert list(case["providers"]) == [
        "eager-channels-last", "compile-channels-last", "ours-norms", "ours-triton-norms", "ours-cuda-norms",
    ]  # fmt: skip
    ours = case["providers"]["ours-cuda-norms"]
    assert ours["launches"] == len(ours["table"])
    assert ours["gpu_s"] == pytest.approx(sum(float(row[-2]) for row in ours["table"]) * 1e-6, rel=0.01)
    printed = capsys.readouterr().out
    assert "launches: predicted for H200 SXM" in printed
    assert "wave efficiency" in printed
