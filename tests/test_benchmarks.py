"""The benchmarks: each subcommand runs and leaves its files; wrong providers are caught; the counts are
right."""

import argparse
import json
import math
import os
import sys
import time
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
    ceilings,
    check,
    conv,
    data,
    environment,
    everything,
    footprint,
    isa,
    levels,
    network,
    on_gpu,
    op,
    options,
    peers,
    providers,
    report,
    roofline,
    runner,
    timing,
    traffic,
)
from benchmarks.devices import DEVICES
from benchmarks.memory import Checkpointed
from fused_res import _extension

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


def test_infer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run("infer", "--providers", "ours,eager,eager-channels-last", *RUN, "as-shipped", out=tmp_path)
    assert_files(tmp_path, "infer")
    assert "p99 ms" in capfd.readouterr().out
    summary = command_line.infer.summary(document["runs"][0])
    assert "eager / ours" in summary and "peer" not in summary
    cases = document["runs"][0]["cases"]
    assert [case["name"] for case in cases] == ["resnet18 1x64x64 float32", "resnet18 2x64x64 float32"]
    for case in cases:
        assert list(case["providers"]) == ["ours", "eager", "eager-channels-last"]
        assert 0 <= case["share_of_allowed_error"]["ours"] <= 1
        for provider in case["providers"].values():
            assert 0 < provider["median_s"] <= provider["p99_s"]


@pytest.mark.parametrize("name", peers.NAMES)
def test_infer_in_other_runtimes(name: str, tmp_path: Path) -> None:
    for package in peers.PACKAGES[name]:
        pytest.importorskip(package)
    small = ("--model", "resnet18", "--batch", "2", "--size", "32", "--providers", f"ours,{name}")
    document = run("infer", *small, *RUN, "as-shipped", out=tmp_path)
    assert_files(tmp_path, "infer")
    (one,) = document["runs"]
    (case,) = one["cases"]
    assert list(case["providers"]) == ["ours", name]
    assert 0 < case["share_of_allowed_error"][name] <= 1
    summary = command_line.infer.summary(one)
    assert "fastest peer / ours" in summary and f"x {name}\n" in summary + "\n"


def test_another_runtime_has_as_many_threads_as_pytorch_and_reads_its_input_in_place() -> None:
    openvino = pytest.importorskip("openvino")
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    compiled = []
    compile_model = openvino.Core.compile_model

    def compile_and_keep(*arguments: object) -> object:
        compiled.append(compile_model(*arguments))
        return compiled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino.Core, "compile_model", compile_and_keep)
        network = peers.build("openvino", model, x)
    assert compiled[0].get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    before = network().clone()
    x.neg_()
    assert not torch.equal(network(), before)
    torch.testing.assert_close(network(), model(x).detach())


def test_a_runtime_that_is_not_there_is_left_out_or_an_error_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PACKAGES, "onnxruntime", ("onnxruntime", "no_such_package"))

    def names(*arguments: str) -> list[str]:
        parsed = command_line.build_parser().parse_args(["infer", "--quick", *arguments])
        return [provider.name for provider in options.chosen_providers(parsed, providers.INFERENCE)]

    assert "onnxruntime" not in names()
    assert "onnxruntime is left out: not installed (pip install no_such_package)\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--providers onnxruntime: not installed \(pip install no_such_package\)"):
        names("--providers", "ours,onnxruntime")

    monkeypatch.setitem(peers.PACKAGES, "onnxruntime", ())
    monkeypatch.setitem(peers.PACKAGES, "openvino", ())
    assert names("--isa", "avx2")[-1] == "openvino"
    assert "onnxruntime is left out: nothing holds its kernels to AVX2\n" in capsys.readouterr().out
    assert names("--isa", "avx512")[-2:] == ["openvino", "onnxruntime"]
    assert names("--dtype", "bfloat16")[-1] == names("--device", "cuda")[-1] == "eager-channels-last"


def test_fastest_peer() -> None:
    seconds = {"ours": 2.0, "eager": 1.0, "compile-freezing": 5.0, "openvino": 3.0, "onnxruntime": 4.0}
    case = {"providers": {name: {"median_s": value} for name, value in seconds.items()}}
    assert command_line.infer.fastest_peer(case, "ours") == "1.50x openvino"


