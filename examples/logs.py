"""Training logs: console lines and a progress bar, a CSV file and TensorBoard event files."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.checkpoint import atomic_write

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
    "images_per_second",
    "seconds",
)
CSV = "log.csv"

Row = Mapping[str, float]


class Log:
    """The log of one run.

    The CSV file is rewritten after each epoch from the rows that checkpoints save, so after a crash it never has a row
    of an epoch that the resumed run has not completed.

    Args:
        folder: output folder.
        steps: total number of steps of the run.
        step: number of steps already done when the run resumes.
        tensorboard: whether to write TensorBoard event files.
        silent: whether to write nothing, as in all ranks but rank 0.
    """

    def __init__(self, folder: Path, steps: int, step: int, tensorboard: bool, silent: bool) -> None:
        self.folder = folder
        self.silent = silent
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=True if silent else None, dynamic_ncols=True)
        self.writer: Any = None
        if tensorboard and not silent:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.write_line("no TensorBoard files are written: they need tensorboard (pip install tensorboard)")
            else:
                # Purge what an interrupted run has written after its last checkpoint.
                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write_line(self, text: str) -> None:
        if not self.silent:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Update the progress bar to `step` finished steps and log `values`."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix({name.rpartition("/")[2]: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._scalars(step, values)

    def epoch(self, row: Row, epochs: int) -> None:
        self.write_line(
            f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}"
            f"  train loss {row['train_loss']:.4f}  error {row['train_error']:7.2%}"
            f"  test loss {row['test_loss']:.4f}  error {row['test_error']:7.2%}"
            f"  {row['images_per_second']:.0f} images/s"
        )
        names = {"test/loss": "test_loss", "test/error": "test_error", "images/s": "images_per_second"}
        self._scalars(int(row["step"]), {name: row[column] for name, column in names.items()})

    def write_csv(self, rows: Sequence[Row]) -> None:
        if self.silent:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.folder / CSV) as file:
            file.write(text.getvalue().encode())

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
