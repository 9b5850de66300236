"""Finished and unfinished trainings as files, under names that hold all their settings. Whole files or none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.depth_study.settings import Training

State = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A folder. ``<name>.json``: a finished training's result; ``.weights``: what it ended with; ``.running``: the
    state of one that was interrupted."""

    folder: Path

    def result(self, training: Training) -> dict[str, Any] | None:
        """None if the training did not finish yet."""
        path = self._path(training, "json")
        if not path.exists() or not self._path(training, "weights").exists():
            return None
        return json.loads(path.read_text())

    def weights(self, training: Training) -> dict[str, Tensor]:
        return torch.load(self._path(training, "weights"), weights_only=True)

    def finish(self, training: Training, result: dict[str, Any], weights: dict[str, Tensor]) -> None:
        # The result last: where it is, the weights are.
        write_atomically(self._path(training, "weights"), lambda path: torch.save(weights, path))
        write_json(self._path(training, "json"), {"settings": training.as_json(), **result})
        self._path(training, "running").unlink(missing_ok=True)

    def running(self, training: Training) -> State | None:
        """What :meth:`interrupt` left."""
        path = self._path(training, "running")
        return torch.load(path, weights_only=True) if path.exists() else None

    def keep_running(self, training: Training, state: State) -> None:
        write_atomically(self._path(training, "running"), lambda path: torch.save(state, path))

    def _path(self, training: Training, suffix: str) -> Path:
        return self.folder / f"{training.name}.{suffix}"


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(document, indent=1) + "\n"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `path`, and puts it in place of `path` once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
