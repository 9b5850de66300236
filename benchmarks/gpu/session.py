"""A session: runs the stages of a plan in order, whatever becomes of each, and ends in time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import archive, library, summary
from benchmarks.gpu.host import Host
from benchmarks.gpu.journal import Record
from benchmarks.gpu.plan import ENVIRONMENT, FEATURES, LIBRARY, REHEARSAL_FACTOR, RESERVE_SECONDS, Stage, build_stage
from benchmarks.gpu.stage_run import LeftOut, StageRun

POLL_SECONDS = 0.1
#: Remaining seconds below which no stage starts.
SHORTEST_STAGE = 10.0


class Session:
    """Runs stages and writes, into `out`, `results.jsonl` and `progress.txt` as results come, `summary.txt` and the
    archive at the end.

    Args:
        host: clock and processes of the machine.
        out: folder of the results.
        folder: folder of the workers' files: logs, journals, profiles.
        seconds: length of the session.
        environment: variables of the workers.
        carried: whether the libraries in the package are the carried ones.
        rehearse: whether the workers run tiny tensors on the CPU, with stand-ins for the GPU.
    """

    def __init__(
        self,
        host: Host,
        out: Path,
        folder: Path,
        seconds: float,
        environment: Mapping[str, str],
        carried: bool = False,
        rehearse: bool = False,
    ) -> None:
        self.host = host
        self.out = out
        self.folder = folder
        self.carried = carried
        self.rehearse = rehearse
        self.started_at = host.now()
        self.end = self.started_at + seconds - RESERVE_SECONDS
        self.features: dict[str, str] = {}  # "" or the reason why it is missing
        self.results: list[Record] = []
        self.left_out: list[LeftOut] = []
        self.pending: list[Stage] = []
        self.done: list[Stage] = []
        self.background: list[StageRun] = []
        self.foreground: StageRun | None = None
        self.environment = dict(environment)

    def run(self, stages: Sequence[Stage]) -> None:
        """Run all stages; report, as the last lines, what was left out and the table of results."""
        self.pending = list(stages)
        try:
            self._run_stages()
        except BaseException:
            for run in self._running():
                run.stop("interrupted")
            raise
        self._conclude()

    def _run_stages(self) -> None:
        while self.pending or self.foreground or self.background:
            self._poll()
            if self.foreground is None:
                self._start_ready_stages()
                if self.foreground is None and not self.background:
                    break
            self.host.sleep(POLL_SECONDS)
        for stage in self.pending:
            self._leave_out(stage.name, "", "the session's time was over")

    def _running(self) -> list[StageRun]:
        return [*self.background, *([self.foreground] if self.foreground else [])]

    def _poll(self) -> None:
        for run in self._running():
            for record in run.poll():
                self._result(run.stage, record)
            if run.finished:
                self._finish(run)

    def _start_ready_stages(self) -> None:
        """Start every background stage whose needs are met, up to the first other one."""
        for stage in list(self.pending):
            missing = [f"{need}: {self.features[need]}" for need in stage.needs if self.features.get(need)]
            left = self.end - self.host.now()
            if missing or left < SHORTEST_STAGE:
                self.pending.remove(stage)
                self._leave_out(stage.name, "", missing[0] if missing else "no time was left")
            elif all(need in self.features for need in stage.needs):
                if stage.quiet and any(run.stage.uses_gpu for run in self.background):
                    return  # the results of what compiles there save this stage more than the wait costs
                self.pending.remove(stage)
                # No stage outlives the session, so that it ends in time.
                run = self._start(stage, min(stage.seconds * (REHEARSAL_FACTOR if self.rehearse else 1), left))
                if not stage.background:
                    self.foreground = run
                    return
                self.background.append(run)

    def _start(self, stage: Stage, seconds: float) -> StageRun:
        self.note(f"{stage.name} starts, {seconds:.0f} s at most")
        if self.rehearse:
            settings = replace(stage.settings, rehearse=True)
            stage = replace(stage, settings=settings, item_seconds=REHEARSAL_FACTOR * stage.item_seconds)
        return StageRun(self.host, stage, self.folder, self.environment, seconds)

    def _finish(self, run: StageRun) -> None:
        if run is self.foreground:
            self.foreground = None
        else:
            self.background.remove(run)
        self.done.append(run.stage)
        for left_out in run.left_out:
            self._leave_out(left_out.stage, left_out.item, left_out.reason)
        if run.unreadable:
            self._leave_out(run.stage.name, "", f"{run.unreadable} unreadable lines of its journal")
        self.note(f"{run.stage.name} ended after {self.host.now() - run.started_at:.0f} s")
        if run.stage.kind == "environment":
            self._check_features(run)
        elif run.stage.name == "build-library":
            self._check_build(run)

    # The library of CUDA kernels

    def _check_features(self, run: StageRun) -> None:
        """Complete the features after the first stage; build the library of CUDA kernels if it does not load."""
        reasons = {left_out.item: left_out.reason for left_out in run.left_out}
        whole = reasons.get("")  # the process did not start
        for feature in FEATURES:
            self.features.setdefault(feature, reasons.get(feature) or whole or "its check did not finish")
        if self.features["fused_res"] and self.carried:
            self._remove_carried()
            self.note(f"without the compiled libraries, because of them: {self.features['fused_res']}")
            self.features.clear()
            self.pending.insert(0, ENVIRONMENT)
        elif self.features["cuda"] and not self.features["gpu"] and run.stage.name == "environment":
            self._remove_carried()
            if not self.rehearse:
                architecture = next((str(r["architecture"]) for r in self.results if "architecture" in r), "9.0")
                self.note(f"the library of CUDA kernels does not load ({self.features.pop('cuda')}), building it")
                self.pending.insert(0, build_stage(architecture))

    def _remove_carried(self) -> None:
        """Delete carried libraries that do not load: otherwise backend="auto" would open them in every stage."""
        if self.carried:
            library.remove()
        self.carried = False

    def _check_build(self, run: StageRun) -> None:
        if run.left_out:
            self.features["cuda"] = f"the build failed: {run.left_out[0].reason}"
        else:
            self.pending.insert(0, LIBRARY)
            # What was measured before without the library.
            self.pending += [
                replace(
                    stage, name=f"{stage.name}-cuda", settings=replace(stage.settings, backend="cuda"), needs=("cuda",)
                )
                for stage in self.done
                if stage.kind in ("op", "conv") and not stage.background
            ]

    # Output

    def _result(self, stage: Stage, record: Record) -> None:
        record = {"stage": stage.name, "seconds": round(self.host.now() - self.started_at, 1), **record}
        self.results.append(record)
        if isinstance(record.get("feature"), str):
            self.features[record["feature"]] = str(record.get("reason", ""))
        self._append("results.jsonl", json.dumps(record))
        for line in summary.lines_of(record):
            self.note(f"{stage.name}: {line}")

    def _leave_out(self, stage: str, item: str, reason: str) -> None:
        self.left_out.append(LeftOut(stage, item, reason))
        self.note(f"left out: {self.left_out[-1]}")

    def note(self, text: str) -> None:
        line = f"[{self.host.now() - self.started_at:5.1f} s] {text}"
        print(line, flush=True)
        self._append("progress.txt", line)

    def _append(self, name: str, line: str) -> None:
        try:
            with (self.out / name).open("a") as file:
                file.write(line + "\n")
        except OSError:  # a full disk must not end the session: all of it is printed, too
            pass

    def _conclude(self) -> None:
        text = summary.text(self.results, list(map(str, self.left_out)))
        self._append("summary.txt", text)
        files = [self.out / name for name in ("results.jsonl", "summary.txt", "progress.txt")]
        # Journals are copies of the results; logs and profiles are worth the more the smaller they are.
        extra = sorted(
            (file for file in self.folder.rglob("*") if file.is_file() and file.suffix != ".jsonl"),
            key=lambda file: file.stat().st_size,
        )
        left_out = archive.write_archive(self.out / "results.tar.gz", [file for file in files if file.exists()] + extra)
        minutes = (self.host.now() - self.started_at) / 60
        for line in left_out:
            text += f"\nleft out of the archive: {line}"
        print(f"\n{text}\n\n{minutes:.1f} minutes; results in {self.out}", flush=True)
