"""Finished and unfinished trainings as files, under names that stand for all their settings. Whole files or none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from examples import checkpoint
from examples.depth_study.settings import Training


@dataclass(frozen=True)
class Store:
    """A folder. ``<name>.json``: a finished training's result; ``.weights``: what it ended with; ``.running``: the
    state of one that was interrupted. A damaged file counts as one that is not there."""

    folder: Path

    def result(self, training: Training) -> dict[str, Any] | None:
        """None if the training did not finish yet."""
        try:
            checkpoint.check(self._path(training, "weights"))
            return json.loads(self._path(training, "json").read_text())
        except (checkpoint.CheckpointError, FileNotFoundError, json.JSONDecodeError):
            return None

    def weights(self, training: Training) -> dict[str, Tensor]:
        """Of a training that has a result."""
        return checkpoint.load(self._path(training, "weights"))

    def finish(self, training: Training, result: dict[str, Any], weights: dict[str, Tensor]) -> None:
        # The result last: where it is, the weights are.
        checkpoint.save(weights, self._path(training, "weights"))
        write_json(self._path(training, "json"), {"settings": training.as_json(), **result})
        self._path(training, "running").unlink(missing_ok=True)

    def running(self, training: Training) -> dict[str, Any] | None:
        """What :meth:`keep_running` left, if the training did not finish since."""
        try:
            return checkpoint.load(self._path(training, "running"))
        except checkpoint.CheckpointError:
            return None

    def keep_running(self, training: Training, state: dict[str, Any]) -> None:
        checkpoint.save(state, self._path(training, "running"))

    def _path(self, training: Training, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{training.name}.{suffix}"


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.replacing(path) as file:
        file.write(text.encode())
