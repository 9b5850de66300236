"""`all` (run by `make bench`): a suite of the other subcommands that ends within ten minutes on two cores.

Compiling a ResNet-50 training step takes two minutes on two cores, so the suite has compiled providers only in `infer`
and in two cases of `op`. With `--device cuda` (run by `make gpu-more`) there are two suites, without and with compiled
providers. Each of them ends within nine minutes, even if a benchmark fails or hangs. The single
subcommands measure what the suites omit.
"""

import argparse
import shlex
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import allocator, ceilings, headline, report, runner

HELP = "a suite of all of the above that takes at most ten minutes and ends with a summary"

FAST = "--repeat 5 --min-time 0.3"
STOCK = "ours,eager,eager-channels-last"
COMPILED = "ours,ours+compile,compile-channels-last"


class SuiteEntry(NamedTuple):
    title: str  # name of the result files
    command: str  # subcommand with its options
    single_allocator: bool = False  # only the first selected setting, to save time
    unavailable: Callable[[], str | None] = lambda: None  # why this machine cannot run it, or None


CPU_SUITE = (
    SuiteEntry("op", f"op --providers {STOCK} {FAST}", single_allocator=True),
    SuiteEntry(
        "infer", "infer --model resnet18 resnet50 --batch 1 16 --repeat 5 --min-time 0.5", single_allocator=True
    ),
    SuiteEntry(
        "infer-bf16",
        "infer --dtype bfloat16 --model resnet50 --batch 1 16 --repeat 5 --min-time 0.5",
        single_allocator=True,
        unavailable=ceilings.bf16_unavailable,
    ),
    SuiteEntry("conv", "conv --model resnet50 --batch 4 --repeat 5 --min-time 0.1", single_allocator=True),
    SuiteEntry("model", f"model --providers {STOCK} --model resnet50 --mode train --repeat 5", single_allocator=True),
    SuiteEntry("op-compile", f"op --providers {COMPILED} --cases 'layer2 ' {FAST}", single_allocator=True),
    SuiteEntry("block", f"block --providers {STOCK} --cases 'resnet50 layer2' {FAST}", single_allocator=True),
    SuiteEntry("model-small", f"model --providers {STOCK} --small --repeat 20 --min-time 2", single_allocator=True),
    SuiteEntry("memory", "memory --batch 4 --repeat 3 --min-time 0", single_allocator=True),
    SuiteEntry("styles-cifar", f"styles --cifar {FAST}", single_allocator=True),
    SuiteEntry("styles", "styles --batch 4 --width 4 --repeat 5 --min-time 0.1", single_allocator=True),
)
GPU = "ours,ours-triton,ours-cuda,eager,eager-channels-last"
GPU_GRAPHS = f"{GPU},ours+graph,eager-channels-last+graph"
GPU_SUITES = {
    "bench": (
        SuiteEntry("op", f"op --providers {GPU},cudnn {FAST}"),
        SuiteEntry("model", f"model --providers {GPU_GRAPHS} --model resnet50 --mode train --batch 256"),
        SuiteEntry("conv", f"conv --model resnet50 --batch 32 {FAST}"),
        SuiteEntry("block", f"block --providers {GPU} {FAST}"),
        SuiteEntry("infer", f"infer --providers {GPU_GRAPHS} --model resnet50 --batch 1 32 256 --min-time 1"),
        SuiteEntry("memory", "memory --repeat 3 --min-time 0"),
        SuiteEntry(
            "model-small",
            "model --providers ours,ours+graph,eager-channels-last,eager-channels-last+graph --small --repeat 20",
        ),
        SuiteEntry("conv-large", f"conv --model resnet50 --batch 256 {FAST}"),
    ),
    "compile": (
        SuiteEntry(
            "model-compile",
            "model --providers ours,ours+compile,eager-channels-last,compile-channels-last"
            " --model resnet50 --mode train --batch 256",
        ),
        SuiteEntry(
            "infer-compile",
            "infer --providers ours,ours+graph,compile-freezing,compile-max-autotune"
            " --model resnet50 --batch 1 256 --min-time 1",
        ),
        SuiteEntry("op-compile", f"op --providers {COMPILED},compile-max-autotune --cases 'layer2 ' {FAST}"),
        SuiteEntry(
            "block-compile", f"block --providers {COMPILED},compile-max-autotune --cases 'resnet50 layer2' {FAST}"
        ),
    ),
}
#: Seconds. The longest entries come early, and the later ones take less than two minutes each. On a slow or busy
#: machine, entries that have not started by then are skipped and listed.
LATEST_START_SECONDS = 8 * 60.0
#: Seconds within which a GPU suite must end, because GPU machines are often available for a limited time only.
GPU_SUITE_SECONDS = 8.5 * 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--stage", choices=GPU_SUITES, default="bench", help="with --device cuda: name of the suite (default: bench)"
    )


def run(options: argparse.Namespace, parser: argparse.ArgumentParser, benchmarks: dict[str, runner.Benchmark]) -> None:
    started = time.monotonic()
    shared = ["--backend", options.backend, "--seed", str(options.seed), "--out", str(options.out)]
    shared += ["--threads", str(options.threads)] if options.threads else []
    shared += ["--quick"] if options.quick else []
    shared += ["--device", "cuda"] if options.device == "cuda" else []
    documents, summaries, missing, skipped, failed = [], [], [], [], []
    on_gpu = options.device == "cuda"
    for entry in GPU_SUITES[options.stage] if on_gpu else CPU_SUITE:
        if time.monotonic() - started > LATEST_START_SECONDS:
            skipped.append(f"python -m benchmarks {entry.command}")
            continue
        if reason := entry.unavailable():
            missing.append(f"{entry.title} ({reason}): python -m benchmarks {entry.command}")
            continue
        setting = allocator.settings_for(options.allocator)[0] if entry.single_allocator else options.allocator
        subcommand, *entry_options = shlex.split(entry.command)
        if options.quick:  # it has its own shapes and skips the compiled providers
            dtype = parser.parse_args([subcommand, *entry_options]).dtype if "--dtype" in entry_options else None
            entry_options = ["--dtype", dtype] if dtype else []
        arguments = [subcommand, *entry_options, *shared, "--allocator", setting]
        benchmark = benchmarks[subcommand]
        limit = GPU_SUITE_SECONDS - (time.monotonic() - started) if on_gpu else None
        try:
            document = runner.run(entry.title, benchmark, parser.parse_args(arguments), arguments, limit)
        except runner.BenchmarkFailedError as error:
            if not on_gpu:
                raise SystemExit(error.code) from None
            failed.append(f"{shlex.join(['python', '-m', 'benchmarks', *arguments])}: {error}")
            continue
        documents.append(document)
        summaries += [benchmark.summary(one) for one in document["runs"]]
    if missing:
        summaries.append("not measured on this machine:\n" + "\n".join(missing))
    if skipped:
        summaries.append("skipped, because this machine is too slow for the time limit:\n" + "\n".join(skipped))
    if failed:
        summaries.append("failed:\n" + "\n".join(failed))
    text = "\n\n".join([*map(report.environment, documents[:1]), *summaries, headline.headline_text(documents)])
    name = f"summary-{options.stage}.txt" if on_gpu else "summary.txt"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / name).write_text(text + "\n")
    minutes = (time.monotonic() - started) / 60
    print(f"\n== summary ==\n\n{text}\n\n{minutes:.1f} minutes; results in {options.out}")
