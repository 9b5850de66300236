"""`make bench-amx`: its rehearsal runs every step, and the verdicts follow from the documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import amx
from fused_res import _extension

CPUINFO = """processor : 0
vendor_id : GenuineIntel
model name : Intel(R) Xeon(R) Platinum 8592+
flags : fpu avx512f {amx}
"""


def test_processor_is_named_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert amx.processor(CPUINFO.format(amx="amx_tile amx_bf16")) == ("xeon-amx-2-cores", True)
    assert amx.processor(CPUINFO.format(amx="")) == ("xeon-2-cores", False)


def test_without_amx_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "processor", lambda text: ("epyc", False))
    with pytest.raises(SystemExit, match="lacks amx_bf16"):
        amx.main([])


def test_verdicts(tmp_path: Path) -> None:
    def provider(seconds: float) -> dict[str, object]:
        return {"median_s": seconds, "samples_s": [seconds]}

    case = {
        "model": "resnet50",
        "batch": 16,
        "providers": {"ours": provider(1.0), "openvino": provider(1.5), "compile-freezing": provider(1.3)},
    }
    (tmp_path / "infer-bf16.json").write_text(json.dumps({"runs": [{"cases": [case]}]}))
    found = {(row[0], row[1]): row[3:] for row in amx.rows(tmp_path)}
    assert found["infer-bf16", "resnet50 batch 16"] == ["1.30x (1.30x) compile-freezing", "missed by 7%"]
    assert found["infer", "resnet50 batch 16"] == ["not measured", ""]


@pytest.mark.full
@pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason)
def test_rehearsal(tmp_path: Path) -> None:
    amx.main(["--rehearse", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{step}.json" for step in amx.STEPS}
