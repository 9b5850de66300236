"""`infer` and `conv`: frozen networks and convolutions compared with other runtimes, also with a restricted ISA."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import __main__ as command_line
from benchmarks import check, conv, isa, options, peers, providers
from tests.support.benchmark_cli import QUICK_OPTIONS, assert_report_files, run_benchmark


def test_infer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run_benchmark(
        "infer", "--providers", "ours,eager,eager-channels-last", *QUICK_OPTIONS, "as-shipped", out=tmp_path
    )
    assert_report_files(tmp_path, "infer")
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
def test_infer_with_other_runtimes(name: str, tmp_path: Path) -> None:
    for package in peers.PACKAGES[name]:
        pytest.importorskip(package)
    small = ("--model", "resnet18", "--batch", "2", "--size", "32", "--providers", f"ours,{name}")
    document = run_benchmark("infer", *small, *QUICK_OPTIONS, "as-shipped", out=tmp_path)
    assert_report_files(tmp_path, "infer")
    (one,) = document["runs"]
    (case,) = one["cases"]
    assert list(case["providers"]) == ["ours", name]
    assert 0 < case["share_of_allowed_error"][name] <= 1
    summary = command_line.infer.summary(one)
    assert "fastest peer / ours (minima)" in summary and f"x) {name}\n" in summary + "\n"


def test_openvino_uses_the_thread_count_of_pytorch_and_reads_its_input_in_place() -> None:
    openvino = pytest.importorskip("openvino")
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    compiled = []
    compile_model = openvino.Core.compile_model

    def compile_and_record(*arguments: object) -> object:
        compiled.append(compile_model(*arguments))
        return compiled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino.Core, "compile_model", compile_and_record)
        network = peers.build("openvino", model, x)
    assert compiled[0].get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    before = network().clone()
    x.neg_()
    assert not torch.equal(network(), before)
    torch.testing.assert_close(network(), model(x).detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_runtimes_get_the_network_and_the_images_unrounded(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 result of what the runtime gets equals the reference; that of rounded operands does not."""
    pytest.importorskip("openvino")
    computed, references = [], []

    def exact(name: str, stock: nn.Module, x: torch.Tensor, compute: torch.dtype) -> Callable[[], torch.Tensor]:
        assert compute == options.DTYPES[dtype]
        with torch.no_grad():
            computed.append(copy.deepcopy(stock).double()(x.double()))
        return lambda: computed[0]

    def record(name: str, results: check.Results, reference: check.Results, *_: object, **__: object) -> float:
        references.append(reference["output"])
        return 0.0

    monkeypatch.setattr(peers, "build", exact)
    monkeypatch.setattr(command_line.infer, "check_results", record)
    small = ["--model", "resnet18", "--batch", "2", "--size", "32", "--providers", "openvino", "--dtype", dtype]
    parsed = command_line.build_parser().parse_args(["infer", "--quick", *small])
    (case,) = command_line.infer.select_cases(parsed)
    command_line.infer.check_and_build([providers.INFERENCE_PROVIDERS["openvino"]], case, parsed)
    torch.testing.assert_close(computed[0], references[0], rtol=1e-12, atol=1e-12)


def test_missing_runtime_is_skipped_or_an_error_if_requested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PACKAGES, "onnxruntime", ("onnxruntime", "no_such_package"))

    def names(*arguments: str) -> list[str]:
        parsed = command_line.build_parser().parse_args(["infer", "--quick", *arguments])
        return [provider.name for provider in options.select_providers(parsed, providers.INFERENCE_PROVIDERS)]

    assert "onnxruntime" not in names()
    assert "onnxruntime is skipped: not installed (pip install no_such_package)\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--providers onnxruntime: not installed \(pip install no_such_package\)"):
        names("--providers", "ours,onnxruntime")

    monkeypatch.setitem(peers.PACKAGES, "onnxruntime", ())
    monkeypatch.setitem(peers.PACKAGES, "openvino", ())
    assert names("--isa", "avx2")[-1] == "openvino"
    assert "onnxruntime is skipped: its kernels cannot be restricted to AVX2\n" in capsys.readouterr().out
    assert names("--isa", "avx512")[-2:] == ["openvino", "onnxruntime"]
    assert names("--dtype", "bfloat16")[-1] == "openvino"
    assert names("--dtype", "float16")[-1] == names("--device", "cuda")[-1] == "eager-channels-last"


def test_fastest_peer() -> None:
    seconds = {"ours": 2.0, "eager": 1.0, "compile-freezing": 5.0, "openvino": 3.0, "onnxruntime": 4.0}
    case = {
        "providers": {name: {"median_s": value, "samples_s": [value, value - 1]} for name, value in seconds.items()}
    }
    assert command_line.infer.fastest_peer(case, "ours") == "1.50x (2.00x) openvino"


