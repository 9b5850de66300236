"""`styles` measures each style with its stock network and its twin."""

from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks.styles import command
from tests.support.benchmark_cli import QUICK_OPTIONS, assert_report_files, run_benchmark


def test_styles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run_benchmark("styles", *QUICK_OPTIONS, "as-shipped", out=tmp_path)
    assert_report_files(tmp_path, "styles")
    (run,) = document["runs"]
    assert not run["failures"]
    cases = [(case["style"], case["mode"]) for case in run["cases"]]
    assert cases == [(style, mode) for style in command.QUICK_STYLES for mode in ("train", "eval")]
    for case in run["cases"]:
        assert set(case["providers"]) == {"ours", "eager-channels-last"} and case["twin"].startswith("torchvision-")
        assert case["twin_time"]["median_s"] > 0
        assert ("overhead_us" in case) == (case["mode"] == "train")
    printed = capfd.readouterr().out
    assert "time / twin" in printed and "us/block over twin" in printed
    assert "slowest relative to its twin" in command.summary(run)


def test_cifar(tmp_path: Path) -> None:
    document = run_benchmark("styles", "--cifar", *QUICK_OPTIONS, "as-shipped", out=tmp_path)
    assert_report_files(tmp_path, "styles")
    (run,) = document["runs"]
    assert [case["channels_last"] for case in run["cases"]] == [True, False]
    for case in run["cases"]:
        assert set(case["providers"]) == {"ours", "eager", "eager-channels-last"}
        assert 0 <= case["share_of_allowed_error"]["ours"] <= 1


def test_style_that_is_not_fused_is_reported_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    build_module = command.build_module

    def refuse(provider, stock, *options):
        if type(stock).__module__.endswith("cifar") and provider.fused:
            raise RuntimeError("nothing was fused")
        return build_module(provider, stock, *options)

    monkeypatch.setattr(command, "build_module", refuse)
    options = command_line.build_parser().parse_args(["styles", "--quick"])
    run = command.measure(options)
    assert {case["style"] for case in run["cases"]} == {"regnet"}
    assert list(run["failures"]) == ["cifar-basic train 2x16x16", "cifar-basic eval 2x16x16"]
    assert "cifar-basic eval 2x16x16 was not measured: RuntimeError: nothing was fused" in command.tables(run)


def _train_quantizable_basic() -> dict:
    sizes = ("--batch", "4", "--repeat", "1", "--min-time", "0", "--cases", "quantizable-basic train")
    return command.measure(command_line.build_parser().parse_args(["styles", *sizes]))


def test_one_relu_may_switch_in_a_small_network() -> None:
    """Ours and stock PyTorch differ here in one ReLU of the last block, whose input is within rounding of zero."""
    run = _train_quantizable_basic()
    assert not run["failures"] and len(run["cases"]) == 1


def test_wrong_gradient_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    build_module = command.build_module

    def scaled(provider, stock, *options):
        module = build_module(provider, stock, *options)
        if provider.fused:
            module.conv1.weight.register_hook(lambda grad: 1.05 * grad)
        return module

    monkeypatch.setattr(command, "build_module", scaled)
    with pytest.raises(SystemExit, match="ours, quantizable-basic train.* grad of conv1.weight has a relative error"):
        _train_quantizable_basic()


def test_cifar_rejects_sizes() -> None:
    options = command_line.build_parser().parse_args(["styles", "--cifar", "--width", "2"])
    with pytest.raises(SystemExit, match="--cifar sets the network"):
        command.measure(options)
