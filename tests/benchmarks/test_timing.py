"""Measurement of the benchmarks: rounds, clocks, ceilings, allocator settings, and their tables."""

import os
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("tqdm")

from benchmarks import allocator, ceilings, environment, report, timing
from benchmarks.gpu.stand_in import stand_in
from fused_res import _extension


def test_ceilings_are_the_maximum_of_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, peaks, bf16_peaks = iter([3e9, 2e9, 2e9]), iter([5e11, 6e11]), iter([1e12, 9e11])
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda *_, **__: next(copies))
    monkeypatch.setattr(ceilings, "fma_peak", lambda: next(peaks))
    monkeypatch.setattr(ceilings, "bf16_peak", lambda: next(bf16_peaks))
    ceilings_of_run = ceilings.elementwise_max(ceilings.measure("cpu", True), ceilings.measure("cpu", True))
    assert ceilings_of_run == {"copy_bytes_per_s": 3e9, "fma_flops_per_s": 6e11, "bf16_flops_per_s": 1e12}
    assert ceilings.measure("cuda", True) == {"copy_bytes_per_s": 2e9}
    run = {"allocator": "warm", "environment": environment.describe() | {"backend": "cpu"}, "ceilings": ceilings_of_run}
    line = report.environment({"runs": [run]})
    assert (
        " · copy bandwidth 3.0 GB/s (read + write) · FMA peak 600 GFLOP/s · peak of bfloat16 products 1000 GFLOP/s"
        in line
    )


@pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason)
def test_fma_peak_is_plausible() -> None:
    """No GEMM exceeds it. Noisy neighbors may slow down either, so they are measured in turn."""
    peak = _extension.fma_peak
    with pytest.raises(ValueError, match="threads: expected 1 to"):
        peak(0)
    with pytest.raises(ValueError, match="threads: expected 1 to"):
        peak(torch.get_num_threads() + 1)
    size, peaks, products = 1024, [], []
    matrix = torch.randn(size, size)
    for _ in range(3):
        peaks.append(peak(torch.get_num_threads()))
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            products.append(2 * size**3 / (time.perf_counter() - start))
    assert max(peaks) > 1e9
    assert max(products) < 1.1 * max(peaks)
    assert ceilings.fma_peak() > 1e9


class FakeClock(timing.Clock):
    time = 0.0

    def now(self) -> float:
        return self.time


class PreparingClock(FakeClock):
    prepared = 0

    def prepare(self, lead: float) -> None:
        self.prepared += 1
        self.time += 100.0

    def seconds(self, before: float, after: float) -> float:
        return 2 * (after - before)


def test_preparation_of_a_call_is_not_timed() -> None:
    clock = PreparingClock()

    def step(_: None) -> None:
        clock.time += 0.002

    samples = timing.measure_interleaved({"a": {"forward": step}}, repeat=3, min_time=0, label="test", clock=clock)
    assert samples["a"].phases["forward"] == pytest.approx([0.004] * 3)
    assert clock.prepared == clock.warm_up_calls + 3 * 3  # three calls make a sample of ten milliseconds


