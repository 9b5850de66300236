"""`all` (what `make bench` runs): a selection of the other subcommands that ends within ten minutes on two
cores.

Compiling a ResNet-50 training step takes a minute or two on two cores, so compiled providers take part only
where they may be the fastest stock way. What this selection leaves out, the single subcommands measure.
"""

import argparse
import time

from benchmarks import report, runner

HELP = "a selection of all of the above within ten minutes, its summary last"

STOCK = "eager,eager-channels-last"

# (subcommand, its options): names of the result files are those of the subcommands, so each stands here once.
SELECTION: tuple[tuple[str, list[str]], ...] = (
    ("op", ["--providers", f"ours,{STOCK},compile-channels-last", "--min-time", "0.2", "--repeat", "5"]),
    ("block", ["--providers", f"ours,{STOCK}", "--cases", "resnet50", "--min-time", "0.2", "--repeat", "5"]),
    ("model", ["--providers", f"ours,{STOCK}", "--min-time", "1", "--repeat", "4"]),
    ("memory", ["--batch", "8", "--min-time", "0", "--repeat", "3"]),
)


def run(
    options: argparse.Namespace, parser: argparse.ArgumentParser, benchmarks: dict[str, runner.Benchmark]
) -> None:
    started = time.monotonic()
    shared = ["--allocator", options.allocator, "--backend", options.backend, "--seed", str(options.seed)]
    shared += ["--out", str(options.out)]
    shared += ["--threads", str(options.threads)] if options.threads else []
    shared += ["--quick"] if options.quick else []
    documents = {}
    for name, own in SELECTION:
        arguments = [name, *([] if options.quick else own), *shared]
        documents[name] = runner.run(name, benchmarks[name], parser.parse_args(arguments), arguments)
    parts = [
        benchmarks[name].summary(run) for name, document in documents.items() for run in document["runs"]
    ]
    text = "\n\n".join([report.environment(documents["op"]), *parts])
    (options.out / "summary.txt").write_text(text + "\n")
    minutes = (time.monotonic() - started) / 60
    print(f"\n== summary ==\n\n{text}\n\n{minutes:.1f} minutes; results in {options.out}")
