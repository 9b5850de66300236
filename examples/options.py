"""Command-line options of the training script, validated before any data or model is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples import distributed, networks
from fused_res.backends import registry
from fused_res.spec import RECOMPUTE_LEVELS

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Options that determine the training trajectory: a checkpoint resumes only with the same values.
TRAJECTORY_OPTIONS = (
    "data",
    "image_size",
    "model",
    "width",
    "plain",
    "sync_bn",
    "amp",
    "epochs",
    "batch_size",
    "accumulate",
    "lr",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "ema",
    "augment",
    "seed",
)


def number(kind: type[int] | type[float], low: float, high: float = math.inf, exclusive: bool = True) -> Callable:
    """Return an argparse type for numbers in [low, high), or in [low, high] if not `exclusive`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value and (value < high if exclusive else value <= high)):
            what = "an integer" if kind is int else "a number"
            limit = "" if high == math.inf else f" and {'below' if exclusive else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"expected {what} of at least {low:g}{limit}, got {text!r}")
        return value

    return parse


def device(text: str) -> str:
    """Parse the name of an available device (an argparse type)."""
    if text == "auto":
        return text
    try:
        kind, index = torch.device(text).type, torch.device(text).index
    except RuntimeError:
        kind, index = text, None
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:<index>, got {text!r}")
    if kind == "cuda" and (index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: PyTorch found {torch.cuda.device_count()} NVIDIA GPUs")
    return text


def add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="digits",
        metavar="SET",
        help="digits (bundled with scikit-learn), or a folder: CIFAR's Python files, or images in train/<class>/* and"
        " val|test/<class>/* (default: %(default)s)",
    )
    group.add_argument(
        "--image-size",
        type=number(int, 4),
        metavar="PIXELS",
        help="side that images are resized to (default: their own size; 224 for a folder of images)",
    )
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="random shifts, and horizontal flips of photographs (default: yes)",
    )
    group.add_argument(
        "--workers", type=number(int, 0), default=2, help="threads that decode a folder's images (default: %(default)s)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="cifar_resnet20",
        metavar="NAME",
        help=f"cifar_resnet<depth>, {', '.join(networks.MODEL_NAMES)}, torchvision/<name> or timm/<name>"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--width", type=number(int, 1), metavar="CHANNELS", help="width of a cifar_resnet's first stage (default: 16)"
    )
    group.add_argument("--plain", action="store_true", help="plain counterpart without shortcuts (fused_res networks)")


def add_kernels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("kernels")
    switch = argparse.BooleanOptionalAction
    group.add_argument("--fuse", action=switch, default=True, help="run blocks as fused operations (default: yes)")
    group.add_argument(
        "--backend", choices=registry.names(), default="auto", help="backend of fused_res (default: auto)"
    )
    group.add_argument(
        "--recompute",
        choices=RECOMPUTE_LEVELS,
        default="none",
        help="what fused blocks recompute in backward instead of saving it for backward (default: none)",
    )
    group.add_argument(
        "--checkpoint-blocks",
        action="store_true",
        help="torch.utils.checkpoint around each residual block: saves even less for backward, and is slower (with"
        " --no-fuse, batch norm then updates its running statistics twice per batch)",
    )
    group.add_argument(
        "--amp", choices=AMP, default="off", help="automatic mixed precision, with a GradScaler for fp16 (default: off)"
    )
    group.add_argument("--channels-last", action=switch, default=True, help="memory format (default: channels last)")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--device", type=device, default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1")
    group.add_argument("--threads", type=number(int, 1), help="CPU threads of PyTorch (default: PyTorch's)")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=number(int, 1), default=20, help="default: %(default)s")
    group.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=64,
        help="images per optimizer step, over all processes and accumulation steps (default: %(default)s)",
    )
    group.add_argument(
        "--accumulate",
        type=number(int, 1),
        default=1,
        metavar="PARTS",
        help="gradient accumulation: micro-batches per optimizer step, for less memory; batch norm normalizes each"
        " micro-batch by itself (default: 1)",
    )
    group.add_argument("--lr", type=number(float, 0), default=0.1, help="peak learning rate (default: %(default)s)")
    group.add_argument(
        "--warmup-epochs",
        type=number(float, 0),
        help="epochs of linear warm-up to the peak learning rate, followed by cosine decay to zero (default: 2, or a"
        " quarter of --epochs)",
    )
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="default: %(default)s")
    group.add_argument(
        "--weight-decay",
        type=number(float, 0),
        default=5e-4,
        help="weight decay of all weights but those of norms; biases have none (default: %(default)s)",
    )
    group.add_argument("--label-smoothing", type=number(float, 0, 1), default=0.0, help="default: %(default)s")
    group.add_argument(
        "--ema",
        type=number(float, 0, 1),
        metavar="DECAY",
        help="maintain an exponential moving average of the weights, and evaluate it (try 0.99; default: none)",
    )
    group.add_argument("--seed", type=number(int, 0, 2**32), default=0, help="default: %(default)s")


