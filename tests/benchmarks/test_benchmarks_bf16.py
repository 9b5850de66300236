"""`conv` and `infer` in bfloat16: candidates of each layer, errors in units of stock's, and bounds of the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import ceilings, chain, check, conv, headline, infer, network, readme, suite
from fused_res import _extension
from fused_res.backends.cpu.convolution import KERNELS


def provider(*samples: float, error: float = 0.0) -> dict[str, Any]:
    return {"median_s": sorted(samples)[len(samples) // 2], "samples_s": list(samples), "error": error, "rounds": 3}


@pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_candidates_compute_the_layer(dtype: str) -> None:
    """Each candidate has an error of the dtype's rounding against float64, and one of them, or oneDNN, is selected."""
    parsed = command_line.build_parser().parse_args(["conv", "--quick", "--dtype", dtype, "--model", "resnet50"])
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    seen = set()
    for case in conv.select_cases(parsed):
        t = conv.operands(case.layer, parsed)
        exact = conv.aten_unfused(t.double(), case.layer)
        for name, call in conv.candidate_calls(t, case.layer).items():
            seen.add(name)
            assert check.relative_error(call(), exact) < max(epsilon, conv.WINOGRAD_FLOOR), (case.name, name)
        selected = conv.select_on_cpu(t, case.layer)[1].name
        assert f"ours-{selected}" in conv.candidate_calls(t, case.layer) or selected == "onednn"
    expected = {"direct", "winograd_f4x4", "winograd_f2x2"}
    expected |= {"direct_bf16"} if dtype == "bfloat16" and ceilings.bf16_unavailable() is None else set()
    assert seen == {f"ours-{name}" for name in expected & KERNELS.keys()}


def test_table_of_candidates() -> None:
    """A layer counts as slower if the medians or the minima exceed oneDNN's by more than 3 %."""
    case = {
        "name": "3x3",
        "selected": "direct_bf16",
        "providers": {
            "aten-unfused": provider(3.0, error=2e-3),
            "ours-packed": provider(1.0, 1.02, 1.04, error=1e-3),
            "onednn-fused": provider(0.95, 1.0, 1.0),
            "ours-direct": provider(2.0, 2.0, 2.0),
        },
    }
    lines = conv.selection_table([case, case | {"name": "1x1", "selected": "direct", "providers": PROVIDERS}]).split(
        "\n"
    )
    assert lines[3].split("  ")[0] == "3x3"
    assert [cell.strip() for cell in lines[3].split("  ") if cell.strip()] == [
        "3x3", "direct_bf16", "1.02x (1.05x)", "2.00x (2.11x)", "slower", "0.50x",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[4].split("  ") if cell.strip()] == [
        "1x1", "direct", "1.02x (1.02x)", "-", "1.00x",
    ]  # fmt: skip


PROVIDERS = {
    "aten-unfused": provider(3.0, error=2e-3),
    "ours-packed": provider(1.02, error=2e-3),
    "onednn-fused": provider(1.0),
}


def test_bounds_and_errors_of_a_network() -> None:
    """ResNet-18 has 1.81 G multiply-adds, and 11.7 M parameters and some of its activations cross the memory bus."""
    case = infer.InferCase("resnet18", 1, 224, "bfloat16", "cpu")
    work = infer.least_work(case)
    assert work["flops"] == pytest.approx(2 * 1.814e9, rel=0.005)
    weights, images = 11.7e6, 1.0e6
    assert 2 * (weights + images) < work["fewest_bytes"] < 2 * (weights + 20 * images)
    one = {
        **vars(case),
        **work,
        "stock_error": 2e-3,
        "providers": {"ours": provider(0.01, 0.012, 0.011, error=1e-3) | {"p99_s": 0.012}},
    }
    run = {"ceilings": {"copy_bytes_per_s": 20e9, "fma_flops_per_s": 1e11, "bf16_flops_per_s": 1e12}, "cases": [one]}
    (line,) = infer.bounds(run, one)
    assert line.startswith("lower bounds: 3.6 GFLOP at 1000 GFLOP/s: 3.63 ms, 33% of ours; ")
    (line,) = infer.bounds(run, one | {"dtype": "float32"})
    assert line.startswith("lower bounds: 3.6 GFLOP at 100 GFLOP/s: 36.3 ms, 330% of ours; ")
    assert infer.error_text(one, "ours") == "0.50x"
    assert infer.error_text({"providers": {}}, "ours") == "-"
    assert infer.least_work(infer.InferCase("resnext50_32x4d", 1, 224, "bfloat16", "cpu")) == {}


