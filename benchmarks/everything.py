"""`all` (what `make bench` runs): a selection of the other subcommands that ends within ten minutes on two
cores.

Compiling a ResNet-50 training step takes two minutes on two cores, so compiled providers take part in `op`
only, in two of its cases. With `--device cuda` (what `make gpu` runs, behind the tests) it is a selection of its
own. What they leave out, the single subcommands measure.
"""

import argparse
import shlex
import time
from dataclasses import dataclass

from benchmarks import allocator, report, runner

HELP = "a selection of all of the above within ten minutes, its summary last"

FAST = ("--repeat", "5", "--min-time", "0.3")
STOCK = "ours,eager,eager-channels-last"
COMPILED = "ours,ours+compile,compile-channels-last"


@dataclass(frozen=True)
class Part:
    """One subcommand with its options; `title` names its result files."""

    title: str
    subcommand: str
    arguments: tuple[str, ...]
    one_allocator: bool = False  # bytes do not depend on it


SELECTION = (
    Part("op", "op", ("--providers", STOCK, *FAST)),
    Part("op-compile", "op", ("--providers", COMPILED, "--cases", "layer2 ", *FAST)),
    Part("block", "block", ("--providers", STOCK, "--cases", "resnet50 layer2", *FAST)),
    Part("model", "model", ("--providers", STOCK, "--model", "resnet50", "--mode", "train", "--repeat", "5")),
    Part("model-small", "model", ("--providers", STOCK, "--small", "--repeat", "20", "--min-time", "2")),
    Part("memory", "memory", ("--batch", "4", "--repeat", "3", "--min-time", "0"), one_allocator=True),
    Part(
        "conv",
        "conv",
        ("--model", "resnet50", "--batch", "4", "--repeat", "5", "--min-time", "0.1"),
        one_allocator=True,
    ),
)
GPU_SELECTION = (
    Part("op", "op", ("--providers", f"{STOCK},cudnn", *FAST)),
    Part(
        "model",
        "model",
        ("--providers", f"{STOCK},ours+compile,compile-channels-last", "--model", "resnet50", "--mode", "train"),
    ),
    Part("memory", "memory", ("--repeat", "3", "--min-time", "0")),
    Part("conv", "conv", FAST),
    Part(
        "block",
        "block",
        ("--providers", f"{COMPILED},compile-max-autotune", "--cases", "resnet50 layer2", *FAST),
    ),
    Part(
        "infer",
        "infer",
        ("--model", "resnet50", "--batch", "1", "16", "256", "--dtype", "bfloat16", "--min-time", "1"),
    ),
    Part(
        "model-graph",
        "model",
        (
            *("--providers", "ours,ours+graph,eager-channels-last,eager-channels-last+graph"),
            *("--model", "resnet18", "--mode", "eval", "--batch", "1", "--size", "32", "--repeat", "20"),
        ),
    ),
    Part("op-compile", "op", ("--providers", f"{COMPILED},compile-max-autotune", "--cases", "layer2 ", *FAST)),
)
# The longest part takes two minutes; on a slow or busy machine what is not begun by then is left out, and named.
LATEST_START = 8 * 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser, benchmarks: dict[str, runner.Benchmark]) -> None:
    started = time.monotonic()
    shared = ["--backend", options.backend, "--seed", str(options.seed), "--out", str(options.out)]
    shared += ["--threads", str(options.threads)] if options.threads else []
    shared += ["--quick"] if options.quick else []
    shared += ["--device", "cuda"] if options.device == "cuda" else []
    documents, summaries, left_out = [], [], []
    for part in GPU_SELECTION if options.device == "cuda" else SELECTION:
        settings = allocator.settings_for(options.allocator)
        setting = settings[0] if part.one_allocator else options.allocator
        # Without the compiled providers a quick run is not slow, and its shapes are its own.
        own = () if options.quick else part.arguments
        if time.monotonic() - started > LATEST_START:
            left_out.append(shlex.join(["python", "-m", "benchmarks", part.subcommand, *part.arguments]))
            continue
        arguments = [part.subcommand, *own, *shared, "--allocator", setting]
        benchmark = benchmarks[part.subcommand]
        document = runner.run(part.title, benchmark, parser.parse_args(arguments), arguments)
        documents.append(document)
        summaries += [benchmark.summary(one) for one in document["runs"]]
    if left_out:
        summaries.append("left out, as this machine is slow today:\n" + "\n".join(left_out))
    text = "\n\n".join([report.environment(documents[0]), *summaries])
    (options.out / "summary.txt").write_text(text + "\n")
    minutes = (time.monotonic() - started) / 60
    print(f"\n== summary ==\n\n{text}\n\n{minutes:.1f} minutes; results in {options.out}")
