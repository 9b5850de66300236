"""`make bench-amx`: its rehearsal runs every step, and the verdicts follow from the documents."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import amx, environment, frozen
from fused_res import _extension

CPUINFO = """processor : 0
vendor_id : GenuineIntel
model name : Intel(R) Xeon(R) Platinum 8592+
flags : fpu avx512f {amx}
"""


def test_processor_is_named_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "physical_cores", lambda cpus: 2)
    assert amx.processor(CPUINFO.format(amx="amx_tile amx_bf16")) == ("xeon-amx-2-cores", True)
    assert amx.processor(CPUINFO.format(amx="")) == ("xeon-2-cores", False)
    monkeypatch.setattr(environment, "physical_cores", lambda cpus: 1)
    assert amx.processor(CPUINFO.format(amx="")) == ("xeon-1-core", False)


@pytest.mark.parametrize(
    ("siblings", "usable", "cores"),
    [
        (["0-1", "0-1"], [0, 1], 1),
        (["0,2", "1,3", "0,2", "1,3"], [0, 1, 2, 3], 2),
        (["0,2", "1,3", "0,2", "1,3"], [0, 2], 1),
        (["0", "1"], [0, 1], 2),
        ([], [0, 1], 2),  # a container without sysfs
    ],
)
def test_hardware_threads_of_a_core_count_once(
    siblings: list[str], usable: list[int], cores: int, tmp_path: Path
) -> None:
    for cpu, text in enumerate(siblings):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{text}\n")
    assert environment.physical_cores(usable, tmp_path) == cores


def test_without_amx_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "processor", lambda text: ("epyc", False))
    with pytest.raises(SystemExit, match="lacks amx_bf16"):
        amx.main([])


def test_verdicts(tmp_path: Path) -> None:
    """A target is met only in medians and in minima, each against the peer that is fastest in it."""

    def provider(median: float, minimum: float) -> dict[str, object]:
        return {"median_s": median, "samples_s": [minimum, median]}

    case = {
        "name": "resnet50 b16",
        "model": "resnet50",
        "batch": 16,
        "stock_error": 1e-3,
        "providers": {
            "ours": provider(1.0, 1.0) | {"error": 1.3e-3},
            "openvino": provider(1.5, 1.45),
            "compile-freezing": provider(1.6, 1.3),
        },
    }
    (tmp_path / "infer-bf16.json").write_text(json.dumps({"runs": [{"cases": [case]}]}))
    fp32 = case | {"providers": {"ours": provider(2.0, 0.9), "openvino": provider(3.0, 2.9)}}
    (tmp_path / "infer.json").write_text(json.dumps({"runs": [{"cases": [fp32]}]}))
    training = case | {
        "mode": "train",
        "providers": {
            "ours": provider(1.0, 0.8),
            "eager-channels-last": provider(2.3, 1.4),
            "compile": provider(2.1, 1.9),
            "ours-norms": provider(1.1, 1.0),
        },
    }
    (tmp_path / "model-bf16.json").write_text(json.dumps({"runs": [{"cases": [training]}]}))
    conv = {
        "name": "1x1",
        "providers": {
            "ours-packed": provider(1.02, 1.0) | {"error": 0.9e-3},
            "onednn-fused": provider(1.0, 0.95),
            "aten-unfused": provider(2.0, 2.0) | {"error": 1e-3},
        },
    }
    (tmp_path / "conv-bf16.json").write_text(json.dumps({"runs": [{"cases": [conv]}]}))
    found = {(row.document, row.case): (row.measured, row.verdict) for row in amx.verdicts(tmp_path)}
    assert found["infer-bf16", "resnet50 batch 16"] == ("1.50x (1.30x) openvino", "missed by 7%")
    assert found["infer-bf16", "error against float64"] == ("1.30x, resnet50 b16", "missed by 30%")
    assert found["infer-bf16", "resnet50 batch 16, bfloat16"] == ("2.00x (0.90x)", "missed by 10%")
    assert found["infer-bf16", "resnet50 batch 1, bfloat16"] == ("not measured", "")
    assert found["infer", "resnet50 batch 16"] == ("1.50x (3.22x) openvino", "met")
    assert found["infer", "resnet18 batch 1"] == ("not measured", "")
    assert found["model-bf16", "resnet50 batch 16"] == ("2.10x (1.75x) compile", "missed by 3%")
    assert found["model-bf16", "resnet18 batch 16"] == ("not measured", "")
    assert found["conv-bf16", "error against float64"] == ("0.90x, 1x1", "met")
    assert found["conv-bf16", "layers slower than oneDNN by over 3 %"] == ("0 (1) of 1", "missed")


def test_frozen_verdicts() -> None:
    case = {"freeze_s": 2.5, "equal": 40, "calls": 40}
    assert [row.verdict for row in amx.frozen_verdicts([case])] == ["met", "met"]
    worse = amx.frozen_verdicts([{"freeze_s": 3.6, "equal": 39, "calls": 40}])
    assert [(row.measured, row.verdict) for row in worse] == [
        ("3.60 s", "missed by 20%"),
        ("39 of 40 calls", "missed"),
    ]
    assert [row.measured for row in amx.frozen_verdicts([])] == ["not measured"] * 2


@pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason)
def test_frozen_document(tmp_path: Path) -> None:
    frozen.main(["--quick", "--out", str(tmp_path / "frozen.json")])
    (case,) = amx.cases_of(tmp_path / "frozen.json")
    assert case["equal"] == case["calls"] == frozen.THREADS and case["freeze_s"] > 0
    (run,) = json.loads((tmp_path / "frozen.json").read_text())["runs"]
    assert "8 of 8 calls from 8 threads return the bits" in frozen.summary(run)


def test_complete_steps_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], variables: dict[str, str]) -> None:
        assert variables == {"FUSED_RES_CPU_ISA": "amx"}
        commands.append(command)
        if command[0] == "benchmarks.frozen":
            Path(command[2]).write_text('{"runs": [{"cases": []}]}')
        if command[0] == "benchmarks":
            for suffix in ("json", "png"):
                (tmp_path / "scratch" / f"{command[1]}.{suffix}").write_text('{"runs": [{"cases": []}]}')

    monkeypatch.setattr(amx, "processor", lambda text: ("xeon", True))
    monkeypatch.setattr(amx, "ROOT", tmp_path)
    monkeypatch.setattr(amx, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(amx, "run", run)
    (tmp_path / "scratch").mkdir()
    folder = tmp_path / "benchmarks" / "results" / "xeon"
    folder.mkdir(parents=True)
    (folder / "infer-bf16.json").write_text('{"runs": [{"cases": []}]}')
    amx.main([])
    assert [command[:2] for command in commands[1:]] == [
        ["benchmarks", "infer"],
        ["benchmarks", "conv"],
        *[["benchmarks", "model"]] * 3,
        *[["benchmarks", "chain"]] * 2,
        ["benchmarks.frozen", "--out"],
    ]
    assert {path.stem for path in folder.glob("*.json")} == {*amx.STEPS, amx.FROZEN}
    commands.clear()
    amx.main(["--again"])
    assert commands[0][0] == "pytest" and len(commands) == 2 + len(amx.STEPS)


def test_steps_parse() -> None:
    parser = command_line.build_parser()
    for text in amx.STEPS.values():
        for command in (shlex.split(text), amx.quick(shlex.split(text))):
            parsed = parser.parse_args(command)
            assert (parsed.dtype == "bfloat16") == ("bfloat16" in text)


@pytest.mark.full
@pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason)
def test_rehearsal(tmp_path: Path) -> None:
    amx.main(["--rehearse", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{step}.json" for step in (*amx.STEPS, amx.FROZEN)}
