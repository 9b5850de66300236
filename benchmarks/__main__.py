"""Command-line interface of the benchmarks: `python -m benchmarks <subcommand>`."""

import argparse
import sys

from benchmarks import (
    block,
    chain,
    compare,
    conv,
    infer,
    launch_cost,
    launches,
    memory,
    model,
    op,
    options,
    roofline,
    runner,
    suite,
)
from benchmarks.styles import command as styles
from benchmarks.zoo import command as zoo

SUBCOMMANDS: dict[str, runner.Benchmark] = {
    "op": op,
    "block": block,
    "chain": chain,
    "model": model,
    "memory": memory,
    "infer": infer,
    "styles": styles,
    "conv": conv,
    "launch-cost": launch_cost,
    "roofline": roofline,
    "launches": launches,
}
#: Subcommands that calculate instead of measuring, and therefore take no measurement options.
CALCULATED = ("roofline", "launches")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmark fused_res against stock PyTorch on this machine. The results of every provider are "
        "checked before it is timed, and the providers are timed interleaved. Tables are printed, and written to the "
        "results folder together with JSON and charts.",
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="subcommand")
    for name, module in {**SUBCOMMANDS, "all": suite}.items():
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        options.add_output(subparser)
        if name not in CALCULATED:
            options.add_common(subparser)
        module.add_arguments(subparser)
    zoo_parser = subparsers.add_parser("zoo", help=zoo.HELP, description=zoo.__doc__)
    options.add_output(zoo_parser)
    zoo.add_arguments(zoo_parser)
    compare.add_arguments(subparsers.add_parser("compare", help=compare.HELP, description=compare.__doc__))
    return parser


def main(arguments: list[str]) -> None:
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.subcommand == "compare":
        raise SystemExit(compare.run(parsed))
    if parsed.subcommand == "zoo":
        raise SystemExit(zoo.run(parsed))
    if parsed.subcommand == "all":
        suite.run(parsed, parser, SUBCOMMANDS)
        return
    benchmark = SUBCOMMANDS[parsed.subcommand]
    if getattr(parsed, "into", None) is not None:
        runner.measure_to_file(benchmark, parsed)
    else:
        try:
            runner.run(parsed.subcommand, benchmark, parsed, arguments)
        except runner.BenchmarkFailedError as error:
            raise SystemExit(error.code) from None


if __name__ == "__main__":
    main(sys.argv[1:])
