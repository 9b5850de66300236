"""`python -m benchmarks.amx`, run by `make bench-amx`: the measurements that need a processor with AMX.

First the tests of the kernels run on the AMX instructions; nothing is measured if they fail. Then `infer` and training
steps (`model`) and `chain` in bfloat16 and float32, `conv` in bfloat16, and `benchmarks.frozen` run as users run them.
Their results are written to a folder of benchmarks/results that is named after the processor. A document that exists
already is not measured again, so that an interrupted run resumes; `--again` replaces them. The last table compares with
what the library has to reach, in medians and in minima, each against the peer that is fastest in them.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import conv, environment, infer, report

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "build" / "bench-amx"
TESTS = [
    "tests/backends/cpu/test_amx.py",
    "tests/backends/cpu/test_convolution.py",
    "tests/backends/cpu/test_conv_training_bf16.py",
    "tests/backends/cpu/test_inference_graph.py",
]
NETWORKS = "--model resnet18 resnet50 --batch 1 16"
PEERS = "compile-freezing,openvino"
STOCK = "eager,eager-channels-last,compile,compile-channels-last"
TRAINING = f"model --mode train --providers ours,{STOCK} --repeat 9 --min-time 4"
#: Name of the document -> arguments of `python -m benchmarks`.
STEPS = {
    "infer-bf16": f"infer --dtype bfloat16 {NETWORKS} --providers ours,eager-channels-last,{PEERS}"
    " --repeat 9 --min-time 2",
    "infer": f"infer {NETWORKS} --providers ours,eager-channels-last,{PEERS},onnxruntime --repeat 9 --min-time 2",
    "conv-bf16": "conv --dtype bfloat16 --model resnet50 --batch 16 --repeat 7 --min-time 0.2",
    "model-bf16": f"{TRAINING} --dtype bfloat16 --model resnet18 resnet50 --batch 16",
    "model-bf16-batch4": f"{TRAINING} --dtype bfloat16 --model resnet18 resnet50 --batch 4",
    "model": f"{TRAINING} --model resnet18 resnet50 --batch 16",
    "chain": "chain --dtype bfloat16 --repeat 9 --min-time 0.5",
    "chain-fp32": "chain --dtype float32 --repeat 9 --min-time 0.5",
}
#: Speedup over the fastest peer to reach on this kind of machine, by document, model and batch size.
TARGETS = {
    ("infer-bf16", "resnet18", 1): 1.4,
    ("infer-bf16", "resnet18", 16): 1.4,
    ("infer-bf16", "resnet50", 1): 1.4,
    ("infer-bf16", "resnet50", 16): 1.4,
    ("infer", "resnet18", 1): 1.45,
    ("infer", "resnet18", 16): 2.0,
    ("infer", "resnet50", 1): 1.2,
    ("infer", "resnet50", 16): 1.4,
    ("model-bf16", "resnet18", 16): 1.7,
    ("model-bf16", "resnet50", 16): 2.0,
    ("model-bf16-batch4", "resnet18", 4): 1.5,
    ("model-bf16-batch4", "resnet50", 4): 1.5,
    ("model", "resnet18", 16): 1.7,
    ("model", "resnet50", 16): 1.5,
}
#: The share of a target that the minima of training steps have to reach.
MINIMUM_SHARE = 0.9
#: Document in bfloat16 -> the one in float32, which it must not be slower than.
FLOAT32 = {"infer-bf16": "infer", "model-bf16": "model"}
#: Name of the document of `python -m benchmarks.frozen`, and the seconds that freezing ResNet-50 may take.
FROZEN, FREEZE_SECONDS = "frozen", 3
Case = dict[str, Any]


class Verdict(NamedTuple):
    """One row of the last table."""

    document: str
    case: str
    asked: str
    measured: str = "not measured"
    verdict: str = ""


def processor(cpuinfo: str) -> tuple[str, bool]:
    """Return a folder name for the processor that /proc/cpuinfo describes, and whether it has AMX with bfloat16.

    The name counts the physical cores that this process may use, as the documents of results do.
    """
    fields = [line.partition(":") for line in cpuinfo.splitlines()]
    values = {name.strip(): value.strip() for name, _, value in fields}
    has_amx = "amx_bf16" in values.get("flags", "").split()
    vendor = "xeon" if "Intel" in values.get("model name", "") else values.get("vendor_id", "cpu").lower()
    cores = environment.physical_cores(environment.usable_cpus())
    return f"{vendor}{'-amx' * has_amx}-{cores}-core{'s' * (cores > 1)}", has_amx


def verdicts(folder: Path) -> list[Verdict]:
    """Return a row for everything that is to be reached: what is asked, what was measured, whether it was met."""
    documents = {name: cases_of(folder / f"{name}.json") for name in STEPS}
    found = []
    for (name, model, batch), target in TARGETS.items():
        case = next((one for one in documents[name] if (one["model"], one["batch"]) == (model, batch)), None)
        found.append(speedup_verdict(name, f"{model} batch {batch}", target, case))
        if name in FLOAT32:
            wide = documents[FLOAT32[name]]
            fp32 = next((one for one in wide if (one["model"], one["batch"]) == (model, batch)), None)
            found.append(dtype_verdict(name, f"{model} batch {batch}, bfloat16", case, fp32))
    found += [error_verdict(name, documents[name]) for name in ("infer-bf16", "conv-bf16")]
    found.append(layers_verdict("conv-bf16", documents["conv-bf16"]))
    return found + frozen_verdicts(cases_of(folder / f"{FROZEN}.json"))


def cases_of(path: Path) -> list[Case]:
    return json.loads(path.read_text())["runs"][0]["cases"] if path.exists() else []


def speedup_verdict(document: str, name: str, target: float, case: Case | None) -> Verdict:
    share = MINIMUM_SHARE if document.startswith("model") else 1
    least = "" if share == 1 else f" of which minima {share:.0%}"
    row = Verdict(document, name, f"at least {target}x, medians (minima){least}")
    if case is None:
        return row
    median, minimum = infer.peer_speedups(case, "ours")
    speedup = min(median, minimum / share)
    verdict = "met" if speedup >= target else f"missed by {1 - speedup / target:.0%}"
    return row._replace(measured=infer.fastest_peer(case, "ours"), verdict=verdict)


def dtype_verdict(document: str, name: str, case: Case | None, fp32: Case | None) -> Verdict:
    """Return the verdict on our bfloat16 against our float32, in medians and in minima."""
    row = Verdict(document, name, "at least our float32, medians (minima)")
    if case is None or fp32 is None:
        return row
    narrow, wide = case["providers"]["ours"], fp32["providers"]["ours"]
    median, minimum = wide["median_s"] / narrow["median_s"], min(wide["samples_s"]) / min(narrow["samples_s"])
    verdict = "met" if min(median, minimum) >= 1 else f"missed by {1 - min(median, minimum):.0%}"
    return row._replace(measured=f"{median:.2f}x ({minimum:.2f}x)", verdict=verdict)


def error_verdict(document: str, cases: list[Case]) -> Verdict:
    """Return the verdict on the largest error against float64, as a multiple of stock's."""
    module, ours = (conv, "ours-packed") if document.startswith("conv") else (infer, "ours")
    row = Verdict(document, "error against float64", "at most stock's")
    if not cases:
        return row
    worst = max(cases, key=lambda case: module.error_multiple(case, ours))
    multiple = round(module.error_multiple(worst, ours), 2)
    verdict = "met" if multiple <= 1 else f"missed by {multiple - 1:.0%}"
    return row._replace(measured=f"{multiple:.2f}x, {worst['name']}", verdict=verdict)


