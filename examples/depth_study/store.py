"""Results, weights and resumable states of training runs, in files that are named by a hash of the settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from examples import checkpoint
from examples.depth_study.settings import TrainingConfig


@dataclass(frozen=True)
class Store:
    """A folder of training runs.

    ``<name>.json`` is the result of a finished run, ``.weights`` its final weights, and ``.running`` the state of
    an unfinished one. Files are written atomically, and a damaged one is treated as missing.
    """

    folder: Path

    def result(self, training: TrainingConfig) -> dict[str, Any] | None:
        """Return the result of a training run, or None if it has not finished."""
        try:
            checkpoint.check(self._path(training, "weights"))
            return json.loads(self._path(training, "json").read_text())
        except (checkpoint.CheckpointError, FileNotFoundError, json.JSONDecodeError):
            return None

    def weights(self, training: TrainingConfig) -> dict[str, Tensor]:
        """Return the final weights of a training run that has a result."""
        return checkpoint.load(self._path(training, "weights"))

    def finish(self, training: TrainingConfig, result: dict[str, Any], weights: dict[str, Tensor]) -> None:
        # The result is written last, so a run that has one also has its weights.
        checkpoint.save(weights, self._path(training, "weights"))
        write_json(self._path(training, "json"), {"settings": training.as_json(), **result})
        self._path(training, "running").unlink(missing_ok=True)

    def load_unfinished(self, training: TrainingConfig) -> dict[str, Any] | None:
        """Return the state of an unfinished training run, as saved by :meth:`save_unfinished`, or None."""
        try:
            return checkpoint.load(self._path(training, "running"))
        except checkpoint.CheckpointError:
            return None

    def save_unfinished(self, training: TrainingConfig, state: dict[str, Any]) -> None:
        checkpoint.save(state, self._path(training, "running"))

    def _path(self, training: TrainingConfig, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{training.name}.{suffix}"


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_write(path) as file:
        file.write(text.encode())
