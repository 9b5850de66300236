"""A stage in progress: its worker processes, their journals, and the deadlines of stage and item."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.host import Child, Host
from benchmarks.gpu.journal import JournalReader, Record
from benchmarks.gpu.plan import Stage

#: A log that exceeds twice this size is truncated to it: a stage may write without end.
LOG_BYTES = 512 << 10
#: Longest quotation of a log, in characters.
QUOTE = 300


@dataclass(frozen=True)
class LeftOut:
    """Something that was not measured, and why."""

    stage: str
    item: str
    reason: str

    def __str__(self) -> str:
        return f"{self.stage}{f': {self.item}' if self.item else ''}: {self.reason}"


class _Worker:
    """One worker process of a stage, replaced by a fresh one after a crash or a hang."""

    def __init__(self, run: "StageRun", part: int) -> None:
        self.run = run
        self.journal = run.folder / f"{run.stage.name}-{part}.jsonl"
        self.log = run.folder / f"{run.stage.name}-{part}.log"
        self.reader = JournalReader(self.journal)
        self.part = part
        self.items: list[str] = []
        self.started: list[str] = []
        self.current = ""
        self.finished = False
        self._start()

    def _start(self) -> None:
        self.alive_at = self.run.host.now()
        self.before = len(self.started)
        try:
            self.child: Child = self.run.host.start(self._command(), self.log, self.run.environment)
        except OSError as error:
            self.finished = True
            self.run.left_out.append(LeftOut(self.run.stage.name, "", f"cannot be started: {error}"))

    def _command(self) -> list[str]:
        stage = self.run.stage
        if stage.command:
            return [word.format(folder=self.run.folder) for word in stage.command]
        prefix = [word.format(folder=self.run.folder) for word in stage.prefix]
        worker = [sys.executable, "-u", "-m", "benchmarks.gpu.worker", stage.kind, "--journal", str(self.journal)]
        part = ["--part", f"{self.part}/{stage.processes}", "--settings", stage.settings.to_json()]
        return [*prefix, *worker, *part, *(word for item in self.started for word in ("--skip", item))]

    def poll(self) -> Iterator[Record]:
        """Yield the new records; detect the end, a crash or a hang of the process."""
        code = self.child.poll()  # before reading: what it wrote until its end is read below
        now = self.run.host.now()
        for record in self.reader.read():
            self.alive_at = now
            self._follow(record)
            if record["state"] == "result":
                yield record
        self._limit_log()
        if self.reader.overflowed:
            self.stop("its journal is too large")
        elif code is not None:
            self._ended(code)
        elif not self.run.stage.command and now - self.alive_at > self.run.stage.item_seconds:
            self.child.kill()
            self._replace(f"stopped after {self.run.stage.item_seconds:.0f} s without a result")

    def _follow(self, record: Record) -> None:
        state, item = record["state"], str(record.get("item", ""))
        if state == "items":
            self.items = [str(name) for name in record.get("items", [])]
        elif state == "start":
            self.current = item
            self.started.append(item)
        elif state in ("done", "failed"):
            self.current = ""
            if state == "failed":
                self._leave_out(item, str(record.get("reason", "failed"))[:QUOTE])

    def _ended(self, code: int) -> None:
        if self.run.stage.command:
            self.finished = True
            if code:
                self._leave_out("", f"{_exit(code)}: {self._last_line()}")
        elif code == 0 or (self.items and not self.current and not self._remaining()):
            self.finished = True
            if code and self.run.stage.prefix:  # a tool found errors in items that passed
                self._leave_out("", f"{_exit(code)}: {self._last_line()}")
        else:
            self._replace(f"{_exit(code)}: {self._last_line()}")

    def _replace(self, reason: str) -> None:
        """Start a fresh process for the remaining items, after the current one ended the process."""
        if self.current:
            self._leave_out(self.current, reason)
            self.current = ""
        elif len(self.started) == self.before:  # it did not even start an item, so a second one would not either
            self._leave_out("", reason)
            self._give_up("its process does not start")
            return
        if self._remaining() or not self.items:
            self._start()
        else:
            self.finished = True

    def stop(self, reason: str) -> None:
        """End the process and leave out what it has not finished."""
        if self.finished:
            return
        self.child.kill()
        if self.current:
            self._leave_out(self.current, reason)
        elif not self.items:
            self._leave_out("", reason)
        self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        for item in self._remaining():
            self._leave_out(item, f"not started: {reason}")
        self.finished = True

    def _remaining(self) -> list[str]:
        return [item for item in self.items if item not in self.started]

    def _leave_out(self, item: str, reason: str) -> None:
        self.run.left_out.append(LeftOut(self.run.stage.name, item, reason))

    def _limit_log(self) -> None:
        try:
            if self.log.stat().st_size > 2 * LOG_BYTES:
                os.truncate(self.log, LOG_BYTES)  # the process appends, so that it goes on after the new end
        except OSError:
            pass

    def _last_line(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return "no output"
        return next((line.strip()[:QUOTE] for line in reversed(lines) if line.strip()), "no output")


def _exit(code: int) -> str:
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


class StageRun:
    """A stage in progress."""

    def __init__(self, host: Host, stage: Stage, folder: Path, environment: dict[str, str], seconds: float) -> None:
        self.host = host
        self.stage = stage
        self.folder = folder
        self.environment = {**environment, **stage.environment}
        self.started_at = host.now()
        self.deadline = self.started_at + seconds
        self.left_out: list[LeftOut] = []
        self.workers = [_Worker(self, part) for part in range(stage.processes)]

    @property
    def finished(self) -> bool:
        return all(worker.finished for worker in self.workers)

    @property
    def unreadable(self) -> int:
        return sum(worker.reader.unreadable for worker in self.workers)

    def poll(self) -> list[Record]:
        """Return the new results, and end what is past its deadline."""
        records = [record for worker in self.workers if not worker.finished for record in worker.poll()]
        if self.host.now() >= self.deadline:
            self.stop(f"the stage's {self.deadline - self.started_at:.0f} s were over")
        return records

    def stop(self, reason: str) -> None:
        for worker in self.workers:
            worker.stop(reason)
