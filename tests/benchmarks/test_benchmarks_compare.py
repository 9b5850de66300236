"""`python -m benchmarks compare` on small results folders with known changes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from benchmarks import __main__ as command_line
from benchmarks import compare, readme, timing

CASES = ("layer1", "layer2")
MILLISECONDS = {"ours": 10.0, "eager": 20.0, "eager-channels-last": 15.0}


def write(folder: Path, changes: dict[str, float] | None = None, rounds: int = 9, **environment: Any) -> Path:
    """Write a results folder with one document: times (with 1% noise) and bytes multiplied by `changes`."""
    generator = random.Random(f"{folder.name}{rounds}")
    known = {
        "cpu": "a CPU",
        "cores": 2,
        "threads": 2,
        "isa": "avx2",
        "backend": "cpu",
        "torch": "2.13.0",
        "commit": None,
    }
    cases = []
    for name in CASES:
        providers = {}
        for provider, milliseconds in MILLISECONDS.items():
            median = milliseconds / 1e3 * (changes or {}).get(provider, 1.0)
            samples = timing.Samples({"forward": [median * generator.gauss(1, 0.01) for _ in range(rounds)]})
            memory = 2**20 * (changes or {}).get(f"{provider} bytes", 1.0)
            providers[provider] = {**samples.summary(), "peak_tensor_bytes": round(memory)}
        cases.append({"name": name, "dtype": "float32", "providers": providers})
    env = {**known, "fused_res": "0.1.0", "date": "2026-11-24T00:00:00+00:00", **environment}
    document = {
        "command": "python -m benchmarks op",
        "runs": [{"allocator": "warm", "environment": env, "cases": cases}],
    }
    folder.mkdir()
    (folder / "op.json").write_text(json.dumps(document))
    return folder


def exit_code(*folders: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        command_line.main(["compare", *map(str, folders)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("changes", "code", "verdicts"),
    [
        ({}, 0, {"within noise"}),
        ({"ours": 1.3}, 1, {"slower"}),
        ({"ours": 0.7}, 0, {"faster"}),
        ({"ours": 1.3, "eager": 1.3, "eager-channels-last": 1.3}, 0, {"within noise"}),  # drift
        ({"eager": 1.3, "eager-channels-last": 1.3}, 0, {"faster"}),
        ({"ours": 1.3, "eager": 1.6}, 0, {"within noise"}),  # disagreement of the peers is noise
        ({"ours bytes": 1.01}, 1, {"within noise"}),
        ({"eager bytes": 1.01}, 0, {"within noise"}),
    ],
)
def test_verdicts(
    changes: dict[str, float], code: int, verdicts: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", changes)
    assert exit_code(a, b) == code
    printed = capsys.readouterr().out
    found = compare.compare(*(compare.load(folder)[1] for folder in (a, b)))
    assert {
        one.verdict for key, one in found.items() if key.provider == "ours" and key.quantity == "median_s"
    } == verdicts
    assert printed.count("regression: op, warm, layer") == 2 * code
    assert "geometric mean of 2 " in printed and "warning" not in printed


def test_one_peer_and_no_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in ("eager", "eager-channels-last"):
        monkeypatch.delitem(MILLISECONDS, peer)
        a, b, c = (write(tmp_path / f"{side}{peer}", {"ours": f}) for side, f in (("a", 1.0), ("b", 1.3), ("c", 1.0)))
        assert (exit_code(a, b), exit_code(a, c)) == (1, 0)


def test_one_round_is_never_significant(tmp_path: Path) -> None:
    assert exit_code(write(tmp_path / "a", rounds=1), write(tmp_path / "b", {"ours": 2.0}, rounds=1)) == 0


@pytest.mark.parametrize("rounds", [3, 9, 60])
def test_relative_error(rounds: int) -> None:
    """The mean estimate matches the standard deviation of simulated medians; for three samples it is a tenth higher."""
    generator = random.Random(rounds)
    many = [
        timing.Samples({"forward": [generator.gauss(1, 0.01) for _ in range(rounds)]}).summary() for _ in range(4000)
    ]
    medians = [one["median_s"] for one in many]
    deviation = (sum((median - 1) ** 2 for median in medians) / len(medians)) ** 0.5
    assert sum(map(compare.relative_error, many)) / len(many) == pytest.approx(deviation, rel=0.15)


def test_warnings_and_unmatched_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", cpu="another CPU", threads=1, openvino="2026.4.1")
    document = json.loads((b / "op.json").read_text())
    (run,) = document["runs"]
    del run["cases"][0]["providers"]["eager"]
    run["cases"][0]["dtype"] = run["cases"][1]["dtype"] = "bfloat16"
    (b / "op.json").write_text(json.dumps(document))
    assert exit_code(a, b) == 0
    printed = capsys.readouterr().out
    for text in (
        "cpu: A has a CPU, B has another CPU",
        "threads: A has 2, B has 1",
        "dtype: A has float32, B has bfloat16",
    ):
        assert f"warning: {text} (op)" in printed
    assert printed.count("warning: ") == 3
    assert "only in A: op, warm, eager: layer1\n" in printed and "only in B" not in printed


def test_folders_without_common_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "op.json").write_text("[]")
    for folder, message in (("none", "got no folder"), ("empty", "no measurement in common"), ("broken", "op.json")):
        assert exit_code(a, tmp_path / folder) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_committed_results_compared_with_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    folders = [path for path in readme.RESULTS.iterdir() if path.is_dir() and path.name != "latest"]
    for folder in folders:
        assert exit_code(folder, folder) == 0
        printed = capsys.readouterr().out
        assert "B/A" in printed and not {"faster", "slower", "warning:", "only"} & set(printed.split())
