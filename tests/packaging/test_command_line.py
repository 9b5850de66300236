"""`python -m fused_res summarize` and `python -m fused_res check`: models, options, errors and exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_res import functional
from fused_res.__main__ import main
from fused_res.testing import stub_torchvision_operators

ROOT = Path(__file__).resolve().parents[2]
OWN_MODELS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = build()

    def forward(self, x):
        return self.body(x)

ready = Net()
number = 3

def needs_argument(width):
    return build()

def returns_number():
    return 3
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_models.py").write_text(OWN_MODELS)
    (tmp_path / "broken_models.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for name in ("own_models", "broken_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """Run a command that fails and return its error message."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == status
    return capsys.readouterr().err


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize("name", ["build", "Net", "ready", "ready.body"])
def test_summarize_own_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["summarize", f"own_models:{name}"])
    printed = capsys.readouterr().out
    assert "1 of 1 norms run fused" in printed and "backend=cpu" in printed and "for the first input" in printed


@pytest.mark.usefixtures("own_models")
def test_summarize_with_input_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    main(["summarize", "own_models:build", "--input", "2,3,8,8", "--backend", "reference"])
    printed = capsys.readouterr().out
    assert "backend=reference" in printed and "3x3 aten" in printed


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
def test_summarize_library_model(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    stub_torchvision_operators()
    pytest.importorskip(spec.partition(":")[0], reason="the model is of this library")
    main(["summarize", spec])
    printed = capsys.readouterr().out
    assert "BasicBlock" in printed and printed.splitlines()[-1] == "20 of 20 norms run fused"


@pytest.mark.usefixtures("own_models")
def test_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["check", "own_models:build", "--input", "2,3,9,9", "--seconds", "0.01"])
    printed = capsys.readouterr().out
    assert "fused_res.check: ok" in printed and "(2, 3, 9, 9), torch.float32" in printed
    assert "1 of 1 batch norms run fused" in printed and "interleaved" in printed
    small = ["--input", "2,3,9,9", "--seconds", "0"]
    options = [*small, "--dtype", "bfloat16", "--channels-last", "--backend", "reference"]
    layouts = []
    original = functional.run_block

    def wrong(input: Tensor, *arguments: Any) -> tuple[Tensor, None]:
        layouts.append(input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous())
        return original(input, *arguments)[0] * 1.1, None

    main(["check", "own_models:build", *options])
    printed = capsys.readouterr().out
    assert "torch.bfloat16" in printed and "backend reference" in printed and "interleaved" not in printed
    monkeypatch.setattr(functional, "run_block", wrong)
    with pytest.raises(SystemExit) as exit:
        main(["check", "own_models:build", *options])
    printed, error = capsys.readouterr()
    assert exit.value.code == 1 and "training outputs output: " in printed
    assert error == "own_models:build: fused and stock differ\n"
    assert layouts and all(layouts)


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "MODEL: expected torchvision:NAME, timm:NAME or MODULE:NAME, got 'resnet50'"),
        (":build", "MODEL: expected"),
        ("no_such_module:build", "importing no_such_module raised ModuleNotFoundError: No module named"),
        ("broken_models:build", "importing broken_models raised ZeroDivisionError: division by zero"),
        ("own_models:nothing", "MODEL: own_models has no attribute 'nothing'"),
        ("own_models:number", "MODEL: own_models:number must be or return a torch.nn.Module, got int"),
        ("own_models:returns_number", "MODEL: own_models:returns_number must be or return a torch.nn.Module, got int"),
        ("own_models:needs_argument", "own_models:needs_argument() raised TypeError: needs_argument() missing 1"),
    ],
)
@pytest.mark.parametrize("command", ["summarize", "check"])
def test_invalid_model(command: str, spec: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, command, spec)
    assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_unknown_library_model(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    stub_torchvision_operators()
    pytest.importorskip(library, reason="the error is of this library")
    error = error_of(capsys, "summarize", f"{library}:no_such_net")
    assert "no_such_net" in error and "Unknown model" in error and error.count("\n") == 1


def test_library_that_is_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    assert error_of(capsys, "summarize", "timm:resnet18") == "timm is not installed: pip install timm\n"


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "2,3,9,0"], "argument --input: expected positive integers such as 2,3,224,224, got '2,3,9,0'"),
        (["--input", "2x3"], "argument --input: expected positive integers"),
        (["--seconds", "-1"], "argument --seconds: expected a non-negative number, got '-1'"),
        (["--seconds", "nan"], "argument --seconds: expected a non-negative number"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--device", "nowhere"], "check raised RuntimeError: "),
        (["--backend", "quick"], "check raised ValueError: backend must be one of"),
        (["--input", "2,5,9,9"], "check raised RuntimeError: Given groups=1, weight of size [8, 3, 3, 3], expected"),
    ],
)
def test_invalid_option_of_check(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "check", "own_models:build", *options)
    assert message in error.splitlines()[-1]


@pytest.mark.usefixtures("own_models")
def test_model_that_rejects_the_input_of_summarize(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "summarize", "own_models:build", "--input", "2,5,9,9")
    assert error.startswith("the model raised ") and "to have 3 channels, but got 5" in error and error.count("\n") == 1


def test_in_a_process(own_models: Path) -> None:
    """From the folder of the user's module; torchvision is imported although its operators may not load."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "fused_res"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=own_models, env=environment, capture_output=True, text=True, timeout=300
        )

    done = run("check", "own_models:Net", "--input", "2,3,9,9", "--seconds", "0")
    assert done.returncode == 0 and "fused_res.check: ok" in done.stdout, done.stderr
    stub_torchvision_operators()
    pytest.importorskip("torchvision", reason="the rest of the test summarizes its model")
    done = run("summarize", "torchvision:resnet18")
    assert done.returncode == 0 and "BasicBlock" in done.stdout, done.stderr


def test_segmentation_model_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_res import _cli

    stub_torchvision_operators()
    models = pytest.importorskip("torchvision.models", reason="the model is torchvision's")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights are downloaded")

    monkeypatch.setattr(models._api, "load_state_dict_from_url", refuse)
    assert isinstance(_cli._torchvision_model("fcn_resnet50"), nn.Module)
