"""The commands `python -m fused_res summarize MODEL` and `python -m fused_res check MODEL`."""

import argparse
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fused_res
from fused_res.testing import stub_torchvision_operators

DTYPES = ("float32", "bfloat16", "float16", "float64")
_SPEC = (
    "torchvision:NAME or timm:NAME, a model with random weights; or MODULE:NAME, a torch.nn.Module, or a function"
    " without arguments that returns one, in a module that is imported with the working directory on sys.path"
)


class CommandError(Exception):
    """An error that ends a command with one line of text and an exit status, 1 unless given."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of `summarize` and `check`; each sets `run`, the function of the command."""
    about = "which modules of a model run fused, which do not, and why"
    parser = commands.add_parser("summarize", help=about, description=f"Prints {about}: fused_res.summarize.")
    parser.add_argument("model", metavar="MODEL", help=_SPEC)
    parser.add_argument(
        "--input",
        type=_shape,
        metavar="N,C,H,W",
        help="shape of an input that the model runs on first, so that the algorithms are selected (default: none)",
    )
    parser.add_argument("--backend", default="auto", help="see fused_res.backends (default: %(default)s)")
    parser.set_defaults(run=_run_summarize)

    about = "results, speed and memory of a model, stock and fused, with errors against float64"
    parser = commands.add_parser(
        "check", help=about, description=f"Compares {about}: fused_res.check. Exit status 1: they differ."
    )
    parser.add_argument("model", metavar="MODEL", help=_SPEC)
    parser.add_argument(
        "--input",
        type=_shape,
        default=(2, 3, 224, 224),
        metavar="N,C,H,W",
        help="shape of the normally distributed input (default: 2,3,224,224)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of model and input (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=2.0,
        help="time to measure the speed for, 0 omits it (default: %(default)s)",
    )
    parser.add_argument("--backend", default="auto", help="see fused_res.backends (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="convert model and input to channels_last")
    parser.set_defaults(run=_run_check)


def _run_summarize(options: argparse.Namespace) -> None:
    model = _load(options.model)
    _user_call("fuse", lambda: fused_res.fuse(model, options.backend))
    inputs = () if options.input is None else (torch.randn(options.input),)
    if inputs:
        _user_call("the model", lambda: model.eval()(*inputs))  # a batch of one image cannot train
    print(_user_call("the model", lambda: fused_res.summarize(model, *inputs)))


def _run_check(options: argparse.Namespace) -> None:
    model = _load(options.model)

    def to(value: Any) -> Any:
        layout = {"memory_format": torch.channels_last} if options.channels_last else {}
        return value.to(options.device, getattr(torch, options.dtype), **layout)

    def run() -> fused_res.report.Report:
        torch.manual_seed(0)
        x: Tensor = to(torch.randn(options.input))
        return fused_res.check(to(model), x, backend=options.backend, seconds=options.seconds)

    report = _user_call("check", run)
    print(report)
    if not report.ok:
        raise CommandError(f"{options.model}: fused and stock differ")


def _load(spec: str) -> nn.Module:
    """Return the model that a specification names, see `_SPEC`."""
    source, separator, name = spec.partition(":")
    if not (source and separator and name):
        raise CommandError(f"MODEL: expected torchvision:NAME, timm:NAME or MODULE:NAME, got {spec!r}", 2)
    if source == "torchvision":
        return _torchvision_model(name)
    if source == "timm":
        timm = _import_with_torchvision("timm")
        return _user_call(f"timm.create_model({name!r})", lambda: timm.create_model(name, pretrained=False))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = _user_call(f"importing {source}", lambda: importlib.import_module(source))
    for part in name.split("."):
        if not hasattr(found, part):
            raise CommandError(f"MODEL: {source} has no attribute {name!r}", 2)
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        found = _user_call(f"{spec}()", found)
    if not isinstance(found, nn.Module):
        raise CommandError(f"MODEL: {spec} must be or return a torch.nn.Module, got {type(found).__name__}", 2)
    return found


def _torchvision_model(name: str) -> nn.Module:
    models = _import_with_torchvision("torchvision.models")
    builder = _user_call(f"torchvision.models.{name}", lambda: models.get_model_builder(name))
    options = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # its default would download weights
    return _user_call(f"torchvision.models.{name}", lambda: builder(**options))


def _import_with_torchvision(name: str) -> ModuleType:
    """Import torchvision, or a library that imports it, without its compiled operators if they do not load.

    Classification models do not call these operators. A library must not change what another one registers when it is
    imported, so that fused_res does this only here, in a process of its own.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name != name.partition(".")[0]:
            raise CommandError(f"importing {name} raised {type(error).__name__}: {error}", 2) from error
        raise CommandError(f"{error.name} is not installed: pip install {error.name}", 2) from error
    except RuntimeError:  # operator torchvision::nms does not exist
        stub_torchvision_operators()
        return _user_call(f"importing {name}", lambda: importlib.import_module(name))


def _user_call(what: str, call: Callable[[], Any]) -> Any:
    """Return the result of code that is not ours, or raise its exception as a CommandError."""
    try:
        return call()
    except Exception as error:
        text = " ".join(str(error).split())
        raise CommandError(f"{what} raised {type(error).__name__}: {text}", 2) from error


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected positive integers such as 2,3,224,224, got {text!r}")
    return tuple(map(int, sizes))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a non-negative number, got {text!r}")
    return seconds