def layers_verdict(document: str, cases: list[Case]) -> Verdict:
    """Return the verdict on the layers that are slower than oneDNN's fused operator."""
    row = Verdict(document, "layers slower than oneDNN by over 3 %", "none, medians (minima)")
    cases = [case for case in cases if conv.ONEDNN in case["providers"]]
    if not cases:
        return row
    by_statistic = zip(*map(conv.onednn_ratios, cases), strict=True)
    slower = [sum(ratio > conv.SLOWER for ratio in ratios) for ratios in by_statistic]
    return row._replace(
        measured=f"{slower[0]} ({slower[1]}) of {len(cases)}", verdict="missed" if any(slower) else "met"
    )


def frozen_verdicts(cases: list[Case]) -> list[Verdict]:
    """Return the verdicts on the time to freeze and on the bits of concurrent calls."""
    freezing = Verdict(FROZEN, "freezing resnet50", f"under {FREEZE_SECONDS} s")
    concurrent = Verdict(FROZEN, "8 threads on one frozen model", "the same bits as alone")
    if not cases:
        return [freezing, concurrent]
    (case,) = cases
    seconds, equal, calls = case["freeze_s"], case["equal"], case["calls"]
    return [
        freezing._replace(
            measured=f"{seconds:.2f} s",
            verdict="met" if seconds < FREEZE_SECONDS else f"missed by {seconds / FREEZE_SECONDS - 1:.0%}",
        ),
        concurrent._replace(measured=f"{equal} of {calls} calls", verdict="met" if equal == calls else "missed"),
    ]


def run(command: list[str], variables: dict[str, str]) -> None:
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | variables, check=True)


def quick(command: list[str]) -> list[str]:
    """Return `command` with tiny shapes instead of its own and few providers, in the same dtype."""
    dtype = command[command.index("--dtype") :][:2] if "--dtype" in command else []
    return [command[0], "--quick", *dtype, *(["--providers", "ours,openvino"] if command[0] == "infer" else [])]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.amx", description=__doc__)
    parser.add_argument("--again", action="store_true", help="replace existing results")
    parser.add_argument(
        "--rehearse",
        type=Path,
        nargs="?",
        const=SCRATCH / "rehearsal",
        metavar="FOLDER",
        help="run every step with tiny sizes and emulated tiles, on any machine with AVX-512, and measure nothing of "
        "use; results replace those of FOLDER (default: build/bench-amx/rehearsal)",
    )
    options = parser.parse_args(arguments)
    name, has_amx = processor(Path("/proc/cpuinfo").read_text())
    rehearsal = options.rehearse is not None
    if not has_amx and not rehearsal:
        raise SystemExit("bench-amx: this processor lacks amx_bf16 (flags in /proc/cpuinfo)")
    folder = options.rehearse.resolve() if rehearsal else ROOT / "benchmarks" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"FUSED_RES_CPU_ISA": "amx_emulated" if rehearsal else "amx"}
    run(["pytest", "-q", "-n", "0", *(["-k", "packed_weight", TESTS[1]] if rehearsal else TESTS)], variables)
    for step, text in STEPS.items():
        if (folder / f"{step}.json").exists() and not (options.again or rehearsal):
            print(f"{step} is skipped: {folder / f'{step}.json'} exists; --again replaces it", flush=True)
            continue
        command = quick(shlex.split(text)) if rehearsal else shlex.split(text)
        run(["benchmarks", *command, "--allocator", "as-shipped", "--out", str(SCRATCH)], variables)
        for suffix in ("png", "json"):  # the JSON last: its presence means that the step is complete
            (SCRATCH / f"{command[0]}.{suffix}").replace(folder / f"{step}.{suffix}")
    frozen = folder / f"{FROZEN}.json"
    if options.again or rehearsal or not frozen.exists():
        run(["benchmarks.frozen", "--out", str(frozen), *(["--quick"] if rehearsal else [])], variables)
    print(f"\n{report.table(['document', 'case', 'asked', 'measured', ''], verdicts(folder))}\n\nresults in {folder}")
    if not rehearsal:
        print("`make docs` adds them to the pages; commit both")


if __name__ == "__main__":
    main(sys.argv[1:])