def test_suite_says_why_bfloat16_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,) = [entry for entry in suite.CPU_SUITE if entry.title == "infer-bf16"]
    commands: list[list[str]] = []

    def run(title: str, benchmark: object, options: object, arguments: list[str], limit: object) -> dict[str, object]:
        commands.append(arguments)
        return {"command": "python -m benchmarks infer", "runs": []}

    monkeypatch.setattr(suite, "CPU_SUITE", (suite.CPU_SUITE[0], entry))
    monkeypatch.setattr(suite.runner, "run", run)
    monkeypatch.setattr(suite.report, "environment", lambda _: "machine")
    monkeypatch.setattr(_extension, "loaded", True)
    for isa, count in (("avx512", 1), ("avx512_bf16", 2)):
        monkeypatch.setattr(_extension, "cpu_isa", lambda isa=isa: isa)
        commands.clear()
        command_line.main(["all", "--quick", "--out", str(tmp_path)])
        text = "infer-bf16 (products of bfloat16 require amx or avx512_bf16, this machine runs avx512): python -m"
        assert (text in capsys.readouterr().out) == (count == 1)
        assert len(commands) == count
    assert commands[1][:3] == ["infer", "--dtype", "bfloat16"]


def test_headlines_name_the_dtype() -> None:
    case = {"model": "resnet50", "batch": 1, "size": 224, "providers": {"ours": provider(1.0), "eager": provider(2.0)}}
    for dtype, suffix in (("float32", " in 1000 ms"), ("bfloat16", " in bfloat16 in 1000 ms")):
        (line,) = headline.network_headlines([case | {"dtype": dtype}], lambda case: "infers")
        assert line.startswith(f"resnet50 infers 1 image of 224x224{suffix}, 2.00 times as fast")


def test_pages_name_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "gpu": None, "cpu": "Xeon", "cores": 2, "threads": 2, "backend": "cpu", "isa": "amx", "torch": "2",
        "fused_res": "0", "commit": None, "date": "2026-11-30",
    }  # fmt: skip
    case = {"model": "resnet50", "batch": 1, "size": 224, "name": "resnet50", "providers": {"ours": provider(0.1)}}

    def document(dtype: str) -> dict[str, Any]:
        return {
            "command": f"python -m benchmarks infer --dtype {dtype}",
            "runs": [{"environment": environment, "cases": [case | {"dtype": dtype}], "allocator": "as-shipped"}],
        }

    only = readme.readme_section("xeon", {"infer-bf16": document("bfloat16")})
    assert "resnet50, 1 x 224², bfloat16 | **10.0**" in only
    assert only.endswith("Inference in float32 on this machine: not measured.")
    both = readme.readme_section("xeon", {"infer-bf16": document("bfloat16"), "infer": document("float32")})
    assert "not measured" not in both and "resnet50, 1 x 224² | **10.0**" in both
    monkeypatch.setattr(readme, "load_results", lambda: {"xeon-2-cores": {"infer": document("float32")}})
    monkeypatch.setattr(readme, "summaries_section", lambda *_: "")
    pages = readme.render_pages()
    assert f"## GPU\n\n{readme.NO_GPU}" in pages[readme.RESULTS / "README.md"]
    assert readme.NO_AMX in pages[readme.ROOT / "README.md"]


@pytest.mark.skipif(ceilings.bf16_unavailable() is not None, reason="needs products of bfloat16")
def test_chain_counts_fewer_bytes_with_every_fusion() -> None:
    """What a level saves, for a bottleneck with an identity shortcut, in units of its inner activations.

    Statistics in the epilogues save the norms' first pass over z0, z1 and z2 (1 + 1 + 4). Prologues save a write and a
    read of each inner activation in forward, and cost them in backward, where it is computed again. Backward then:

    =================================  ==================  ================  =============================
    backward                           norms in prologues  and of gradients  fused gradients
    =================================  ==================  ================  =============================
    norm 2: dy, z2 twice, dz2          16 + 4              16 + 4            sums: 8
    a1; gradients: dz2, a1 > da1       2 + 6               6                 dy, z2, z1 > da1: 10
    norm 1: da1, z1 twice, dz1         4 + 1               3                 (sums in an epilogue)
    a0; gradients: dz1, a0 > da0       2 + 3               3                 da1, z1, z0 > da0: 4
    norm 0: da0, z0 twice, dz0         4 + 1               3                 (sums in an epilogue)
    gradients: dz0, x > dx             9                   13                da0, z0, x, dy > dx: 14
    dx += dy                           12                  (in an epilogue)  (in an epilogue)
    =================================  ==================  ================  =============================
    """
    (block,) = (b for b in network.build_network("resnet50", 8, 224).blocks if b.name == "layer1.1")
    step = chain.Step(block, torch.bfloat16, seed=0)
    unit = 2 * 8 * 56 * 56 * 64
    counted = [chain.count_bytes(step, step.plan(level)) / unit for level in chain.LEVELS.values()]
    assert counted[0] - counted[1] == pytest.approx(6, abs=0.1)
    assert counted[1] - counted[2] == pytest.approx(0, abs=0.1)
    assert counted[2] - counted[3] == pytest.approx(64 - 48, abs=0.5)
    assert counted[3] - counted[4] == pytest.approx(48 - 36, abs=0.5)
