"""`zoo` measures one row per model, survives models that fail, and replaces only the rows that it measures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import __main__ as command_line
from benchmarks.zoo import command, measure, page
from benchmarks.zoo.models import SMALL, ZOO, ZooModel
from tests.support.zoo_workers import unreliable

BY_NAME = {model.title: model for model in ZOO}


def parse(*arguments: str) -> argparse.Namespace:
    return command_line.build_parser().parse_args(["zoo", *arguments])


def row_of(model: ZooModel, date: str = "2026-01-01", **changes: Any) -> measure.Row:
    """Return a row as of a model that equals stock, with fused norms, twice as fast as stock."""
    times = {name: {"median_s": 1.0 if name.startswith("ours") else 2.0} for name in measure.BASELINES}
    times |= {name: {"median_s": 2.0} for name in measure.BASELINES.values()}
    return {
        "name": model.title,
        "package": model.package,
        "version": "1.0",
        "shape": list(model.shape),
        "norms": {mode: [20, 20] for mode in ("training", "evaluation", "frozen")},
        "errors": {"training gradients": 1e-12, "evaluation outputs": 1e-14},
        "reasons": [],
        "date": date,
        "commit": "0123456789abcdef",
        "providers": times,
        **changes,
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace measurements by made-up rows; return the titles of the models that are measured."""
    titles: list[str] = []

    def rows_of(models: Sequence[ZooModel], *_: Any) -> Iterator[measure.Row]:
        for model in models:
            titles.append(model.title)
            yield row_of(model, f"2026-01-{len(titles):02}")

    monkeypatch.setattr(command, "rows_of", rows_of)
    monkeypatch.setattr(command, "missing_packages", list)
    return titles


def test_models_that_fail_get_a_row_and_the_others_are_measured() -> None:
    titles = ("resnet18", "resnet50", "googlenet", "densenet121", "mobilenet_v2")
    chosen = [BY_NAME[f"torchvision:{title}"] for title in titles]
    settings: Any = None  # measure.Settings would import torch in each worker
    rows = list(command.rows_of(chosen, settings, 5.0, work=unreliable))
    assert [row["name"] for row in rows] == [model.title for model in chosen]
    assert [row.get("failure") for row in rows] == [
        None,
        "ended its process with exit code 7",
        "ValueError: no such model",
        "exceeded its time limit of 5 s",
        None,
    ]


def test_measurement_of_a_model() -> None:
    pytest.importorskip("pytorchcv", reason="requirements/peers.txt has it")
    (model,) = (model for model in SMALL if model.name == "resnet20_cifar10")
    row = measure.measure(model, measure.Settings(repeat=2, min_time=0.0))
    assert json.loads(json.dumps(row)) == row
    assert row["norms"] == {mode: [21, 21] for mode in ("training", "evaluation", "frozen")}
    assert set(measure.speedups(row)) == set(measure.BASELINES)
    assert row["providers"]["stock training"]["rounds"] == 2
    assert set(row["providers"]["ours training"]["phases_s"]) == {"forward", "backward", "optimizer"}
    assert command.defects(row, model) == []


def test_only_replaces_the_rows_that_it_names(tmp_path: Path, measured: list[str]) -> None:
    def rows() -> dict[str, str]:
        document = json.loads((tmp_path / "zoo.json").read_text())
        return {row["name"]: row["date"] for row in document["runs"][0]["cases"]}

    command.run(parse("--out", str(tmp_path), "--only", "torchvision:densenet121"))
    command.run(parse("--out", str(tmp_path), "--only", "torchvision:resnet18"))
    assert rows() == {"torchvision:resnet18": "2026-01-02", "torchvision:densenet121": "2026-01-01"}
    assert list(rows()) == ["torchvision:resnet18", "torchvision:densenet121"]  # in the catalog's order
    command.run(parse("--out", str(tmp_path), "--only", "*:densenet121", "--resume"))
    assert rows()["torchvision:densenet121"] == "2026-01-01"
    assert measured.count("torchvision:densenet121") == 1 and measured.count("timm:densenet121") == 1
    command.run(parse("--out", str(tmp_path), "--only", "torchvision:densenet121"))
    assert rows()["torchvision:densenet121"] == f"2026-01-{len(measured):02}"
    assert rows()["torchvision:resnet18"] == "2026-01-02"