def test_an_instruction_set_holds_everybody_in_the_child(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    document = run("conv", "--isa", "avx2", "--cases", "layer1.0.conv1", *RUN, "as-shipped", out=tmp_path)
    found = document["runs"][0]["environment"]
    assert found["isa_variables"] == isa.SETTINGS["avx2"]
    assert found["isa"] in ("avx2", None)
    assert isa.environment_for(None, {"A": "b"}) == {"A": "b"}


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    isa.check(None, "cuda")
    isa.check("avx2", "cpu")
    with pytest.raises(SystemExit, match="--isa avx512: PyTorch finds no more than avx2 here"):
        isa.check("avx512", "cpu")
    with pytest.raises(SystemExit, match="--isa avx2: needs --device cpu"):
        isa.check("avx2", "cuda")


def test_ceilings_are_the_best_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, peaks = iter([3e9, 2e9, 2e9]), iter([5e11, 6e11])
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda *_, **__: next(copies))
    monkeypatch.setattr(ceilings, "fma_peak", lambda: next(peaks))
    best = ceilings.best(ceilings.measure("cpu", True), ceilings.measure("cpu", True))
    assert best == {"copy_bytes_per_s": 3e9, "fma_flops_per_s": 6e11}
    assert ceilings.measure("cuda", True) == {"copy_bytes_per_s": 2e9}
    run = {"allocator": "warm", "environment": environment.describe() | {"backend": "cpu"}, "ceilings": best}
    line = report.environment({"runs": [run]})
    assert " · copies 3.0 GB/s (read plus write) · multiplies and adds 600 GFLOP/s · torch" in line


@pytest.mark.skipif(not _extension.loaded, reason=_extension.reason)
def test_fma_peak_is_plausible() -> None:
    """No product of matrices passes it; both may have a neighbour, so they are measured in turn."""
    peak = _extension._module.fma_peak
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


def test_a_frozen_model_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> nn.Module:
        module = providers.build_module(*arguments)
        with torch.no_grad():
            module.fc.bias += 1e-3
        return module

    parsed = command_line.build_parser().parse_args(["infer", "--quick", "--providers", "ours"])
    monkeypatch.setattr(
        command_line.infer, "build_module", lambda p, *rest: (wrong if p.frozen else providers.build_module)(p, *rest)
    )
    with pytest.raises(check.ResultsDifferError, match="ours, resnet18 1x64x64 float32: output is off by"):
        command_line.infer.measure(parsed)


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
    assert "left out, as this machine is slow today:\npython -m benchmarks infer --model" in capsys.readouterr().out


