"""Command line options that the subcommands share, checked where they are parsed."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import allocator, providers
from fused_res import backends

DEFAULT_OUT = Path(__file__).parent / "results" / "latest"


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, got {text!r}")
    return value


def provider_list(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in providers.PROVIDERS]
    if unknown or not names:
        known = ", ".join(providers.PROVIDERS)
        raise argparse.ArgumentTypeError(f"unknown provider {', '.join(unknown) or text!r}; choose from {known}")
    return tuple(dict.fromkeys(names))


def add_common(parser: argparse.ArgumentParser) -> None:
    """For every subcommand."""
    parser.add_argument("--threads", type=positive_int, help="threads of PyTorch (default: PyTorch's own choice)")
    parser.add_argument(
        "--allocator",
        choices=[*allocator.SETTINGS, "both"],
        default="both",
        help="memory as glibc ships it, kept warm, or one after the other (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=backends.names(),
        default="auto",
        help="fused_res backend of our providers (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: does it run, not how fast")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="results folder (default: %(default)s)"
    )
    # Given to the child process that measures; see runner.py.
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)


def add_timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=positive_int, default=7, help="rounds at least (default: %(default)s)")
    parser.add_argument(
        "--min-time",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="measure each provider about this long in each case (default: %(default)s)",
    )


def timing(options: argparse.Namespace) -> dict[str, Any]:
    """How long to measure, as `timing.measure_interleaved` takes it."""
    if options.quick:
        return {"repeat": 2, "min_time": 0.0}
    return {"repeat": options.repeat, "min_time": options.min_time}


def add_providers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--providers",
        type=provider_list,
        metavar="LIST",
        help=f"comma-separated, from: {', '.join(providers.PROVIDERS)} (default: all; with --quick those not compiled)",
    )


def chosen_providers(options: argparse.Namespace) -> list[providers.Provider]:
    names = options.providers
    if names is None:
        names = [p.name for p in providers.PROVIDERS.values() if not (options.quick and p.compiled)]
    return [providers.PROVIDERS[name] for name in names]
