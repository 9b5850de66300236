"""``freeze(tune=True)``: measured algorithms of inference, with times that the tests dictate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_res
from fused_res.dispatch import selection, tuning
from tests.support.cpu_backends import BACKENDS

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")


class Clock:
    """A clock that advances by the dictated seconds when an algorithm runs, and lists what ran."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.now, self.runs = seconds, 0.0, []

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, float]], Clock]]:
    """Function that starts with nothing measured, and with the given seconds of each algorithm (default: 10)."""
    monkeypatch.setattr(selection, "measured", {})
    monkeypatch.setattr(tuning, "measured", selection.measured)
    monkeypatch.setattr(tuning, "_faster_with_graph", {})

    def start(seconds: dict[str, float]) -> Clock:
        clock = Clock(seconds)
        kernels_type = tuning.Kernels
        implementation = kernels_type.implementation

        def timed(kernels: Any, operation: Any, algorithm: Any) -> Any:
            run = implementation(kernels, operation, algorithm)

            def call(*args: Any) -> Any:
                clock.now += seconds.get(algorithm.name, 10.0)
                clock.runs.append((algorithm.name, tuple(args[0].shape)))
                return run(*args)

            return call

        monkeypatch.setattr(kernels_type, "implementation", timed)
        monkeypatch.setattr(tuning, "time", clock)
        return clock

    from fused_res.backends.cpu import inference_graph

    inference_graph.plan.cache_clear()  # plans refer to what other tests measured
    yield start
    inference_graph.plan.cache_clear()


class Block(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    block = Block()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return block.eval()


X = torch.randn(2, 32, 12, 12, generator=torch.Generator().manual_seed(0))


def names(model: nn.Module) -> list[str]:
    """Return the algorithms that the two convolutions of a frozen block ran last."""
    selected = model.__dict__["_fused_res"].packed.selected()
    return [selected[conv].name for conv in (model.conv1, model.conv2)]


def check(block: Block, model: nn.Module, tolerance: float = 2e-5) -> None:
    """Compare with float64."""
    with torch.no_grad():
        expected = Block().double().eval()
        expected.load_state_dict(block.state_dict())
        torch.testing.assert_close(model(X).double(), expected(X.double()), rtol=tolerance, atol=tolerance)


def test_fastest_algorithm_runs_and_rules_are_ignored(measure: Any, block: Block) -> None:
    clock = measure({"winograd_f4x4": 9.0, "winograd_f2x2": 1.0})
    model = fused_res.freeze(block, "cpu", tune=True)
    check(block, model)
    assert names(model) == ["winograd_f2x2"] * 2
    assert "winograd_f2x2 1000000 us" in model.__dict__["_fused_res"].packed.selected()[model.conv1].reason
    # Every candidate is timed, those that are three times as slow only twice, but for the rules' choice.
    counts = {name: sum(ran == name for ran, _ in clock.runs) for name, _ in clock.runs}
    assert counts == {"winograd_f2x2": 14, "winograd_f4x4": 14, "direct": 4, "onednn": 4, "aten": 4}
    # Another model of the same shapes measures nothing, and the default selects by the rules.
    check(block, fused_res.freeze(block, "cpu", tune=True))
    assert len(clock.runs) == 40
    by_rules = fused_res.freeze(block, "cpu")
    check(block, by_rules)
    assert names(by_rules) == ["winograd_f4x4"] * 2
    # Another input shape is measured at its first call.
    with torch.no_grad():
        model(X[:1])
    assert len(clock.runs) == 80


@pytest.mark.parametrize(("seconds", "expected"), [(0.98, "winograd_f4x4"), (0.96, "direct")])
def test_ties_go_to_the_rules(measure: Any, block: Block, seconds: float, expected: str) -> None:
    measure({"winograd_f4x4": 1.0, "direct": seconds})
    model = fused_res.freeze(block, "cpu", tune=True)
    check(block, model)
    assert names(model) == [expected] * 2


def test_fastest_must_win_all_rounds_but_one() -> None:
    """A call that other processes stopped takes longer, whatever it ran."""
    baseline = [2.0] * 7
    assert tuning._is_faster([1.0] * 6 + [30.0], baseline)
    assert not tuning._is_faster([1.0] * 5 + [30.0] * 2, baseline)
    assert not tuning._is_faster([1.0, 1.0], baseline)


@pytest.mark.parametrize(("graph_call", "expected"), [(0.5, "direct"), (3.0, "onednn")])
def test_split_of_a_graph_must_pay(
    measure: Any, block: Block, monkeypatch: pytest.MonkeyPatch, graph_call: float, expected: str
) -> None:
    """oneDNN's convolutions are the fastest one by one, in two calls of a second; the graph is one call."""
    from fused_res.backends.cpu.conv_bias_act import BoundInferenceGraph

    clock = measure({"onednn": 1.0, "direct": 2.0})
    run = BoundInferenceGraph.run

    def timed(graph: Any, input: Tensor) -> Tensor:
        clock.now += graph_call
        return run(graph, input)

    monkeypatch.setattr(BoundInferenceGraph, "run", timed)
    model = fused_res.freeze(block, "cpu", tune=True)
    check(block, model)
    assert names(model) == [expected] * 2


def test_nothing_is_measured_where_it_must_not_be(measure: Any, block: Block) -> None:
    clock = measure({"winograd_f2x2": 1.0})
    model = fused_res.freeze(block, "cpu", tune=True)
    torch.use_deterministic_algorithms(True)
    try:
        check(block, model)
    finally:
        torch.use_deterministic_algorithms(False)
    with fused_res.backends.use("auto", convolution="aten"):
        check(block, model)
    assert not any(name != "aten" for name, _ in clock.runs)
    assert not selection.measured


def test_copies_and_new_weights_keep_the_choice(measure: Any, block: Block) -> None:
    import copy
    import pickle

    clock = measure({"winograd_f2x2": 1.0})
    model = fused_res.freeze(block, "cpu", tune=True)
    check(block, model)
    ran = len(clock.runs)
    with torch.no_grad():
        for one in (block, model):
            one.conv1.weight.mul_(0.5)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(block, one)
        assert names(one) == ["winograd_f2x2"] * 2
    assert len(clock.runs) == ran


def test_bfloat16_is_measured_as_such(measure: Any, block: Block) -> None:
    """The graph finds what was measured: its problems equal those of the convolutions."""
    measure({"direct": 1.0})
    model = fused_res.freeze(block, "cpu", tune=True).bfloat16()
    with torch.no_grad():
        output = model(X.bfloat16())
        expected = block.double()(X.double())
    assert {problem.dtype for _, problem in selection.measured} == {torch.bfloat16}
    assert names(model) == ["direct"] * 2
    assert (output - expected).norm() <= 0.02 * expected.norm()
