"""The benchmarks: each subcommand runs and leaves its files; wrong providers are caught; the counts are
right."""

import argparse
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from benchmarks import __main__ as command_line
from benchmarks import (
    allocator,
    cases,
    check,
    data,
    everything,
    footprint,
    op,
    options,
    providers,
    report,
    timing,
    traffic,
)
from benchmarks.memory import Checkpointed

RUN = ("--quick", "--threads", "1", "--allocator")


def run(*arguments: str, out: Path) -> dict:
    command_line.main([*arguments, "--out", str(out)])
    return json.loads((out / f"{arguments[0]}.json").read_text())


def assert_files(out: Path, name: str) -> None:
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.txt").stat().st_size > 200


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_op(mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run("op", "--mode", mode, *RUN, "both" if mode == "train" else "as-shipped", out=tmp_path)
    assert_files(tmp_path, "op")
    printed = capfd.readouterr().out
    assert "geometric means over 3 shapes" in printed
    settings = ["as-shipped", "warm"] if mode == "train" else ["as-shipped"]
    assert [one["allocator"] for one in document["runs"]] == settings
    assert document["command"].startswith("python -m benchmarks op --mode")
    for one in document["runs"]:
        environment = one["environment"]
        assert environment["torch"] == torch.__version__
        assert environment["threads"] == 1
        assert environment["allocator_variables"] == allocator.SETTINGS[one["allocator"]]
        assert one["ceilings"]["copy_bytes_per_s"] > 0
        for case in one["cases"]:
            assert list(case["providers"]) == ["ours", "eager", "eager-channels-last"]
            assert all(0 <= share <= 1 for share in case["share_of_allowed_error"].values())
            for provider in case["providers"].values():
                assert 0 < provider["p10_s"] <= provider["median_s"] <= provider["p90_s"]
                assert len(provider["samples_s"]) == provider["rounds"] == 2
                assert list(provider["phases_s"]) == ["forward", "backward"][: 2 if mode == "train" else 1]


def test_op_compiled(tmp_path: Path) -> None:
    arguments = ("--providers", "ours+compile,compile-channels-last", "--cases", "+add", *RUN, "as-shipped")
    document = run("op", *arguments, out=tmp_path)
    ((case,),) = [one["cases"] for one in document["runs"]]
    assert list(case["providers"]) == ["ours+compile", "compile-channels-last"]


@pytest.mark.parametrize("name", ["block", "model"])
def test_modules(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run(name, *RUN, "as-shipped", out=tmp_path)
    assert_files(tmp_path, name)
    assert "time / ours" in capfd.readouterr().out
    (one,) = document["runs"]
    assert len(one["cases"]) == 2
    for case in one["cases"]:
        assert set(case["providers"]) == {"ours", "eager", "eager-channels-last"}
    if name == "model":
        train, evaluate = one["cases"]
        assert list(train["providers"]["ours"]["phases_s"]) == ["forward", "backward", "optimizer"]
        assert list(evaluate["providers"]["ours"]["phases_s"]) == ["forward"]


def test_memory(tmp_path: Path) -> None:
    document = run("memory", *RUN, "as-shipped", out=tmp_path)
    assert_files(tmp_path, "memory")
    (case,) = document["runs"][0]["cases"]
    ways = case["providers"]
    assert list(ways) == ["ours none", "ours norm", "ours conv", "eager", "eager-channels-last", "checkpoint"]
    saved = {way: values["saved_bytes"] for way, values in ways.items()}
    assert saved["ours conv"] <= saved["ours norm"] < saved["ours none"] <= saved["eager"]
    assert saved["checkpoint"] < saved["eager"] == saved["eager-channels-last"]
    for values in ways.values():
        assert values["hidden_bytes"] == 0
        assert values["saved_bytes"] <= values["held_bytes"] < values["peak_tensor_bytes"]
        assert values["resident_before_bytes"] < values["resident_peak_bytes"]


def test_all_runs_the_selection_and_ends_with_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "SELECTION", everything.SELECTION[:1])  # the others are run above
    command_line.main(["all", *RUN, "as-shipped", "--out", str(tmp_path)])
    summary = (tmp_path / "summary.txt").read_text()
    assert "op: geometric means" in summary
    assert capsys.readouterr().out.rstrip().splitlines()[-1].endswith(f"results in {tmp_path}")


def test_all_leaves_out_what_would_begin_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 1e6, 1e6])
    monkeypatch.setattr(everything, "SELECTION", everything.SELECTION[:2])
    monkeypatch.setattr(everything.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(everything.runner, "run", lambda *_: {"runs": []})
    monkeypatch.setattr(everything.report, "environment", lambda _: "machine")
    command_line.main(["all", "--out", str(tmp_path)])
    assert "left out, as this machine is slow today:\npython -m benchmarks op --providers" in capsys.readouterr().out


def test_selection_parses() -> None:
    parser = command_line.build_parser()
    titles = [part.title for part in everything.SELECTION]
    assert len(set(titles)) == len(titles)
    for part in everything.SELECTION:
        assert parser.parse_args([part.subcommand, *part.arguments]).subcommand == part.subcommand


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["op", "--providers", "ours,theirs"],
            "unknown provider 'theirs'; choose from ours, ours+compile, eager",
        ),
        (["op", "--providers", ""], "unknown provider ''"),
        (["op", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["block", "--batch", "many"], "expected a whole number of at least 1, got 'many'"),
        (["model", "--min-time", "-1"], "expected a number of seconds, 0 or more, got '-1'"),
        (["model", "--min-time", "nan"], "expected a number of seconds"),
        (["model", "--model", "vgg16"], "invalid choice: 'vgg16'"),
        (["memory", "--allocator", "cold"], "invalid choice: 'cold'"),
        (["roofline"], "invalid choice: 'roofline'"),
        ([], "the following arguments are required: subcommand"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(arguments)
    assert message in capsys.readouterr().err


def op_options(**changes: object) -> argparse.Namespace:
    parsed = command_line.build_parser().parse_args(["op", "--quick"])
    return argparse.Namespace(**{**vars(parsed), **changes})


def test_options_that_select_nothing_or_contradict() -> None:
    with pytest.raises(SystemExit, match="--cases 'layer9' matches none of: 8x6x6"):
        op.select_cases(op_options(cases="layer9"))
    parsed = command_line.build_parser().parse_args(["model", "--small", "--batch", "3"])
    with pytest.raises(SystemExit, match="leave out --batch"):
        command_line.model.select_cases(parsed)


def wrong_mean(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    output = F.batch_norm(input, mean, var, weight, bias, training=True)
    return F.relu(output + 1e-4 if residual is None else output + residual)


def wrong_gradient(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    """Right values; but the statistics are taken for constants in backward."""
    output = F.batch_norm(input, mean, var, weight, bias, training=True)
    constant = F.batch_norm(
        input,
        *(s.detach() for s in (input.mean((0, 2, 3)), input.var((0, 2, 3), correction=0))),
        weight,
        bias,
    )
    output = constant + (output - constant).detach()
    return F.relu(output if residual is None else output + residual)


@pytest.mark.parametrize(
    ("wrong", "tensor"), [(wrong_mean, "output"), (wrong_gradient, "grad_input")], ids=["value", "gradient"]
)
def test_a_wrong_provider_is_caught_before_it_is_timed(wrong, tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "build_batch_norm_act", lambda *_: wrong)
    monkeypatch.setattr(op, "measure_interleaved", lambda *_, **__: pytest.fail("timed a wrong provider"))
    with pytest.raises(check.ResultsDifferError, match=rf"ours, 8x6x6.*{tensor} is off by .*stock PyTorch is off by"):
        op.measure(op_options())


def test_a_model_in_which_nothing_fuses_is_not_measured_as_ours() -> None:
    with pytest.raises(RuntimeError, match="nothing was fused"):
        providers.build_module(providers.PROVIDERS["ours"], nn.Sequential(nn.Linear(2, 2)))


def test_check_names_missing_results_shapes_and_nan() -> None:
    good = {"a": torch.ones(3), "b": torch.full((2,), 2.0)}

    def attempt(**changes: Tensor) -> float:
        return check.check_results("p", {**good, **changes}, good, [good], factor=2, floor=1e-6)

    assert attempt() == 0
    assert attempt(a=good["a"] + 4e-7) == pytest.approx(0.36, abs=0.1)
    with pytest.raises(check.ResultsDifferError, match="b is off by nan"):
        attempt(b=torch.tensor([2.0, math.nan]))
    with pytest.raises(check.ResultsDifferError, match=r"a has shape \(1,\), expected \(3,\)"):
        attempt(a=torch.ones(1))
    with pytest.raises(check.ResultsDifferError, match="returned"):
        attempt(c=torch.ones(1))


def test_op_cases_are_those_of_resnet50() -> None:
    """Against the network itself: shape and number of every batch norm, at two sizes (one with odd
    halves)."""
    from benchmarks.stock import stock_model

    with torch.device("meta"):
        network = stock_model("resnet50")
    norms = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for size in (224, 100):
        counted: dict[tuple[int, ...], int] = {}
        for shape in cases.input_shapes(network, list(norms), 4, size).values():
            counted[shape] = counted.get(shape, 0) + 1
        expected: dict[tuple[int, ...], int] = {}
        op_cases = cases.resnet50_op_cases(4, size)
        for case in op_cases:
            expected[case.shape] = expected.get(case.shape, 0) + case.count
        assert counted == expected
        assert len(op_cases) == 16
        assert sum(case.count for case in op_cases) == len(norms) == 53
        assert sum(case.count for case in op_cases if case.residual) == 16
        assert sum(case.count for case in op_cases if case.activation == "identity") == 4


def test_traffic_of_a_hand_counted_case() -> None:
    n = 1000
    assert traffic.fewest(n, residual=False) == traffic.Traffic(2 * n, 3 * n)  # x y | dy x dx
    assert traffic.fewest(n, residual=True) == traffic.Traffic(3 * n, 4 * n)  # x r y | dy x dx dr
    assert traffic.fused(n, False, "train") == traffic.Traffic(3 * n, 5 * n)  # x x y | dy x dy x dx
    mask = n / 32
    assert traffic.fused(n, True, "train") == traffic.Traffic(4 * n + mask, 6 * n + 2 * mask)
    assert traffic.fused(n, True, "eval") == traffic.Traffic(3 * n, 0)
    # mean variance normalise(2) add(3) relu(2) | relu(3) norm(5)
    assert traffic.eager(n, True, "train") == traffic.Traffic(9 * n, 8 * n)
    assert traffic.eager(n, False, "train", relu=False) == traffic.Traffic(4 * n, 5 * n)


class Hiding(torch.autograd.Function):
    """Doubles; keeps a tensor where saved_tensors_hooks does not look."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.stash = {"spare": [torch.zeros(25)]}
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


def test_saved_bytes_of_hand_counted_modules() -> None:
    x = torch.randn(2, 3, 8, 8)
    floats = 4

    # The convolution saves its input (not counted) and weight (not counted). The norm saves that output, and
    # mean and inverse deviation of 4 channels. The ReLU in place saves its result; the mean over space saves
    # nothing.
    conv_bn_relu = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    activation = 2 * 4 * 6 * 6
    saved = footprint.saved_for_backward(lambda: conv_bn_relu(x).mean(), conv_bn_relu, [x])
    assert saved == footprint.Saved(floats * (2 * activation + 2 * 4), 0)
    # The input counts if it is not named as one, and only once although two layers save it.
    twice = nn.Conv2d(3, 4, 3)
    both = footprint.saved_for_backward(lambda: (twice(x) + twice(x)).sum(), twice, [])
    assert both.total == floats * x.numel()

    # A saved slice keeps its whole storage.
    leaf = torch.randn(10, requires_grad=True)
    whole = torch.randn(100)
    assert footprint.saved_for_backward(lambda: (leaf * whole[:10]).sum(), nn.Identity(), [leaf]).total == 400

    # What was saved and dropped again before the end of the forward does not count.
    def forward() -> Tensor:
        (leaf * torch.randn(10)).sum()
        return (leaf * torch.randn(10)).sum()

    assert footprint.saved_for_backward(forward, nn.Identity(), [leaf]).total == 40

    hidden = footprint.saved_for_backward(lambda: Hiding.apply(leaf).sum(), nn.Identity(), [leaf])
    assert hidden == footprint.Saved(0, 100)


def test_saved_bytes_of_a_checkpointed_module_is_its_input() -> None:
    x = torch.randn(2, 4, 8, 8)
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = Checkpointed(block)
    before = nn.Conv2d(4, 4, 1)
    saved = footprint.saved_for_backward(lambda: model(before(x)).sum(), nn.Sequential(before, model), [x])
    assert saved.total == 4 * x.numel()


def test_tensor_memory_sees_what_is_held_and_the_peak() -> None:
    def call() -> Tensor:
        kept, dropped = torch.empty(1000), torch.empty(5000)
        del dropped
        return kept

    assert footprint.tensor_memory(call) == footprint.TensorMemory(held=4000, peak=24000)


def _big_step(size: int):
    return lambda: torch.ones(size).sum()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_resident_sees_a_fresh_process() -> None:
    resident = footprint.peak_resident(_big_step, 50_000_000)
    assert 195e6 < resident.peak - resident.before < 400e6


class FakeClock(timing.Clock):
    time = 0.0

    def now(self) -> float:
        return self.time


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
    # 5 seconds for each of two, at 7 seconds a round
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


def test_allocator_settings_replace_what_was_set() -> None:
    environment = {"PATH": "p", "MALLOC_TOP_PAD_": "1"}
    assert allocator.environment_for("as-shipped", environment) == {"PATH": "p"}
    assert allocator.environment_for("warm", environment) == {"PATH": "p", **allocator.SETTINGS["warm"]}
    assert allocator.settings_for("both") == ["as-shipped", "warm"]
    assert allocator.settings_for("warm") == ["warm"]
    assert not set(allocator.VARIABLES) & os.environ.keys(), "the tests themselves run as shipped"


def test_photographs() -> None:
    images = data.photographs(3, 40, seed=1)
    assert images.shape == (3, 3, 40, 40)
    assert images.dtype == torch.float32
    assert torch.equal(images, data.photographs(3, 40, seed=1))
    assert not torch.equal(images, data.photographs(3, 40, seed=2))
    # Normalised photographs: within the range of the transformation, and neighbouring pixels alike.
    assert -2.2 < images.min() < images.max() < 2.7
    assert (images[..., 1:] - images[..., :-1]).abs().mean() < 0.5 * images.std()
    assert data.labels(5, 10).shape == (5,)


def test_provider_defaults() -> None:
    quick = options.chosen_providers(op_options())
    assert [provider.name for provider in quick] == ["ours", "eager", "eager-channels-last"]
    assert len(options.chosen_providers(op_options(quick=False))) == 6
