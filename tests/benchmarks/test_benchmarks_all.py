"""`all`, on the CPU and on a GPU: a selection of the subcommands that ends in time, whatever fails."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import conv, everything, headline, on_gpu, report, runner, traffic
from tests.support.benchmark_cli import RUN


def test_all_runs_the_selection_and_ends_with_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "SELECTION", everything.SELECTION[:1])  # the others have tests of their own
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
    monkeypatch.setattr(everything.runner, "run", lambda *_: {"command": "python -m benchmarks op", "runs": []})
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
            parsed = parser.parse_args([*shlex.split(part.command), "--device", device])
            assert parsed.device == device


def test_a_gpu_names_its_runs() -> None:
    gpu = {"name": "H200", "cuda": "13.0", "cudnn": 91000}
    env = {"gpu": gpu, "backend": "triton", "torch": "2", "fused_res": "0", "commit": None, "date": "today"}
    assert report.allocator_title({"allocator": "as-shipped", "environment": env}) == "H200"
    line = report.environment({"runs": [{"environment": env}]})
    assert line == "H200, CUDA 13.0, cuDNN 91000 · backend triton · torch 2 · fused_res 0 · no commit · today"
    assert traffic.eager(1000, True, "train", device="cuda") == traffic.Traffic(8000, 8000)


def test_a_gpu_part_that_fails_or_hangs_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "GPU_SELECTION", {"bench": everything.GPU_SELECTION["bench"][:3], "compile": ()})
    documents = iter(
        [
            runner.PartFailedError(3, "ended with exit code 3"),
            {"command": "python -m benchmarks op", "runs": []},
            runner.PartFailedError(1, "not done"),
        ]
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


def test_the_selection_ends_in_sentences() -> None:
    def document(subcommand: str, case: dict, **medians: float) -> dict:
        providers = {name.replace("_", "-"): {"median_s": seconds} for name, seconds in medians.items()}
        run = {"cases": [case | {"providers": providers}]}
        return {"command": f"python -m benchmarks {subcommand} --more", "runs": [run]}

    network = {"model": "resnet18", "batch": 4, "size": 32, "mode": "train"}
    documents = [
        document("infer", network, ours=0.010, openvino=0.015, onnxruntime=0.012),
        document("model", network | {"batch": 1}, ours=0.1, eager=0.09, eager_channels_last=0.2),
        document("op", {}, ours=0.5, ours_compile=0.1, eager=2.0),
        document("conv", {}, aten=1.0),  # no sentence
        {"command": "python -m benchmarks memory", "runs": []},
    ]
    assert headline.in_short(documents).splitlines()[1:] == [
        "- resnet18 infers 4 images of 32x32 in 10 ms, 1.20 times as fast as ONNX Runtime, the fastest of 2 others",
        "- resnet18 trains on 1 image of 32x32 in 100.0 ms, 0.90 times as fast as PyTorch, the fastest of 2 others",
        "- batch norm, addition and ReLU alone are 4.00 times as fast as those of PyTorch"
        " (geometric mean over 1 shapes)",
    ]
