"""Journal of a stage: one JSON object a line, appended by its workers and read by the session while they run."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: Longest line of a record. The longest real one, the samples of ten providers, has about 10 KB.
LINE_BYTES = 256 << 10
#: Size at which a journal is no longer read: a worker writes garbage.
JOURNAL_BYTES = 8 << 20


class Journal:
    """Appends records. One system call each, so that the lines of parallel workers do not mix."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Record) -> None:
        os.write(self._file, json.dumps(record).encode() + b"\n")


class JournalReader:
    """Reads the records appended since the last call. Lines that are no record are counted, not raised."""

    def __init__(self, path: Path) -> None:
        self.unreadable = 0
        self._path = path
        self._offset = 0
        self._rest = b""

    @property
    def overflowed(self) -> bool:
        return self._offset >= JOURNAL_BYTES

    def read(self) -> list[Record]:
        if self.overflowed or not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(JOURNAL_BYTES - self._offset)
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        records = []
        for line in lines:
            record = _parse(line)
            if record is None:
                self.unreadable += 1
            else:
                records.append(record)
        return records


def _parse(line: bytes) -> Record | None:
    if len(line) > LINE_BYTES:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("state"), str) else None
