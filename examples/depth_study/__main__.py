"""Reproduce the motivation of residual networks (He et al. 2015, https://arxiv.org/abs/1512.03385) with fused_res.

Trains plain networks of increasing depth and residual networks of the same depths, and measures the gradient norm of
every layer, blocks whose residual branch is zero, and the cost of depth. Writes report.md, results.json and figures.

    python -m examples.depth_study                        # everything, on handwritten digits: a quarter of an hour
    python -m examples.depth_study --quick                # a smaller study: two minutes
    python -m examples.depth_study --section gradients    # one of: degradation, gradients, identity, spectrum
    python -m examples.depth_study --data cifar-10-batches-py --depths 20 56 --epochs 30

The same command resumes a killed study: finished training runs are stored under OUT/trainings, keyed by their settings.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fused_res
from benchmarks import environment
from benchmarks.options import positive_int
from examples.data import DataError, load
from examples.depth_study import degradation, figures, gradients, identity, pool, report, spectrum
from examples.depth_study.networks import Network
from examples.depth_study.settings import Study
from examples.depth_study.store import Store, write_json
from examples.depth_study.training import DivergedError

SECTIONS: dict[str, ModuleType] = {
    "degradation": degradation,
    "gradients": gradients,
    "identity": identity,
    "spectrum": spectrum,
}
DEPTHS, QUICK_DEPTHS = (20, 32, 44, 56, 110), (20, 32, 56)
SEEDS, QUICK_SEEDS = 3, 1
#: With the 0.1 of He et al. 2015 the plain networks degrade as well, but residual-110 is barely stable: one seed ended
#: at a training error of 2.8 % after 2 epochs of warm-up, and of 58 % after 5.
LEARNING_RATE = 0.05
EPOCHS, QUICK_EPOCHS = 40, 10
CPU = torch.device("cpu")
MODULE = "python -m examples.depth_study"


def depth(text: str) -> int:
    try:
        return Network("residual", int(text), 1).depth
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=MODULE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/depth-study"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--section", nargs="+", choices=SECTIONS, metavar="NAME", help="sections to run (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer depths, epochs and seeds, fewer networks in the spectrum section"
    )
    parser.add_argument("--data", default="digits", help="digits, or a folder of CIFAR's files or of images")
    parser.add_argument(
        "--image-size", type=positive_int, help="default: the images' own size; 224 for a folder of images"
    )
    parser.add_argument("--depths", type=depth, nargs="+", metavar="N", help=f"6n + 2; default: {DEPTHS}")
    parser.add_argument("--seeds", type=positive_int, metavar="COUNT", help=f"default: {SEEDS}")
    parser.add_argument("--epochs", type=positive_int, help=f"default: {EPOCHS}")
    parser.add_argument(
        "--width", type=positive_int, default=16, help="channels of the first stage; default: %(default)s"
    )
    parser.add_argument("--batch-size", type=positive_int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--lr", type=positive_float, default=LEARNING_RATE, help="peak learning rate; default: %(default)s"
    )
    parser.add_argument("--backend", choices=fused_res.backends.names(), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--jobs", type=positive_int, help="concurrent training runs, each in one thread (default: the number of cores)"
    )
    return parser


def study_of(parsed: argparse.Namespace, parser: argparse.ArgumentParser) -> Study:
    depths = tuple(sorted(set(parsed.depths or (QUICK_DEPTHS if parsed.quick else DEPTHS))))
    if len(depths) < 2:
        parser.error(f"argument --depths: expected two different depths or more, got {depths[0]}")
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {parsed.out}: {error.strerror}")
    try:
        data = load(parsed.data, parsed.image_size)
        fused_res.backends.resolve(parsed.backend, CPU)
    except (DataError, fused_res.BackendUnavailableError) as error:
        parser.error(str(error))
    return Study(
        data,
        parsed.data,
        depths,
        parsed.seeds or (QUICK_SEEDS if parsed.quick else SEEDS),
        parsed.epochs or (QUICK_EPOCHS if parsed.quick else EPOCHS),
        parsed.width,
        parsed.batch_size,
        parsed.lr,
        parsed.backend,
        parsed.quick,
        parsed.out,
    )


def settings_of(study: Study) -> dict[str, Any]:
    """Return the settings of the study, as stored in results.json and printed in the report."""
    data = study.data
    return {
        "data": data.name,
        "images": {"train": len(data.train.labels), "test": len(data.test.labels), "side": data.size},
        "classes": data.classes,
        "shift": data.shift,
        "mirror": data.mirror,
        "depths": study.depths,
        "seeds": study.seeds,
        "epochs": study.epochs,
        "width": study.width,
        "batch_size": study.batch_size,
        "learning_rate": study.learning_rate,
        "backend": study.backend,
        "quick": study.quick,
    }


def main(arguments: list[str]) -> None:
    started = time.monotonic()
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    study = study_of(parsed, parser)
    store = Store(study.out / "trainings")
    sections = {name: module for name, module in SECTIONS.items() if name in (parsed.section or SECTIONS)}
    jobs = parsed.jobs or len(os.sched_getaffinity(0))
    try:
        pool.run(study, [t for module in sections.values() for t in module.training_runs(study)], store, jobs)
    except (DataError, DivergedError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    except BrokenProcessPool:
        raise SystemExit(
            f"{parser.prog}: a training process was killed (out of memory?); the same command resumes the study"
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(f"{parser.prog}: interrupted; the same command resumes the study") from None
    measured = {}
    for name, module in sections.items():
        print(f"measuring: {name}", flush=True)
        measured[name] = module.measure(study, store)
    document = {
        "command": shlex.join([*MODULE.split(), *arguments]),
        "settings": settings_of(study),
        "environment": environment.describe() | {"backend": fused_res.backends.resolve(study.backend, CPU).name},
        "seconds": round(time.monotonic() - started),
        "sections": measured,
    }
    folder = study.out / "report"
    write_json(folder / "results.json", document)
    figures.draw(document, folder)
    report.write(document, folder)
    print(report.summary(document))
    print(f"{folder / 'report.md'}: written in {document['seconds']} s")


if __name__ == "__main__":
    main(sys.argv[1:])
