"""`all` (what `make bench` runs): a selection of the other subcommands that ends within ten minutes on two
cores.

Compiling a ResNet-50 training step takes two minutes on two cores, so compiled providers take part in `infer` and, in
two of its cases, in `op` only. With `--device cuda` (what `make gpu` runs, behind the tests) there are two selections
of their own, without and with compiled providers, each of which ends within nine minutes, whatever fails or takes too
long. What they leave out, the single subcommands measure.
"""

import argparse
import shlex
import time
from typing import NamedTuple

from benchmarks import allocator, headline, report, runner

HELP = "a selection of all of the above within ten minutes, its summary last"

FAST = "--repeat 5 --min-time 0.3"
STOCK = "ours,eager,eager-channels-last"
COMPILED = "ours,ours+compile,compile-channels-last"


class Part(NamedTuple):
    title: str  # names the result files
    command: str  # a subcommand with its options
    one_allocator: bool = False  # the first, to save time


SELECTION = (
    Part("op", f"op --providers {STOCK} {FAST}"),
    Part("infer", "infer --model resnet18 resnet50 --batch 1 16 --repeat 5 --min-time 0.5", one_allocator=True),
    Part("conv", "conv --model resnet50 --batch 4 --repeat 5 --min-time 0.1", one_allocator=True),
    Part("model", f"model --providers {STOCK} --model resnet50 --mode train --repeat 5", one_allocator=True),
    Part("op-compile", f"op --providers {COMPILED} --cases 'layer2 ' {FAST}", one_allocator=True),
    Part("block", f"block --providers {STOCK} --cases 'resnet50 layer2' {FAST}", one_allocator=True),
    Part("model-small", f"model --providers {STOCK} --small --repeat 20 --min-time 2", one_allocator=True),
    Part("memory", "memory --batch 4 --repeat 3 --min-time 0", one_allocator=True),
)
GPU = "ours,ours-triton,ours-cuda,eager,eager-channels-last"
GPU_GRAPHS = f"{GPU},ours+graph,eager-channels-last+graph"
GPU_SELECTION = {
    "bench": (
        Part("op", f"op --providers {GPU},cudnn {FAST}"),
        Part("model", f"model --providers {GPU_GRAPHS} --model resnet50 --mode train --batch 256"),
        Part("conv", f"conv --model resnet50 --batch 32 {FAST}"),
        Part("block", f"block --providers {GPU} {FAST}"),
        Part("infer", f"infer --providers {GPU_GRAPHS} --model resnet50 --batch 1 32 256 --min-time 1"),
        Part("memory", "memory --repeat 3 --min-time 0"),
        Part(
            "model-small",
            "model --providers ours,ours+graph,eager-channels-last,eager-channels-last+graph --small --repeat 20",
        ),
        Part("conv-large", f"conv --model resnet50 --batch 256 {FAST}"),
    ),
    "compile": (
        Part(
            "model-compile",
            "model --providers ours,ours+compile,eager-channels-last,compile-channels-last"
            " --model resnet50 --mode train --batch 256",
        ),
        Part(
            "infer-compile",
            "infer --providers ours,ours+graph,compile-freezing,compile-max-autotune"
            " --model resnet50 --batch 1 256 --min-time 1",
        ),
        Part("op-compile", f"op --providers {COMPILED},compile-max-autotune --cases 'layer2 ' {FAST}"),
        Part("block-compile", f"block --providers {COMPILED},compile-max-autotune --cases 'resnet50 layer2' {FAST}"),
    ),
}
# The longest parts come early, those behind them take less than two minutes; on a slow or busy machine what is not
# begun by then is left out, and named.
LATEST_START = 8 * 60.0
#: Of a GPU's selection, when it has to have ended, lent machines being what they are.
GPU_LIMIT = 8.5 * 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--stage", choices=GPU_SELECTION, default="bench", help="with --device cuda: which selection (default: bench)"
    )


def run(options: argparse.Namespace, parser: argparse.ArgumentParser, benchmarks: dict[str, runner.Benchmark]) -> None:
    started = time.monotonic()
    shared = ["--backend", options.backend, "--seed", str(options.seed), "--out", str(options.out)]
    shared += ["--threads", str(options.threads)] if options.threads else []
    shared += ["--quick"] if options.quick else []
    shared += ["--device", "cuda"] if options.device == "cuda" else []
    documents, summaries, left_out, failed = [], [], [], []
    on_gpu = options.device == "cuda"
    for part in GPU_SELECTION[options.stage] if on_gpu else SELECTION:
        if time.monotonic() - started > LATEST_START:
            left_out.append(f"python -m benchmarks {part.command}")
            continue
        setting = allocator.settings_for(options.allocator)[0] if part.one_allocator else options.allocator
        subcommand, *own = shlex.split(part.command)
        if options.quick:
            own = []  # --quick has its own shapes and leaves out the compiled providers
        arguments = [subcommand, *own, *shared, "--allocator", setting]
        benchmark = benchmarks[subcommand]
        limit = GPU_LIMIT - (time.monotonic() - started) if on_gpu else None
        try:
            document = runner.run(part.title, benchmark, parser.parse_args(arguments), arguments, limit)
        except runner.PartFailedError as error:
            if not on_gpu:
                raise SystemExit(error.code) from None
            failed.append(f"{shlex.join(['python', '-m', 'benchmarks', *arguments])}: {error}")
            continue
        documents.append(document)
        summaries += [benchmark.summary(one) for one in document["runs"]]
    if left_out:
        summaries.append("left out, as this machine is slow today:\n" + "\n".join(left_out))
    if failed:
        summaries.append("without results:\n" + "\n".join(failed))
    text = "\n\n".join([*map(report.environment, documents[:1]), *summaries, headline.in_short(documents)])
    name = f"summary-{options.stage}.txt" if on_gpu else "summary.txt"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / name).write_text(text + "\n")
    minutes = (time.monotonic() - started) / 60
    print(f"\n== summary ==\n\n{text}\n\n{minutes:.1f} minutes; results in {options.out}")
