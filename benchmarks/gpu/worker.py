"""A worker: runs the items of one kind, one after the other, and appends to the journal after each.

Its exit code is 0 after the last item. An error that may have left the process or the GPU's context unusable ends it
with another one, and the session starts a fresh worker for the remaining items.
"""

import argparse
import contextlib
import importlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from benchmarks.gpu.errors import CheckFailed, Unavailable
from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.settings import Settings


class Kind(Protocol):
    """Interface of a module that implements a kind of items."""

    def items(self, settings: Settings) -> list[str]:
        """Return the names of the items in order of value."""

    def run(self, item: str, settings: Settings) -> Iterator[Record]:
        """Run an item and yield its results, plain data."""


KINDS = ("environment", "smoke", "op", "conv", "train", "profile")


def load(kind: str) -> Kind:
    module: Kind = importlib.import_module(f"benchmarks.gpu.{kind}_items")
    return module


def work(
    kind: Kind, settings: Settings, journal: Journal, part: int = 0, parts: int = 1, skip: tuple[str, ...] = ()
) -> None:
    """Run a part of the items.

    Args:
        kind: the kind of the items.
        settings: settings of the stage.
        journal: journal of the results.
        part: index of this worker.
        parts: number of workers that share the items.
        skip: items that another process has started.

    Raises:
        Exception: the error of an item after which the process cannot go on.
    """
    items = [item for item in kind.items(settings) if not settings.only or item in settings.only][part::parts]
    journal.write({"state": "items", "items": items})
    for item in items:
        if item in skip:
            continue
        journal.write({"state": "start", "item": item})
        try:
            for record in kind.run(item, settings):
                journal.write({**record, "state": "result", "item": item})
            synchronize(settings)
        except (Unavailable, CheckFailed) as error:
            print(f"{item}: {error}")
            journal.write({"state": "failed", "item": item, "reason": str(error)})
            synchronize(settings)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            journal.write({"state": "failed", "item": item, "reason": reason})
            raise SystemExit(3) from None
        else:
            journal.write({"state": "done", "item": item})


def synchronize(settings: Settings) -> None:
    """Wait for the GPU, so that an asynchronous error is that of the item that caused it."""
    import torch

    if torch.cuda.is_initialized() or settings.rehearse:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="index and number of the workers that share the items")
    parser.add_argument("--settings", type=Settings.from_json, default=Settings())
    parser.add_argument("--skip", action="append", default=[], help="an item that another process has started")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    settings: Settings = options.settings
    with contextlib.ExitStack() as stack:
        if settings.rehearse:
            from benchmarks.gpu.stand_in import stand_in

            stack.enter_context(stand_in())
        work(load(options.kind), settings, Journal(options.journal), part, parts, tuple(options.skip))


if __name__ == "__main__":
    main()
