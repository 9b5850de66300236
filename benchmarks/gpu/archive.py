"""One archive of a session's files, of limited size: the least valuable files are left out."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

#: The device tool returns files of at most 16 MiB.
ARCHIVE_BYTES = 16_000_000
#: Files above this size are left out unread: compressing them would take too long.
FILE_BYTES = 64 << 20


def write_archive(path: Path, files: Sequence[Path], limit: int = ARCHIVE_BYTES) -> list[str]:
    """Write a compressed tar file of at most `limit` bytes.

    Args:
        path: path of the archive, `.tar.gz`.
        files: files in order of value, the most valuable first; an archived file has its name without folders.
        limit: size in bytes.

    Returns:
        The names of the files that were left out, each with the reason.
    """
    left_out = [f"{file.name}: {file.stat().st_size >> 20} MiB" for file in files if file.stat().st_size > FILE_BYTES]
    kept = [file for file in files if file.stat().st_size <= FILE_BYTES]
    while True:
        try:
            with tarfile.open(path, "w:gz", compresslevel=6) as archive:
                for file in kept:
                    archive.add(file, file.name)
        except OSError as error:  # the disk is full
            path.unlink(missing_ok=True)
            return [*left_out, f"{path.name}: {error}"]
        if path.stat().st_size <= limit or not kept:
            return left_out
        left_out.append(f"{kept.pop().name}: the archive would exceed {limit / 1e6:.0f} MB")