def test_selection_parses() -> None:
    parser = command_line.build_parser()
    on_gpu = [(selection, "cuda") for selection in everything.GPU_SELECTION.values()]
    for selection, device in ((everything.SELECTION, "cpu"), *on_gpu):
        titles = [part.title for part in selection]
        assert len(set(titles)) == len(titles)
        for part in selection:
            parsed = parser.parse_args([part.subcommand, *part.arguments, "--device", device])
            assert (parsed.subcommand, parsed.device) == (part.subcommand, device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["op", "--providers", "ours,theirs"],
            "unknown provider 'theirs'; choose from ours, ours+compile, ours-triton, ours-cuda, eager",
        ),
        (["op", "--providers", ""], "unknown provider ''"),
        (["op", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["block", "--batch", "many"], "expected a whole number of at least 1, got 'many'"),
        (["model", "--min-time", "-1"], "expected a number of seconds, 0 or more, got '-1'"),
        (["model", "--min-time", "nan"], "expected a number of seconds"),
        (["model", "--model", "vgg16"], "invalid choice: 'vgg16'"),
        (["memory", "--allocator", "cold"], "invalid choice: 'cold'"),
        (["infer", "--providers", "ours+compile"], "unknown provider 'ours+compile'; choose from ours, ours-triton"),
        (["infer", "--batch", "0"], "expected a whole number of at least 1, got '0'"),
        (["infer", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["conv", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["roofline", "--device", "cuda"], "invalid choice: 'cuda'"),
        (["roofline", "--threads", "2"], "unrecognized arguments: --threads 2"),
        (["speed"], "invalid choice: 'speed'"),
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
    graphs = command_line.build_parser().parse_args(["model", "--quick", "--providers", "ours,ours+graph"])
    with pytest.raises(SystemExit, match=r"ours\+graph: needs --device cuda"):
        command_line.model.measure(graphs)
    with pytest.raises(SystemExit, match="cudnn: needs --device cuda"):
        op.measure(op_options(providers=("ours", "cudnn")))


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


def test_torch_compile_takes_freezing_with_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda module, *, dynamic, options: seen.append(options) or module)
    for name in ("compile-freezing", "compile-max-autotune"):
        providers.build_module(providers.INFERENCE[name], nn.Linear(2, 2))
    assert seen == [{"freezing": True}, {"freezing": True, **torch._inductor.list_mode_options("max-autotune")}]


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


class PreparingClock(FakeClock):
    prepared = 0

    def prepare(self) -> None:
        self.prepared += 1
        self.time += 100.0

    def seconds(self, before: float, after: float) -> float:
        return 2 * (after - before)


def test_what_prepares_a_call_is_not_timed() -> None:
    clock = PreparingClock()

    def step(_: None) -> None:
        clock.time += 0.002

    samples = timing.measure_interleaved({"a": {"forward": step}}, repeat=3, min_time=0, label="test", clock=clock)
    assert samples["a"].phases["forward"] == pytest.approx([0.004] * 3)
    assert clock.prepared == clock.warm_up_calls + 3 * 3  # three calls make a sample of ten milliseconds


@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_other_threads_fall_asleep_before_each_sample(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a short call's own are woken."""
    clock, order = FakeClock(), []
    monkeypatch.setattr(timing.time, "sleep", order.append)

    def step(_: None) -> None:
        order.append("call")
        clock.time += seconds

    samples = timing.measure_interleaved(
        {"a": {"forward": step}}, repeat=2, min_time=0, label="test", clock=clock, sample_seconds=0, idle=0.06
    )
    before = [0.06, "call"] if seconds < timing.LONG_CALL else [0.06]
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
    assert allocator.settings_for("both", "cuda") == ["as-shipped"]
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
    known = options.chosen_providers(op_options(quick=False), providers.NORMS)
    assert len(known) == 6 and not any(provider.on_request for provider in known)


def test_a_gpu_names_its_runs() -> None:
    gpu = {"name": "H200", "cuda": "13.0", "cudnn": 91000}
    env = {"gpu": gpu, "backend": "triton", "torch": "2", "fused_res": "0", "commit": None, "date": "today"}
    assert report.allocator_title({"allocator": "as-shipped", "environment": env}) == "H200"
    line = report.environment({"runs": [{"environment": env}]})
    assert line == "H200, CUDA 13.0, cuDNN 91000 · backend triton · torch 2 · fused_res 0 (no commit) · today"
    assert traffic.eager(1000, True, "train", device="cuda") == traffic.Traffic(8000, 8000)


def test_a_gpu_part_that_fails_or_hangs_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "GPU_SELECTION", {"bench": everything.GPU_SELECTION["bench"][:3], "compile": ()})
    documents = iter(
        [runner.PartFailedError(3, "ended with exit code 3"), {"runs": []}, runner.PartFailedError(1, "not done")]
    )

    def one(*_: object) -> dict[str, list[object]]:
        document = next(documents)
        if isinstance(document, Exception):
            raise document
        return document

    monkeypatch.setattr(everything.runner, "run", one)
    monkeypatch.setattr(everything.report, "environment", lambda _: "machine")
    command_line.main(["all", "--device", "cuda", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "without results:\npython -m benchmarks op" in printed and "not done" in printed
    assert (tmp_path / "summary-bench.txt").read_text().startswith("machine\n")


def test_a_stage_stops_what_hangs_and_keeps_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "LIMIT", 2.0)
    stage = on_gpu.Stage(tmp_path)
    assert stage.run("quick", [sys.executable, "-c", "print('done')"]) and not stage.failed
    hanging = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    assert not stage.run("slow", [sys.executable, "-c", hanging])
    assert stage.failed[0].startswith("slow: stopped after")
    assert (tmp_path / "quick.log").read_text() == "done\n" and (tmp_path / "slow.log").read_text() == "begun\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_without_a_gpu_nothing_runs_on_one() -> None:
    parsed = command_line.build_parser().parse_args(["conv", "--quick", "--device", "cuda"])
    with pytest.raises(SystemExit, match="--device cuda: there is no NVIDIA GPU here"):
        runner.measure_here(conv, parsed)


def test_half_precision() -> None:
    for dtype in ("bfloat16", "float16"):
        (case,) = op.measure(op_options(dtype=dtype, cases="+add"))["cases"]
        assert case["dtype"] == dtype
        assert case["fewest_bytes"] == 2 * 7 * 2 * 16 * 5 * 5
    parsed = command_line.build_parser().parse_args(["block", "--quick", "--cases", "resnet18", "--dtype", "bfloat16"])
    (case,) = command_line.block.measure(parsed)["cases"]
    assert 0 < case["share_of_allowed_error"]["ours"] <= 1


def test_conv(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run("conv", "--backend", "reference", *RUN, "as-shipped", out=tmp_path)
    assert_files(tmp_path, "conv")
    printed = capfd.readouterr().out
    assert "time / aten  time / onednn-fused" in printed and "ours-packed / onednn-fused" in printed
    cases = document["runs"][0]["cases"]
    assert cases[3]["name"] == "resnet50 layer1.0.conv3 1x1 64>256 8x8 +add +relu" and cases[3]["count"] == 3
    for case in cases:
        names = ["aten", "aten-unfused", "ours", "ours-packed", "onednn-fused", "aten+stats", "ours+stats"]
        assert list(case["providers"]) == names
        assert list(case["share_of_allowed_error"]) == ["ours", "ours-packed", "onednn-fused", "ours+stats"]
        assert all(0 < provider["error"] < 1e-6 for provider in case["providers"].values())


def test_rates_of_convolutions() -> None:
    """Two nets' worth of one case: 2 GFLOP in 20 ms beside a peak of 400 GFLOP/s."""
    case = {
        "name": "c",
        "count": 2,
        "flops": 2e9,
        "providers": {
            name: {"median_s": seconds, "error": 1e-7}
            for name, seconds in (("aten", 0.02), ("ours-packed", 0.01), ("onednn-fused", 0.016))
        },
    }
    measured = {"allocator": "warm", "environment": {}, "ceilings": {"copy_bytes_per_s": 1, "fma_flops_per_s": 4e11}}
    tables = conv.tables(measured | {"cases": [case]})
    assert "GFLOP/s of a direct convolution (share of the 400 measured)" in tables
    assert ["c", "100", "(25%)", "200", "(50%)", "125", "(31%)", "0.62x"] in map(str.split, tables.splitlines())
    assert ["ours-packed", "20", "200", "(50%)", "0.50x", "0.62x", "1.0e-07"] in map(str.split, tables.splitlines())
    without = conv.summary(measured | {"cases": [case], "ceilings": {"copy_bytes_per_s": 1}})
    assert "measured" not in without and "%" not in without


def test_a_wrong_convolution_is_caught_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "conv_bias_act", lambda x, weight, *_, **__: F.conv2d(x, weight, stride=2, padding=3))
    monkeypatch.setattr(conv, "measure_interleaved", lambda *_, **__: pytest.fail("timed a wrong provider"))
    parsed = command_line.build_parser().parse_args(["conv", "--quick"])
    with pytest.raises(check.ResultsDifferError, match=r"ours, resnet50 stem.conv1 .* output is off by"):
        conv.measure(parsed)


def test_convolutions_of_a_network_are_all_cases() -> None:
    parsed = command_line.build_parser().parse_args(["conv", "--model", "resnet18", "resnet50"])
    counts = {"resnet18": 0, "resnet50": 0}
    for case in conv.select_cases(parsed):
        counts[case.name.partition(" ")[0]] += case.count
    assert counts == {"resnet18": 20, "resnet50": 53}


def test_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run("roofline", "--model", "resnet18", "--batch", "2", "--size", "64", "--layers", out=tmp_path)
    assert_files(tmp_path, "roofline")
    printed = capsys.readouterr().out
    assert "roofline: H200 SXM: 4.80 TB/s, 989 TFLOP/s dense, 50 MB L2 (calculated)" in printed
    assert "fewest ms" in printed
    (one,) = document["runs"]
    for case in one["cases"]:
        by_floor = [level["floor_s"] for level in case["levels"].values()]
        assert max(by_floor) == by_floor[0] and min(by_floor) == by_floor[-1] > 0
        for level in case["levels"].values():
            assert max(level["memory_s"], level["math_s"]) <= level["floor_s"] <= level["memory_s"] + level["math_s"]
            for key in ("bytes", "flops", "floor_s"):
                assert sum(stage[key] for stage in level["stages"].values()) == pytest.approx(level[key])


def test_roofline_of_a_hand_counted_bottleneck() -> None:
    """In units of one activation of 64 channels; the block's input and output are four of them."""
    net = network.network("resnet50", 2, 64)
    a, weights = 2 * (2 * 64 * 16 * 16), 2 * (256 * 64 + 64 * 64 * 9 + 64 * 256)
    mask = 4 / 16  # of its output, one bit for each element of 16

    def count(level: str, mode: cases.Mode) -> float:
        made = levels.kernels(net, levels.LEVELS[level], mode, torch.bfloat16)
        moved = sum(kernel.bytes for kernel in made if kernel.layer.startswith("layer1.1."))
        return (moved - (3 if mode == "train" else 1) * weights) / a

    convolutions = (4 + 1) + (1 + 1) + (1 + 4)
    # mean-and-variance, normalise, ReLU | addition | ReLU, sums, dx | the shortcut's gradient
    eager = convolutions + 2 * (1 + 2 + 2) + (4 + 8 + 12 + 8) + (12 + 8 + 12) + 2 * (3 + 2 + 3) + 2 * convolutions + 12
    assert count("eager", "train") == eager == 138
    compiled = convolutions + 2 * (1 + 2) + (4 + 12) + (20 + 12) + 2 * (3 + 4) + 2 * convolutions
    assert count("compile", "train") == compiled == 104
    norm = convolutions + 2 * (1 + 2) + (4 + 12) + (8 + 12) + 2 * (2 + 3) + 2 * convolutions + 12 + 4 * mask
    assert count("norm", "train") == norm == 101
    # Forward: statistics of the 3x3 alone, its input normalised, the end. Backward from the end: its sums, both
    # gradients of the last 1x1; dz and both of the 3x3; sums and both of the first 1x1, which takes in the shortcut's.
    fused = convolutions + 1 + 2 + 12 + 8 + (10 + 9) + (3 + 2 + 2) + (2 + (6 + 4) + 6) + 5 * mask
    assert count("fused", "train") == fused == 80.25
    assert count("fewest", "train") == convolutions + 12 + 10 + 4 + 14 == 52
    assert count("eager", "eval") == convolutions + 2 * (2 + 2) + (8 + 12 + 8) == 48
    assert count("norm", "eval") == count("compile", "eval") == convolutions + 2 * 2 + 12
    assert count("fused", "eval") == count("fewest", "eval") == convolutions + 4


def test_roofline_of_a_hand_counted_convolution() -> None:
    """The projection of ResNet-50's second stage reads a quarter of its input, and its gradient has all of it."""
    net = network.network("resnet50", 8, 224)
    made = levels.kernels(net, levels.LEVELS["eager"], "train", torch.float32)
    steps = {kernel.step: kernel for kernel in made if kernel.layer == "layer2.0.projection"}
    x, z, w = 4 * 8 * 256 * 56 * 56, 4 * 8 * 512 * 28 * 28, 4 * 256 * 512
    flops = 2 * 8 * 512 * 28 * 28 * 256
    assert steps["conv"][-2:] == steps["wgrad"][-2:] == (x / 4 + z + w, flops)
    assert steps["dgrad"][-2:] == (z + w + x, flops)
    total = roofline.totals([steps["conv"]], DEVICES["a100"], "tf32")
    assert total["memory_s"] == pytest.approx((x / 4 + z + w) / 2.039e12)
    assert total["floor_s"] == max(total["memory_s"], total["math_s"]) and total["math_s"] == flops / 156e12


def test_roofline_fuses_what_the_planner_fuses() -> None:
    net = network.network("resnet50", 2, 64)

    def steps(level: str, dtype: torch.dtype) -> list[str]:
        return [kernel.step for kernel in levels.kernels(net, levels.LEVELS[level], "train", dtype)]

    assert steps("fused", torch.bfloat16).count("fused wgrad") == 2 * 16 + 4  # every 1x1
    assert steps("fused", torch.float32) == steps("norm", torch.float32)


def test_roofline_counts_the_flops_of_a_training_step() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.stock import stock_model

    with torch.device("meta"):
        model = stock_model("resnet50")
        images = torch.empty(4, 3, 224, 224)
    net = network.network("resnet50", 4, 224)
    for mode in roofline.MODES:
        model.train(mode == "train")
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode == "train"):
            output = model(images)
            if mode == "train":
                output.sum().backward()
        for level in levels.LEVELS.values():
            made = levels.kernels(net, level, mode, torch.bfloat16)
            assert sum(kernel.flops for kernel in made) == counter.get_total_flops()
