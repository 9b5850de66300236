"""Atomic, checksummed checkpoint files.

A checkpoint is one file that ``torch.load(path, weights_only=True)`` reads, followed by the SHA-256 of its contents,
which ``torch.load`` ignores. It is written to a temporary file in the same folder, synced to disk and renamed, so a
crash, even of the machine, leaves the previous checkpoint intact. A file that was truncated or modified later fails its
checksum and is skipped.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

_MARK = b"sha256:"
_TAIL = len(_MARK) + hashlib.sha256().digest_size
_NAME = re.compile(r"step-(\d+)\.pt")
_CHUNK = 1 << 20


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, or was not written by this module."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary binary file that atomically replaces `path` when the block ends.

    The contents are synced to disk before the rename. If the block raises, `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is only durable once the folder is synced.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _HashingWriter:
    """A file wrapper that updates a SHA-256 digest with everything written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path`, replacing an existing file atomically.

    Args:
        state: tensors, numbers, strings, and lists and dicts of these.
        path: the checkpoint file.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    with atomic_write(path) as file:
        hashing = _HashingWriter(file)
        torch.save(state, hashing)
        file.write(_MARK + hashing.digest.digest())


def check(path: Path) -> None:
    """Raise CheckpointError, with the reason, unless `path` is exactly what :func:`save` wrote."""
    try:
        with path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - _TAIL
            digest = hashlib.sha256()
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
            tail = file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not tail.startswith(_MARK):
        raise CheckpointError(f"{path} is truncated or not a checkpoint: it does not end with its checksum")
    if tail != _MARK + digest.digest():
        raise CheckpointError(f"{path} is damaged: its checksum does not match")


def load(path: Path) -> dict[str, Any]:
    """Check and load what :func:`save` wrote, with all tensors on the CPU.

    Raises:
        CheckpointError: the file fails :func:`check`, or holds more than tensors and plain containers.
    """
    check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load does not document which exceptions it raises
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def file_name(step: int) -> str:
    """Return the name of the checkpoint saved after `step` optimizer steps."""
    return f"step-{step:09}.pt"


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, valid or not, sorted by the step in their names."""
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def latest(folder: Path, warn: Callable[[str], None] = print) -> Path | None:
    """Return the newest valid checkpoint in `folder`, or None if the folder has no checkpoint.

    Args:
        folder: the folder of checkpoints.
        warn: called with a message for each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: the folder has checkpoints and all of them are damaged. Starting a new run would hide that.
    """
    found = newest_first(folder)
    for path in found:
        try:
            check(path)
        except CheckpointError as error:
            warn(f"{error}; trying the previous one")
        else:
            return path
    if found:
        raise CheckpointError(f"all {len(found)} checkpoints in {folder} are damaged")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and temporary files of an interrupted :func:`atomic_write`."""
    for path in [*newest_first(folder)[keep:], *folder.glob(".*.tmp")]:
        path.unlink(missing_ok=True)
