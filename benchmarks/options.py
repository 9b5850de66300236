"""Command-line options shared by the subcommands, validated when they are parsed."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks import allocator, isa, peers, providers
from fused_res import backends

Providers = Mapping[str, providers.Provider]

DEFAULT_OUT = Path(__file__).parent / "results" / "latest"

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
#: Default dtype of each device: bfloat16 on a GPU, for its tensor cores.
DEFAULT_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULT_BATCHES = {"cpu": 16, "cuda": 128}


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, got {text!r}")
    return value


def provider_list(known: Iterable[str], text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of provider names."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown provider {', '.join(unknown) or text!r}; choose from {', '.join(known)}"
        )
    return tuple(dict.fromkeys(names))


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of every subcommand."""
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="results folder (default: %(default)s)"
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every subcommand that measures."""
    parser.add_argument("--threads", type=positive_int, help="number of PyTorch threads (default: chosen by PyTorch)")
    parser.add_argument(
        "--allocator",
        choices=[*allocator.SETTINGS, "both"],
        default="both",
        help="glibc's default allocator (as-shipped), one that retains freed memory (warm), or one after the other; "
        "no effect on a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=backends.names(),
        default="auto",
        help="fused_res backend of the ours... providers (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes and two rounds: a smoke test, not a measurement"
    )
    # Passed to the child process that measures, see runner.py.
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEFAULT_DTYPES, default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of activations; full networks train under autocast (default: float32, on a GPU bfloat16)",
    )
    parser.add_argument("--batch", type=positive_int, help="batch size (default: 16, on a GPU 128)")


def dtype_name(options: argparse.Namespace) -> str:
    return options.dtype or DEFAULT_DTYPES[options.device]


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return DTYPES[dtype_name(options)]


def batch_of(options: argparse.Namespace) -> int:
    return options.batch or DEFAULT_BATCHES[options.device]


def add_models(parser: argparse.ArgumentParser, known: Sequence[str], default: str) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        choices=known,
        metavar="NAME",
        help=f"one or more of {', '.join(known)} (default: {default})",
    )


Case = TypeVar("Case", bound="NamedCase")


class NamedCase(Protocol):
    @property
    def name(self) -> str: ...


def add_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", metavar="TEXT", help="only the cases whose name contains TEXT, such as layer2 (default: all)"
    )


def filter_cases(options: argparse.Namespace, cases: Sequence[Case]) -> list[Case]:
    """Return the cases that `--cases` selects."""
    chosen = [case for case in cases if not options.cases or options.cases in case.name]
    if not chosen:
        raise SystemExit(f"--cases {options.cases!r} matches none of: {', '.join(case.name for case in cases)}")
    return chosen


def add_isa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--isa",
        choices=isa.SETTINGS,
        help="restrict all providers to this instruction set, on a CPU; providers for which that is not possible are "
        "skipped (default: no restriction)",
    )


def add_timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeat", type=positive_int, default=7, help="minimum number of rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--min-time",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="measure each provider for about this long in each case (default: %(default)s)",
    )


def timing(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `timing.measure_interleaved` that set how long to measure."""
    if options.quick:
        return {"repeat": 2, "min_time": 0.0}
    return {"repeat": options.repeat, "min_time": options.min_time}


def add_providers(parser: argparse.ArgumentParser, known: Providers = providers.PROVIDERS) -> None:
    parser.add_argument(
        "--providers",
        type=partial(provider_list, known),
        metavar="LIST",
        help=f"comma-separated, from: {', '.join(known)} (default: all{_default_exclusions(known)}; "
        "with --quick only those that are not compiled)",
    )


def _default_exclusions(known: Providers) -> str:
    """Return the part of a help text that names the providers not measured by default."""
    opt_in = [name for name, provider in known.items() if provider.opt_in]
    return f" but {', '.join(opt_in)}" if opt_in else ""


def select_providers(options: argparse.Namespace, known: Providers = providers.PROVIDERS) -> list[providers.Provider]:
    names = options.providers
    if names is None:
        names = [p.name for p in known.values() if not (p.opt_in or (options.quick and p.compiled))]
    chosen = []
    for name in names:
        provider, reason = known[name], None
        if provider.runtime:
            reason = peers.unavailable(provider.runtime, options)
        elif provider.backend:
            reason = backends.unavailable(provider.backend)
        if reason is None:
            chosen.append(provider)
        elif provider.runtime and options.providers:
            raise SystemExit(f"--providers {name}: {reason}")
        else:
            print(f"{name} is skipped: {reason}", flush=True)
    if not chosen:
        raise SystemExit("--providers: none of them is available")
    return chosen


def check_cuda_graphs(chosen: Iterable[providers.Provider], options: argparse.Namespace) -> None:
    graphs = [provider.name for provider in chosen if provider.cuda_graph]
    if graphs and options.device != "cuda":
        raise SystemExit(f"{', '.join(graphs)}: needs --device cuda")
