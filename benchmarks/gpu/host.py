"""The machine that runs a session: its clock and its processes. Tests replace it by one with a fake clock."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
#: Seconds within which a killed process must have ended; a process that hangs in the driver is abandoned.
KILL_SECONDS = 5.0


class Child(Protocol):
    """A process with all of its descendants."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""

    def kill(self) -> None:
        """End the process and its descendants."""


class Host(Protocol):
    def now(self) -> float:
        """Return seconds of a monotonic clock."""

    def sleep(self, seconds: float) -> None: ...

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
        """Start a process whose output is appended to `log`.

        Args:
            command: program and arguments.
            log: file of its standard output and standard error.
            environment: variables that are added to those of this process.

        Raises:
            OSError: the program does not exist.
        """


class LocalChild:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            self._kill_group()  # its descendants: compilers, data loaders
        return code

    def kill(self) -> None:
        self._kill_group()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class LocalHost:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> LocalChild:
        with log.open("ab") as output:
            return LocalChild(
                subprocess.Popen(
                    command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip
