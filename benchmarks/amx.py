"""`python -m benchmarks.amx`, run by `make bench-amx`: the measurements that need a processor with AMX.

First the tests of the kernels run on the AMX instructions; nothing is measured if they fail. Then `infer` in bfloat16
and float32 and `conv` in bfloat16 run as users run them, and their results are written to a folder of
benchmarks/results that is named after the processor. A document that exists already is not measured again, so that an
interrupted run resumes; `--again` replaces them. The last table compares with what the library has to reach.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import infer, report

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests/backends/cpu/test_amx.py", "tests/backends/cpu/test_convolution.py"]
NETWORKS = "--model resnet18 resnet50 --batch 1 16"
#: Name of the document -> arguments of `python -m benchmarks`.
STEPS = {
    "infer-bf16": f"infer --dtype bfloat16 {NETWORKS} --providers"
    " ours,eager-channels-last,compile-freezing,openvino --repeat 9 --min-time 2",
    "infer": f"infer {NETWORKS} --providers ours,eager-channels-last,compile-freezing,openvino,onnxruntime"
    " --repeat 9 --min-time 2",
    "conv-bf16": "conv --dtype bfloat16 --model resnet50 --batch 16 --repeat 7 --min-time 0.2",
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
}


def processor(cpuinfo: str) -> tuple[str, bool]:
    """Return a folder name for the processor that /proc/cpuinfo describes, and whether it has AMX with bfloat16."""
    fields = [line.partition(":") for line in cpuinfo.splitlines()]
    values = {name.strip(): value.strip() for name, _, value in fields}
    has_amx = "amx_bf16" in values.get("flags", "").split()
    vendor = "xeon" if "Intel" in values.get("model name", "") else values.get("vendor_id", "cpu").lower()
    return f"{vendor}{'-amx' * has_amx}-{os.cpu_count()}-cores", has_amx


def rows(folder: Path) -> list[list[str]]:
    """Return a row for each target: what is asked, what was measured, and whether it was met."""
    found = []
    for (name, model, batch), target in TARGETS.items():
        path = folder / f"{name}.json"
        cases = json.loads(path.read_text())["runs"][0]["cases"] if path.exists() else []
        case = next((one for one in cases if one["model"] == model and one["batch"] == batch), None)
        found.append([name, f"{model} batch {batch}", f"{target}x", *measured(case, target)])
    return found


def measured(case: dict[str, Any] | None, target: float) -> tuple[str, str]:
    """Return the speedup over the fastest peer as text, and the verdict."""
    if case is None:
        return "not measured", ""
    peers = [name for name in infer.INFERENCE_PEERS if name in case["providers"]]
    fastest = min(case["providers"][name]["median_s"] for name in peers)
    speedup = fastest / case["providers"]["ours"]["median_s"]
    return infer.fastest_peer(case, "ours"), "met" if speedup >= target else f"missed by {1 - speedup / target:.0%}"


def rehearsal(text: str) -> list[str]:
    """Return the arguments of a step with tiny sizes and without providers that are compiled for minutes."""
    subcommand = text.partition(" ")[0]
    dtype = ["--dtype", "bfloat16"] if "bfloat16" in text else []
    return [subcommand, "--quick", *dtype, *(["--providers", "ours,openvino"] if subcommand == "infer" else [])]


def run(command: list[str], environment: dict[str, str]) -> None:
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | environment, check=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.amx", description=__doc__)
    parser.add_argument("--again", action="store_true", help="replace existing results")
    parser.add_argument(
        "--rehearse",
        type=Path,
        metavar="FOLDER",
        help="run every step with tiny sizes and emulated tiles, on any machine with AVX-512; results go to FOLDER",
    )
    options = parser.parse_args(arguments)
    name, has_amx = processor(Path("/proc/cpuinfo").read_text())
    if not has_amx and options.rehearse is None:
        raise SystemExit("bench-amx: this processor lacks amx_bf16 (flags in /proc/cpuinfo)")
    isa = "amx" if options.rehearse is None else "amx_emulated"
    folder = ROOT / "benchmarks" / "results" / name if options.rehearse is None else options.rehearse.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"FUSED_RES_CPU_ISA": isa}
    tests = TESTS if options.rehearse is None else ["tests/backends/cpu/test_convolution.py", "-k", "packed_weight"]
    run(["pytest", "-q", "-n", "0", *tests], environment)
    for step, text in STEPS.items():
        if (folder / f"{step}.json").exists() and not options.again:
            continue
        command = shlex.split(text) if options.rehearse is None else rehearsal(text)
        scratch = ROOT / "build" / "bench-amx"
        run(["benchmarks", *command, "--allocator", "as-shipped", "--out", str(scratch)], environment)
        for suffix in ("json", "png"):
            (scratch / f"{command[0]}.{suffix}").replace(folder / f"{step}.{suffix}")
    print(report.table(["document", "case", "asked", "measured, medians (minima)", ""], rows(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