def test_isa_restricts_all_providers_in_the_child_process(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    document = run_benchmark(
        "conv", "--isa", "avx2", "--cases", "layer1.0.conv1", *QUICK_OPTIONS, "as-shipped", out=tmp_path
    )
    found = document["runs"][0]["environment"]
    assert found["isa_variables"] == isa.SETTINGS["avx2"]
    assert found["isa"] in ("avx2", None)
    assert isa.environment_for(None, {"A": "b"}) == {"A": "b"}


def test_unsupported_isa_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    isa.check(None, "cuda")
    isa.check("avx2", "cpu")
    with pytest.raises(SystemExit, match="--isa avx512: not supported here, PyTorch detects avx2"):
        isa.check("avx512", "cpu")
    with pytest.raises(SystemExit, match="--isa avx2: needs --device cpu"):
        isa.check("avx2", "cuda")


def test_wrong_frozen_model_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> nn.Module:
        module = providers.build_module(*arguments)
        with torch.no_grad():
            module.fc.bias += 1e-3
        return module

    parsed = command_line.build_parser().parse_args(["infer", "--quick", "--providers", "ours"])
    monkeypatch.setattr(
        command_line.infer, "build_module", lambda p, *rest: (wrong if p.frozen else providers.build_module)(p, *rest)
    )
    with pytest.raises(
        check.ResultsDifferError, match="ours, resnet18 1x64x64 float32: output has a relative error of"
    ):
        command_line.infer.measure(parsed)


def test_torch_compile_combines_freezing_with_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_options: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda module, *, dynamic, options: compile_options.append(options) or module)
    for name in ("compile-freezing", "compile-max-autotune"):
        providers.build_module(providers.INFERENCE_PROVIDERS[name], nn.Linear(2, 2))
    assert compile_options == [
        {"freezing": True},
        {"freezing": True, **torch._inductor.list_mode_options("max-autotune")},
    ]


def test_conv(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run_benchmark("conv", "--backend", "reference", *QUICK_OPTIONS, "as-shipped", out=tmp_path)
    assert_report_files(tmp_path, "conv")
    printed = capfd.readouterr().out
    assert "time / aten  time / onednn-fused" in printed and "ours-packed / onednn-fused" in printed
    cases = document["runs"][0]["cases"]
    assert cases[3]["name"] == "resnet50 layer1.0.conv3 1x1 64>256 8x8 +add +relu" and cases[3]["count"] == 3
    for case in cases:
        names = ["aten", "aten-unfused", "ours", "ours-packed", "onednn-fused", "aten+stats", "ours+stats"]
        assert list(case["providers"]) == names
        assert list(case["share_of_allowed_error"]) == ["ours", "ours-packed", "onednn-fused", "ours+stats"]
        assert all(0 < provider["error"] < 1e-6 for provider in case["providers"].values())


def test_gflops_of_convolutions() -> None:
    """Two occurrences of one case: 2 GFLOP in 20 ms, with an FMA peak of 400 GFLOP/s."""
    case = {
        "name": "c",
        "count": 2,
        "flops": 2e9,
        "dtype": "float32",
        "providers": {
            name: {"median_s": seconds, "samples_s": [seconds], "error": 1e-7}
            for name, seconds in (("aten", 0.02), ("ours-packed", 0.01), ("onednn-fused", 0.016))
        },
    }
    measured = {"allocator": "warm", "environment": {}, "ceilings": {"copy_bytes_per_s": 1, "fma_flops_per_s": 4e11}}
    tables = conv.tables(measured | {"cases": [case]})
    assert "GFLOP/s of a direct convolution (share of the measured peak, 400)" in tables
    assert ["c", "100", "(25%)", "200", "(50%)", "125", "(31%)", "0.62x"] in map(str.split, tables.splitlines())
    assert ["ours-packed", "20", "200", "(50%)", "0.50x", "0.62x", "1.0e-07"] in map(str.split, tables.splitlines())
    assert "onednn-fused by more than 3%: 0 of 1 layers in medians (worst: 0.62x, c); 0 of 1 layers in minima" in tables
    without = conv.summary(measured | {"cases": [case], "ceilings": {"copy_bytes_per_s": 1}})
    assert "measured" not in without and "50%" not in without


def test_wrong_convolution_is_rejected_before_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "conv_bias_act", lambda x, weight, *_, **__: F.conv2d(x, weight, stride=2, padding=3))
    monkeypatch.setattr(conv, "measure_interleaved", lambda *_, **__: pytest.fail("timed a wrong provider"))
    parsed = command_line.build_parser().parse_args(["conv", "--quick"])
    with pytest.raises(check.ResultsDifferError, match=r"ours, resnet50 stem.conv1 .* output has a relative error of"):
        conv.measure(parsed)


def test_cases_cover_every_convolution_of_a_network() -> None:
    parsed = command_line.build_parser().parse_args(["conv", "--model", "resnet18", "resnet50"])
    counts = {"resnet18": 0, "resnet50": 0}
    for case in conv.select_cases(parsed):
        counts[case.name.partition(" ")[0]] += case.count
    assert counts == {"resnet18": 20, "resnet50": 53}