@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_other_threads_fall_asleep_before_each_sample(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a short call, the provider's own threads are woken by an untimed call."""
    clock, order = FakeClock(), []
    monkeypatch.setattr(timing.time, "sleep", order.append)

    def step(_: None) -> None:
        order.append("call")
        clock.time += seconds

    samples = timing.measure_interleaved(
        {"a": {"forward": step}}, repeat=2, min_time=0, label="test", clock=clock, sample_seconds=0, idle=0.06
    )
    before = [0.06, "call"] if seconds < timing.LONG_CALL_SECONDS else [0.06]
    assert order == ["call"] * clock.warm_up_calls + 2 * [*before, "call"]
    assert samples["a"].phases["forward"] == pytest.approx([seconds] * 2)


def test_timing_is_interleaved_and_adds_up() -> None:
    clock = FakeClock()
    order = []

    def phase(name: str, seconds: float):
        def run(state):
            order.append((name, state))
            clock.time += seconds
            return name

        return run

    workloads = {
        "a": {"forward": phase("a1", 1.0), "backward": phase("a2", 2.0)},
        "b": {"forward": phase("b1", 4.0)},
    }
    samples = timing.measure_interleaved(workloads, repeat=3, min_time=0.0, label="test", clock=clock)
    assert samples["a"].phases == {"forward": [1.0] * 3, "backward": [2.0] * 3}
    assert samples["b"].summary()["median_s"] == 4.0
    one_round = [("a1", None), ("a2", "a1"), ("b1", None)]
    assert order[-9:] == 3 * one_round
    # 5 seconds for each of two workloads, at 7 seconds per round
    samples = timing.measure_interleaved(workloads, repeat=1, min_time=5.0, label="test", clock=clock)
    assert samples["a"].summary()["rounds"] == 2


def test_quantiles_and_tables() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [timing.quantile(values, f) for f in (0, 0.1, 0.5, 1)] == pytest.approx([1, 1.4, 3, 5])
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4)
    assert report.table(["case", "ms"], [["a", 1], ["bcdef", 12.5]]).splitlines() == [
        "case     ms",
        "-----  ----",
        "a         1",
        "bcdef  12.5",
    ]


def test_allocator_settings_replace_existing_variables() -> None:
    environment = {"PATH": "p", "MALLOC_TOP_PAD_": "1"}
    assert allocator.environment_for("as-shipped", environment) == {"PATH": "p"}
    assert allocator.environment_for("warm", environment) == {"PATH": "p", **allocator.SETTINGS["warm"]}
    assert allocator.settings_for("both") == ["as-shipped", "warm"]
    assert allocator.settings_for("warm") == ["warm"]
    assert allocator.settings_for("both", "cuda") == ["as-shipped"]
    assert not set(allocator.VARIABLES) & os.environ.keys(), "the tests themselves use the default allocator"


class RecordedOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_single_operators_on_a_gpu_are_queued_behind_a_sleep_and_find_a_cold_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache is flushed by reading: what a write leaves would be written back during the timed call."""
    slept: list[int] = []
    with stand_in() as calls:
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (slept.append(cycles), calls.append("sleep")))
        clock = timing.EventClock(cold=True, device="cpu")
        assert clock._flush.nbytes == 2 * torch.cuda.get_device_properties().L2_cache_size
        with RecordedOperators() as operators:
            clock.prepare(0.001)
        assert operators.names == ["aten.sum.default"]
        assert slept == [int(2 * 0.001 * timing.CYCLES_PER_SECOND)]
        clock.prepare(60.0)
        assert slept[-1] == int(timing.LONGEST_SLEEP_SECONDS * timing.CYCLES_PER_SECOND)

        calls.clear()
        slept.clear()
        step = {"forward": lambda _: time.sleep(0.002), "backward": lambda _: calls.append("backward")}
        timing.measure_interleaved({"a": step}, repeat=2, min_time=0, label="test", clock=clock)
        one = ["sleep", "record", "record", "backward", "record", "record"]  # the last phase's end is recorded twice
        assert calls == (clock.warm_up_calls + 2) * one
        assert slept[0] == 0 and all(0.002 < cycles / timing.CYCLES_PER_SECOND <= 0.02 for cycles in slept[1:])

        calls.clear()
        timing.EventClock(cold=False, device="cpu").prepare(0.001)
        assert calls == [], "networks are timed as they run"


def test_rounds_count_the_preparation_of_a_call() -> None:
    clock = PreparingClock()
    clock.preparation = lambda lead: 0.098  # type: ignore[method-assign]

    def step(_: None) -> None:
        clock.time += 0.001

    samples = timing.measure_interleaved({"a": {"forward": step}}, repeat=1, min_time=2.0, label="test", clock=clock)
    assert samples["a"].summary()["rounds"] == 4  # of five calls that take 0.1 s each
