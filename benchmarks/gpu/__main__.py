"""Checks and benchmarks on a machine with an NVIDIA GPU: `make gpu`, with the Python that has its PyTorch.

    python3 -m benchmarks.gpu [first-hour|more] [--out DIR]

`first-hour` (`make gpu`) ends within nine minutes on a fresh machine: every kernel checked, single operators and
convolutions, and ResNet-50's training step timed against stock PyTorch and torch.compile. `more` (`make gpu-more`) has
what takes longer: the test suite, compute-sanitizer, max-autotune, timm and the other benchmarks. Nothing is
downloaded.

Results are written as they come. At the end come what was left out, with the reasons, and a table; everything is in
one archive. The exit code is 0 whatever failed, and 1 if there is no usable GPU. With the device tool:

    run(command='python3 -m benchmarks.gpu --out "$OUT"', carry=["build/gpu-library"], timeout_s=590)
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import library, plan
from benchmarks.gpu.host import ROOT, Host, LocalHost
from benchmarks.gpu.session import Session

CACHES = ROOT / "build" / "gpu-cache"
#: Variables of the workers: the compilers' caches, which they share, and the stack of a process that a signal ends.
ENVIRONMENT = {
    "TRITON_CACHE_DIR": str(CACHES / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor"),
    "PYTHONFAULTHANDLER": "1",
}


def _rehearsal_environment() -> dict[str, str]:
    """Return the variables of workers that run the kernels on the CPU, in Triton's interpreter and the simulator."""
    from tools.cuda_sim.simulator import build

    library = os.environ.get("FUSED_RES_SIMULATOR") or build()
    return {"TRITON_INTERPRET": "1", "FUSED_RES_SIMULATOR": str(library)}


def run(
    name: str,
    out: Path,
    seconds: float,
    rehearse: bool = False,
    only: Sequence[str] = (),
    host: Host | None = None,
) -> int:
    """Run a plan and return the exit code.

    Args:
        name: a key of `plan.PLANS`.
        out: folder of the results; the files of an earlier session are replaced.
        seconds: length of the session.
        rehearse: run tiny tensors on the CPU, with stand-ins for the GPU.
        only: names of the stages, besides the first; default: all.
        host: clock and processes; default: this machine's.
    """
    out = out.resolve()
    folder = out / "work" if rehearse else ROOT / "build" / "gpu-work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    for file in ("results.jsonl", "summary.txt", "progress.txt", "results.tar.gz"):
        (out / file).unlink(missing_ok=True)
    environment = _rehearsal_environment() if rehearse else {}
    unused = "this is a rehearsal" if rehearse else library.install()
    session = Session(host or LocalHost(), out, folder, seconds, {**ENVIRONMENT, **environment}, not unused, rehearse)
    if unused:
        session.note(f"the carried libraries are not used: {unused}")
    stages = [stage for stage in plan.PLANS[name] if not only or stage.name in only or stage is plan.ENVIRONMENT]
    session.run(stages)
    return int(bool(session.features.get("gpu", "not checked")))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", nargs="?", choices=plan.PLANS, default="first-hour", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu-results", metavar="DIR", help="results folder"
    )
    parser.add_argument(
        "--seconds", type=float, default=plan.SESSION_SECONDS, help="length of the session (default: %(default)s)"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on the CPU, with tiny tensors and stand-ins for the GPU: no measurement",
    )
    parser.add_argument("--only", default="", metavar="LIST", help="names of stages, comma-separated (default: all)")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - {stage.name for stage in plan.PLANS[options.plan]}:
        parser.error(f"--only: unknown stage {', '.join(sorted(unknown))}; choose from {_names(options.plan)}")
    seconds = options.seconds * (plan.REHEARSAL_FACTOR if options.rehearse else 1)
    raise SystemExit(run(options.plan, options.out, seconds, options.rehearse, only))


def _names(name: str) -> str:
    return ", ".join(stage.name for stage in plan.PLANS[name])


if __name__ == "__main__":
    main()