def add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distributed training, under torchrun")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument(
        "--ddp", action="store_true", help="data parallel: a replica of the model in each process (default)"
    )
    kinds.add_argument("--fsdp", action="store_true", help="weights and optimizer state sharded (FSDP2)")
    group.add_argument(
        "--sync-bn",
        action="store_true",
        help="batch norm statistics over all processes instead of each process's images",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<model>-<data>")
    group.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|FILE",
        help="auto: resume from the newest valid checkpoint in --out, if there is one; never: start from scratch and"
        " remove the checkpoints there; or the checkpoint to resume from (default: auto)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=number(int, 1),
        metavar="STEPS",
        help="also save every so many steps within an epoch; every epoch ends with a checkpoint in any case",
    )
    group.add_argument(
        "--keep", type=number(int, 1), default=2, help="number of newest checkpoints to retain (default: 2)"
    )
    group.add_argument(
        "--log-every",
        type=number(int, 1),
        default=10,
        metavar="STEPS",
        help="steps between checks and logs of the loss (default: 10)",
    )
    group.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True, help="default: yes")


def build_parser(documentation: str) -> argparse.ArgumentParser:
    summary, _, rest = documentation.partition("\n")
    parser = argparse.ArgumentParser(
        prog="train.py", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add in (add_data, add_model, add_recipe, add_kernels, add_processes, add_output):
        add(parser)
    return parser


def parse(documentation: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and validate the options, their combinations included; exit with status 2 and a message if invalid."""
    parser = build_parser(documentation)
    options = parser.parse_args(arguments)
    if not options.fuse:
        for name in ("backend", "recompute"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name} {getattr(options, name)}: applies to fused blocks only; not with --no-fuse")
    if (options.fsdp or options.ddp) and not distributed.under_torchrun():
        kind = "--fsdp" if options.fsdp else "--ddp"
        parser.error(
            f"{kind}: start it with torchrun, for example: torchrun --nproc-per-node 2 examples/train.py {kind}"
        )
    if options.fsdp and options.compile:
        parser.error("--compile: not supported with --fsdp")
    if options.warmup_epochs is None:
        options.warmup_epochs = min(2.0, options.epochs / 4)
    if options.warmup_epochs > options.epochs:
        parser.error(f"--warmup-epochs {options.warmup_epochs:g}: exceeds --epochs {options.epochs}")
    if options.resume not in ("auto", "never") and not Path(options.resume).is_file():
        parser.error(f"--resume {options.resume}: expected auto, never or an existing file")
    if options.out is None:
        options.out = Path("runs") / f"{options.model.replace('/', '-')}-{Path(options.data).resolve().name}"
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: is not a folder")
    return options


def trajectory_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that determine the training trajectory, by name."""
    return {name: getattr(options, name) for name in TRAJECTORY_OPTIONS}