def test_results_of_another_machine_are_not_mixed(tmp_path: Path, measured: list[str]) -> None:
    options = parse("--out", str(tmp_path), "--only", "resnet18")
    command.run(options)
    path = tmp_path / "zoo.json"
    document = json.loads(path.read_text())
    document["runs"][0]["environment"]["cpu"] = "Another CPU"
    path.write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="--out: .*zoo.json was measured elsewhere .cpu: Another CPU, now "):
        command.run(options)


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, 0, "20 of 20 norms, equal"),
        ({"norms": {"training": [19, 20]}}, 1, "training: 19 of 20 norms run fused, expected at least 100%"),
        ({"errors": {"training buffers": 1e-3}}, 1, "training buffers: error 1.0e-03, allowed 1e-09"),
        ({"errors": {"frozen outputs": float("nan")}}, 1, "frozen outputs: error nan"),
        ({"failure": "KeyError: x"}, 1, "torchvision:resnet18: KeyError: x"),
    ],
)
def test_check_exits_with_status_1_and_writes_nothing(
    changes: dict[str, Any],
    status: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rows_of(models: Sequence[ZooModel], settings: measure.Settings, _: float) -> Iterator[measure.Row]:
        assert settings.min_time is None
        for model in models:
            complete = row_of(model, **changes)
            complete["norms"] |= {"evaluation": [20, 20]}
            yield complete

    monkeypatch.setattr(command, "rows_of", rows_of)
    assert command.run(parse("--check", "--only", "torchvision:resnet18", "--out", str(tmp_path))) == status
    assert text in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_missing_package_is_noted(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "missing_packages", lambda: ["monai"])
    command.run(parse("--out", str(tmp_path), "--only", "densenet121"))
    assert "monai is not installed: 1 of its models are not measured" in capsys.readouterr().out
    assert "monai:DenseNet121" not in measured and "timm:densenet121" in measured
    with pytest.raises(SystemExit, match="--only 'alexnet' matches no model"):
        command.run(parse("--only", "alexnet"))


def test_page() -> None:
    first, second, third = (BY_NAME[f"torchvision:{name}"] for name in ("resnet18", "resnet50", "googlenet"))
    rows = [
        row_of(first),
        row_of(
            second, norms={"training": [199, 200], "evaluation": [200, 200]}, reasons=["1 x BatchNorm2d has a hook"]
        ),
        {**row_of(third, "2026-02-03", failure="RuntimeError: a | b"), "providers": {}},
    ]
    document = {"command": "python -m benchmarks zoo", "runs": [{"environment": command.environment.describe()}]}
    document["runs"][0]["environment"] |= {"backend": "cpu"}
    document["runs"][0]["cases"] = rows
    lines = page.section(document).splitlines()
    assert "2026-01-01 to 2026-02-03 · commit 0123456789ab" in lines[0] and "torchvision 1.0" in lines[0]
    assert "| resnet18 | 4x3x64x64 | 20 | 100 % | 100 % | yes | 2.00x | 2.00x | 2.00x |" in lines
    assert "| resnet50 | 4x3x64x64 | 200 | 99 % | 100 % | yes | 2.00x | 2.00x | 2.00x |" in lines
    assert "| googlenet | 4x3x64x64 |  |  |  | not measured: RuntimeError: a \\| b |  |  |  |" in lines
    assert "- resnet50: 1 x BatchNorm2d has a hook" in lines
    assert "| torchvision | 2 | 220 | 99 % | 100 % | 2 | 2.00x (2.00x) | 2.00x (2.00x) | 2.00x (2.00x) |" in lines
    assert lines[-1].startswith("Not measured: torchvision:resnext50_32x4d, ")
