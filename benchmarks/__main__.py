"""`python -m benchmarks <subcommand>`."""

import argparse
import sys

from benchmarks import block, compare, conv, everything, infer, memory, model, op, options, roofline, runner

SUBCOMMANDS: dict[str, runner.Benchmark] = {
    "op": op,
    "block": block,
    "model": model,
    "memory": memory,
    "infer": infer,
    "conv": conv,
    "roofline": roofline,
}
#: Nothing is measured, so nothing that says how is taken.
CALCULATED = ("roofline",)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="fused_res beside stock PyTorch on this machine. Providers are checked for equal results "
        "and timed interleaved. Tables go to the terminal, and with JSON and charts into the results folder.",
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="subcommand")
    for name, module in {**SUBCOMMANDS, "all": everything}.items():
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        options.add_output(subparser)
        if name not in CALCULATED:
            options.add_common(subparser)
        module.add_arguments(subparser)
    compare.add_arguments(subparsers.add_parser("compare", help=compare.HELP, description=compare.__doc__))
    return parser


def main(arguments: list[str]) -> None:
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.subcommand == "compare":
        raise SystemExit(compare.run(parsed))
    if parsed.subcommand == "all":
        everything.run(parsed, parser, SUBCOMMANDS)
        return
    benchmark = SUBCOMMANDS[parsed.subcommand]
    if getattr(parsed, "into", None) is not None:
        runner.measure_here(benchmark, parsed)
    else:
        try:
            runner.run(parsed.subcommand, benchmark, parsed, arguments)
        except runner.PartFailedError as error:
            raise SystemExit(error.code) from None


if __name__ == "__main__":
    main(sys.argv[1:])
