"""`op`, `block` and `model` write their results; wrong providers and invalid options are rejected."""

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import __main__ as command_line
from benchmarks import allocator, check, data, op, options, providers
from tests.support.benchmark_cli import QUICK_OPTIONS, assert_report_files, run_benchmark


@pytest.mark.parametrize("subcommand", [*command_line.SUBCOMMANDS, "compare", "all"])
def test_help(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([subcommand, "--help"])
    assert caught.value.code == 0
    assert f"usage: python -m benchmarks {subcommand}" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_op(mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run_benchmark(
        "op", "--mode", mode, *QUICK_OPTIONS, "both" if mode == "train" else "as-shipped", out=tmp_path
    )
    assert_report_files(tmp_path, "op")
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
    arguments = ("--providers", "ours+compile,compile-channels-last", "--cases", "+add", *QUICK_OPTIONS, "as-shipped")
    document = run_benchmark("op", *arguments, out=tmp_path)
    ((case,),) = [one["cases"] for one in document["runs"]]
    assert list(case["providers"]) == ["ours+compile", "compile-channels-last"]


@pytest.mark.parametrize("name", ["block", "model"])
def test_block_and_model(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = run_benchmark(name, *QUICK_OPTIONS, "as-shipped", out=tmp_path)
    assert_report_files(tmp_path, name)
    assert "time / ours" in capfd.readouterr().out
    (one,) = document["runs"]
    assert len(one["cases"]) == 2
    for case in one["cases"]:
        assert set(case["providers"]) == {"ours", "eager", "eager-channels-last"}
    if name == "model":
        train, evaluate = one["cases"]
        assert list(train["providers"]["ours"]["phases_s"]) == ["forward", "backward", "optimizer"]
        assert list(evaluate["providers"]["ours"]["phases_s"]) == ["forward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["op", "--providers", "ours,theirs"],
            "unknown provider 'theirs'; choose from ours, ours+compile, ours-triton, ours-triton-norms, ",
        ),
        (["op", "--providers", ""], "unknown provider ''"),
        (["op", "--threads", "0"], "expected a positive integer, got '0'"),
        (["block", "--batch", "many"], "expected a positive integer, got 'many'"),
        (["model", "--min-time", "-1"], "expected a number of seconds, 0 or more, got '-1'"),
        (["model", "--min-time", "nan"], "expected a number of seconds"),
        (["model", "--model", "vgg16"], "invalid choice: 'vgg16'"),
        (["memory", "--allocator", "cold"], "invalid choice: 'cold'"),
        (["infer", "--providers", "ours+compile"], "unknown provider 'ours+compile'; choose from ours, ours-triton"),
        (["infer", "--batch", "0"], "expected a positive integer, got '0'"),
        (["infer", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["conv", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["roofline", "--device", "cuda"], "invalid choice: 'cuda'"),
        (["roofline", "--threads", "2"], "unrecognized arguments: --threads 2"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "the following arguments are required: subcommand"),
    ],
)
def test_invalid_options_are_rejected(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(arguments)
    assert message in capsys.readouterr().err


def op_options(**changes: object) -> argparse.Namespace:
    parsed = command_line.build_parser().parse_args(["op", "--quick"])
    return argparse.Namespace(**{**vars(parsed), **changes})


def test_options_that_select_nothing_or_conflict() -> None:
    with pytest.raises(SystemExit, match="--cases 'layer9' matches none of: 8x6x6"):
        op.select_cases(op_options(cases="layer9"))
    parsed = command_line.build_parser().parse_args(["model", "--small", "--batch", "3"])
    with pytest.raises(SystemExit, match="--small .* got --batch"):
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
    """Return correct values, with statistics that are constants in backward."""
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
def test_wrong_provider_is_rejected_before_timing(wrong, tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "build_batch_norm_act", lambda *_: wrong)
    monkeypatch.setattr(op, "measure_interleaved", lambda *_, **__: pytest.fail("timed a wrong provider"))
    with pytest.raises(
        check.ResultsDifferError, match=rf"ours, 8x6x6.*{tensor} has a relative error of .*stock PyTorch of"
    ):
        op.measure(op_options())


def test_unfused_model_is_not_measured_as_fused_res() -> None:
    with pytest.raises(RuntimeError, match="nothing was fused"):
        providers.build_module(providers.PROVIDERS["ours"], nn.Sequential(nn.Linear(2, 2)))


def test_check_reports_missing_results_shapes_and_nan() -> None:
    good = {"a": torch.ones(3), "b": torch.full((2,), 2.0)}

    def attempt(**changes: Tensor) -> float:
        return check.check_results("p", {**good, **changes}, good, [good], factor=2, floor=1e-6)

    assert attempt() == 0
    assert attempt(a=good["a"] + 4e-7) == pytest.approx(0.36, abs=0.1)
    with pytest.raises(check.ResultsDifferError, match="b has a relative error of nan"):
        attempt(b=torch.tensor([2.0, math.nan]))
    with pytest.raises(check.ResultsDifferError, match=r"a has shape \(1,\), expected \(3,\)"):
        attempt(a=torch.ones(1))
    with pytest.raises(check.ResultsDifferError, match="returned"):
        attempt(c=torch.ones(1))


def test_photographs() -> None:
    images = data.photographs(3, 40, seed=1)
    assert images.shape == (3, 3, 40, 40)
    assert images.dtype == torch.float32
    assert torch.equal(images, data.photographs(3, 40, seed=1))
    assert not torch.equal(images, data.photographs(3, 40, seed=2))
    # Normalized photographs: values in the range of the normalization, neighboring pixels similar.
    assert -2.2 < images.min() < images.max() < 2.7
    assert (images[..., 1:] - images[..., :-1]).abs().mean() < 0.5 * images.std()
    assert data.labels(5, 10).shape == (5,)


def test_provider_defaults() -> None:
    quick = options.select_providers(op_options())
    assert [provider.name for provider in quick] == ["ours", "eager", "eager-channels-last"]
    known = options.select_providers(op_options(quick=False), providers.NORM_PROVIDERS)
    assert len(known) == 6 and not any(provider.opt_in for provider in known)


def test_half_precision() -> None:
    for dtype in ("bfloat16", "float16"):
        (case,) = op.measure(op_options(dtype=dtype, cases="+add"))["cases"]
        assert case["dtype"] == dtype
        assert case["fewest_bytes"] == 2 * 7 * 2 * 16 * 5 * 5
    parsed = command_line.build_parser().parse_args(["block", "--quick", "--cases", "resnet18", "--dtype", "bfloat16"])
    (case,) = command_line.block.measure(parsed)["cases"]
    assert 0 < case["share_of_allowed_error"]["ours"] <= 1
