"""Checkpoints that are either whole or not there.

A checkpoint is one file that ``torch.load(path, weights_only=True)`` reads, and behind it, where that does not look,
the SHA-256 of everything before. It is written beside its place and moved there when it is safely on the disk, so a
crash, even of the machine, leaves the one before it. One that was truncated or changed later is recognised and passed
over.
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
    """A checkpoint is missing, damaged, or not of this kind."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends: whole, on the disk, or not at all."""
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
    # The new name has to reach the disk, too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Hashing:
    """What is written to a file, counted into a digest on its way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(state: dict[str, Any], path: Path) -> None:
    """Writes `state` (tensors, numbers, strings, and lists and dicts of such) to `path`, replacing what was there.

    Raises: OSError: it cannot be written; what was there before is untouched.
    """
    with replacing(path) as file:
        hashing = _Hashing(file)
        torch.save(state, hashing)
        file.write(_MARK + hashing.digest.digest())


def check(path: Path) -> None:
    """Raises CheckpointError, with the reason, unless `path` is exactly what :func:`save` wrote."""
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
        raise CheckpointError(f"{path} is truncated, or no checkpoint: it does not end in its checksum")
    if tail != _MARK + digest.digest():
        raise CheckpointError(f"{path} is damaged: its checksum does not match")


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote, checked, with all tensors on the CPU.

    Raises: CheckpointError: see :func:`check`; or it holds more than tensors and plain containers.
    """
    check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load promises nothing about what it raises
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def file_name(step: int) -> str:
    return f"step-{step:09}.pt"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, by the step in their names, sound or not."""
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def latest(folder: Path, note: Callable[[str], None] = print) -> Path | None:
    """The newest sound checkpoint in `folder`, None if there is none at all; `note` hears of those passed over.

    Raises: CheckpointError: there are checkpoints, and every one is damaged: starting anew would hide that.
    """
    found = newest_first(folder)
    for path in found:
        try:
            check(path)
        except CheckpointError as error:
            note(f"{error}; trying the one before it")
        else:
            return path
    if found:
        raise CheckpointError(f"all {len(found)} checkpoints in {folder} are damaged")
    return None


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what an interrupted :func:`replacing` left behind."""
    for path in [*newest_first(folder)[keep:], *folder.glob(".*.tmp")]:
        path.unlink(missing_ok=True)
