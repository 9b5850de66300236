"""`all`, on the CPU and on a GPU: a suite of the subcommands that ends in time even if some of them fail."""

import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import conv, headline, report, runner, suite, traffic
from tests.support.benchmark_cli import QUICK_OPTIONS


def test_all_runs_the_suite_and_prints_the_summary_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "CPU_SUITE", suite.CPU_SUITE[:1])  # the other subcommands are tested separately
    command_line.main(["all", *QUICK_OPTIONS, "as-shipped", "--out", str(tmp_path)])
    summary = (tmp_path / "summary.txt").read_text()
    assert "op: geometric means" in summary
    assert capsys.readouterr().out.rstrip().splitlines()[-1].endswith(f"results in {tmp_path}")


def test_all_skips_entries_after_the_latest_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 1e6, 1e6])
    monkeypatch.setattr(suite, "CPU_SUITE", suite.CPU_SUITE[:2])
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(suite.runner, "run", lambda *_: {"command": "python -m benchmarks op", "runs": []})
    monkeypatch.setattr(suite.report, "environment", lambda _: "machine")
    command_line.main(["all", "--out", str(tmp_path)])
    assert (
        "skipped, because this machine is too slow for the time limit:\npython -m benchmarks infer --model"
        in capsys.readouterr().out
    )


def test_suite_commands_parse() -> None:
    parser = command_line.build_parser()
    on_gpu = [(entries, "cuda") for entries in suite.GPU_SUITES.values()]
    for entries, device in ((suite.CPU_SUITE, "cpu"), *on_gpu):
        titles = [entry.title for entry in entries]
        assert len(set(titles)) == len(titles)
        for entry in entries:
            parsed = parser.parse_args([*shlex.split(entry.command), "--device", device])
            assert parsed.device == device


def test_gpu_runs_have_the_name_of_the_gpu() -> None:
    gpu = {"name": "H200", "cuda": "13.0", "cudnn": 91000}
    env = {"gpu": gpu, "backend": "triton", "torch": "2", "fused_res": "0", "commit": None, "date": "today"}
    assert report.allocator_title({"allocator": "as-shipped", "environment": env}) == "H200"
    line = report.environment({"runs": [{"environment": env}]})
    assert line == "H200, CUDA 13.0, cuDNN 91000 · backend triton · torch 2 · fused_res 0 · no commit · today"
    assert traffic.eager(1000, True, "train", device="cuda") == traffic.Traffic(8000, 8000)


def test_failed_gpu_entries_are_listed_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "GPU_SUITES", {"bench": suite.GPU_SUITES["bench"][:3], "compile": ()})
    documents = iter(
        [
            runner.BenchmarkFailedError(3, "exit code 3"),
            {"command": "python -m benchmarks op", "runs": []},
            runner.BenchmarkFailedError(1, "exceeded its time limit"),
        ]
    )

    def one(*_: object) -> dict[str, list[object]]:
        document = next(documents)
        if isinstance(document, Exception):
            raise document
        return document

    monkeypatch.setattr(suite.runner, "run", one)
    monkeypatch.setattr(suite.report, "environment", lambda _: "machine")
    command_line.main(["all", "--device", "cuda", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "failed:\npython -m benchmarks op" in printed and "exceeded its time limit" in printed
    assert (tmp_path / "summary-bench.txt").read_text().startswith("machine\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_device_cuda_without_a_gpu_is_rejected() -> None:
    parsed = command_line.build_parser().parse_args(["conv", "--quick", "--device", "cuda"])
    with pytest.raises(SystemExit, match="--device cuda: no NVIDIA GPU is available"):
        runner.measure_to_file(conv, parsed)


def test_headlines() -> None:
    def document(subcommand: str, case: dict, **medians: float) -> dict:
        providers = {name.replace("_", "-"): {"median_s": seconds} for name, seconds in medians.items()}
        run = {"cases": [case | {"providers": providers}]}
        return {"command": f"python -m benchmarks {subcommand} --more", "runs": [run]}

    network = {"model": "resnet18", "batch": 4, "size": 32, "mode": "train"}
    documents = [
        document("infer", network, ours=0.010, openvino=0.015, onnxruntime=0.012),
        document("model", network | {"batch": 1}, ours=0.1, eager=0.09, eager_channels_last=0.2),
        document("op", {}, ours=0.5, ours_compile=0.1, eager=2.0),
        document("conv", {}, aten=1.0),  # no headline
        {"command": "python -m benchmarks memory", "runs": []},
    ]
    assert headline.headline_text(documents).splitlines()[1:] == [
        "- resnet18 infers 4 images of 32x32 in 10 ms, 1.20 times as fast as ONNX Runtime, the fastest of 2 others",
        "- resnet18 trains on 1 image of 32x32 in 100.0 ms, 0.90 times as fast as PyTorch, the fastest of 2 others",
        "- batch norm + add + ReLU alone is 4.00 times as fast as PyTorch (geometric mean over 1 shapes)",
    ]
