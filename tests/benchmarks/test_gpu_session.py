"""`make gpu`, rehearsed to its last line on a host with a fake clock and stand-ins for the processes of the stages."""

import dataclasses
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import archive, journal, library, plan, summary
from benchmarks.gpu import host as host_module
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.stage_run import LOG_BYTES

START_SECONDS, ITEM_SECONDS = 3.0, 2.0
#: Items of the kinds whose items the settings do not name.
ITEMS = {
    "environment": ["gpu", "fused_res", "triton", "cuda"],
    "smoke": ["conv 1x1", "weight gradient", "norm forward", "norm backward", "max pool", "running statistics"],
    "op": ["stem", "layer1"],
    "conv": ["1x1", "3x3"],
    "profile": ["norm forward"],
}
ILLEGAL_ACCESS = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"

#: What becomes of an item: a function of the child and the item's start that adds to the child's script. Default:
#: success.
Behavior = Callable[["FakeChild", float], None]


def line(**record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


class FakeChild:
    """A worker that writes its journal and log according to a script, at the times of the fake clock."""

    def __init__(self, host: "FakeHost", command: Sequence[str], log: Path) -> None:
        self.host = host
        self.killed_at: float | None = None
        self.script: list[tuple[float, Path, bytes]] = []
        self.log = log
        self.code: int | None = 0
        if "benchmarks.gpu.worker" not in command:
            self.ends_at, self.code = host.time + 20, host.command_code
            self.script.append((host.time + 20, log, b"nvcc: error\n"))
            return
        arguments = list(command[command.index("benchmarks.gpu.worker") + 1 :])
        values = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        skipped = [value for name, value in zip(arguments[1::2], arguments[2::2], strict=True) if name == "--skip"]
        self.journal = Path(values["--journal"])
        self.stage = self.journal.stem.rpartition("-")[0]
        settings = Settings.from_json(values["--settings"])
        part, parts = map(int, values["--part"].split("/"))
        names = [*settings.only] or ITEMS[arguments[0]]
        time = host.time + START_SECONDS
        self.ends_at = time
        items = names[part::parts]
        self.write(time, line(state="items", items=items))
        for item in items:
            if item in skipped:
                continue
            self.write(self.ends_at, line(state="start", item=item))
            behavior = host.behaviors.pop((self.stage, item), None) or host.behaviors.get((self.stage, "*"))
            if behavior is not None:
                behavior(self, self.ends_at)
                if self.code != 0:
                    return
                continue
            self.ends_at += ITEM_SECONDS
            self.write(self.ends_at, line(state="result", item=item, **result(arguments[0], item, settings)))
            self.write(self.ends_at, line(state="done", item=item))

    def write(self, time: float, data: bytes, path: Path | None = None) -> None:
        self.script.append((time, path or self.journal, data))

    def poll(self) -> int | None:
        now = self.host.time
        for _, path, data in [one for one in self.script if one[0] <= now]:
            with path.open("ab") as file:
                file.write(data)
        self.script = [one for one in self.script if one[0] > now]
        return self.code if now >= self.ends_at else None

    def kill(self) -> None:
        self.killed_at = self.host.time


def result(kind: str, item: str, settings: Settings) -> dict[str, object]:
    if kind == "environment":
        return {"feature": item, "reason": "", "architecture": "9.0"}
    if kind == "smoke":
        return {"errors": {"y": 1e-3}}
    if kind == "train":
        case = f"resnet50 train {settings.batch}x224x224"
        return {"kind": kind, "case": case, "providers": {item: {"median_s": 0.03}}, "images_per_s": 8000.0}
    providers = {"aten-unfused": {"median_s": 1e-3}, "eager-channels-last": {"median_s": 2e-3}}
    return {"kind": kind, "case": item, "count": 2, "providers": providers, "failures": {}}


class FakeHost:
    def __init__(self) -> None:
        self.time = 0.0
        self.behaviors: dict[tuple[str, str], Behavior] = {}
        self.missing: set[str] = set()  # programs
        self.command_code = 0  # of the build
        self.started: list[tuple[float, str, list[str]]] = []  # time, stage, command
        self.children: list[FakeChild] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> FakeChild:
        if command[0] in self.missing:
            raise FileNotFoundError(f"No such file or directory: {command[0]!r}")
        assert environment["TRITON_CACHE_DIR"] and environment["TORCHINDUCTOR_CACHE_DIR"]
        self.started.append((self.time, log.stem.rpartition("-")[0], list(command)))
        self.children.append(FakeChild(self, command, log))
        return self.children[-1]

    def started_at(self, stage: str) -> float:
        return next(time for time, name, _ in self.started if name == stage)

    def stages(self) -> list[str]:
        return list(dict.fromkeys(stage for _, stage, _ in self.started))


# Behaviors


def crash(code: int = -6, message: str = ILLEGAL_ACCESS) -> Behavior:
    def behave(child: FakeChild, time: float) -> None:
        child.write(time + 1, f"{message}\n".encode(), child.log)
        child.ends_at, child.code = time + 1, code

    return behave


def hang(child: FakeChild, time: float) -> None:
    child.ends_at, child.code = float("inf"), None


def slow(seconds: float) -> Behavior:
    def behave(child: FakeChild, time: float) -> None:
        item = json.loads(child.script[-1][2])["item"]
        child.ends_at = time + seconds
        child.write(child.ends_at, line(state="done", item=item))

    return behave


def fail(reason: str, code: int = 0) -> Behavior:
    def behave(child: FakeChild, time: float) -> None:
        item = json.loads(child.script[-1][2])["item"]
        child.ends_at, child.code = time + 1, code
        child.write(time + 1, line(state="failed", item=item, reason=reason))

    return behave


def garbage(child: FakeChild, time: float) -> None:
    """Write, among the lines of the journal, what is no record, and twenty megabytes into the log; then succeed."""
    item = json.loads(child.script[-1][2])["item"]
    for data in (
        b"\x00\xff\xfe\n",
        b"[1, 2]\n",
        b'{"state": 3}\n',
        b'{"state": "result", "item"\n',
        b"x" * 300_000 + b"\n",
    ):
        child.write(time, data)
    for step in range(10):
        child.write(time + step / 10, b"y" * 2_000_000, child.log)
    child.ends_at = time + 1
    child.write(time + 1, line(state="done", item=item))


def flood(child: FakeChild, time: float) -> None:
    """Write without end into the journal."""
    for step in range(30):
        child.write(time + step / 10, b"z" * 1_000_000 + b"\n")
    child.ends_at, child.code = float("inf"), None


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture(autouse=True)
def removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Keep the session away from this tree's libraries and build folder; return when the libraries were removed."""
    times: list[str] = []
    monkeypatch.setattr(library, "install", lambda: "")
    monkeypatch.setattr(library, "remove", lambda: times.append("removed"))
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    return times


def rehearse(host: FakeHost, out: Path, name: str = "first-hour") -> int:
    code = command_line.run(name, out, plan.SESSION_SECONDS, host=host)
    assert host.time <= plan.SESSION_SECONDS, "the session ends in time, whatever happens"
    files = sorted(file.name for file in out.iterdir())
    assert files == ["progress.txt", "results.jsonl", "results.tar.gz", "summary.txt"]
    assert (out / "results.tar.gz").stat().st_size <= archive.ARCHIVE_BYTES
    for record in results(out):
        assert record["state"] == "result" and record["stage"] and record["seconds"] >= 0
    return code


def results(out: Path) -> list[dict]:
    return [json.loads(one) for one in (out / "results.jsonl").read_text().splitlines()]


def measured_stages(out: Path) -> set[str]:
    return {record["stage"] for record in results(out)}


def left_out(out: Path) -> list[str]:
    summary = (out / "summary.txt").read_text()
    if summary.startswith("nothing was left out"):
        return []
    first = summary.split("\n\n")[0].splitlines()
    assert first[0] == "left out:"
    return [one.removeprefix("- ") for one in first[1:]]


NAMES = [stage.name for stage in plan.FIRST_HOUR]
CUDA_STAGES = {stage.name for stage in plan.FIRST_HOUR if "cuda" in stage.needs}


def test_stages_run_in_order_of_value(host: FakeHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    host.behaviors["warm-compile", "*"] = slow(70)
    assert rehearse(host, out) == 0
    assert host.stages() == NAMES
    assert left_out(out) == []
    assert measured_stages(out) == set(NAMES) - {"warm-compile"}
    starts = {stage: time for time, stage, _ in reversed(host.started)}
    ends = [child.ends_at for child in host.children if child.stage.startswith("warm-")]
    assert starts["warm-compile"] < starts["smoke-triton"] + 1, "compilation runs beside the smoke tests"
    assert starts["op"] >= max(ends), "timed stages have the GPU to themselves"
    printed = capsys.readouterr().out.rstrip().splitlines()
    assert printed[-1].endswith(f"minutes; results in {out}")
    assert "resnet50 train 256x224x224" in "\n".join(printed[-30:]), "the table of the networks is last"
    with tarfile.open(out / "results.tar.gz") as packed:
        names = packed.getnames()
    assert names[:3] == ["results.jsonl", "summary.txt", "progress.txt"]
    assert not any(name.endswith("-0.jsonl") for name in names)


def test_plans_fit_their_session_and_their_names_are_unique() -> None:
    for stages in plan.PLANS.values():
        names = [stage.name for stage in stages]
        assert len(set(names)) == len(names)
        assert all(stage.item_seconds > 0 and stage.seconds <= 240 for stage in stages)
        assert all(set(stage.needs) <= set(plan.FEATURES) for stage in stages)
    assert plan.SESSION_SECONDS + 30 < 600 - 30, "the device tool ends a command after 600 s"
    forced = [name for stage in plan.FIRST_HOUR for name in stage.settings.only if "fused" in name]
    assert not forced, "forced kernels only in `conv`"


def test_results_are_written_as_they_come(host: FakeHost, tmp_path: Path) -> None:
    """A session that is killed leaves what it had measured."""

    class KilledError(Exception):
        pass

    def sleep(seconds: float) -> None:
        host.time += seconds
        if host.time > 60:
            raise KilledError

    host.sleep = sleep  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        command_line.run("first-hour", tmp_path / "out", plan.SESSION_SECONDS, host=host)
    assert {"environment", "smoke-triton"} <= measured_stages(tmp_path / "out")


# Injected failures


@pytest.mark.parametrize("built", [False, True])
def test_without_a_cuda_library(host: FakeHost, tmp_path: Path, built: bool, removed: list[str]) -> None:
    """It is built for one architecture while the Triton stages run; without it, everything else runs."""
    host.behaviors["environment", "cuda"] = fail("the library of CUDA kernels is unavailable: no record")
    host.command_code = 0 if built else 1
    assert rehearse(host, tmp_path / "out") == 0
    assert removed == ["removed"]
    (build,) = (command for _, _, command in host.started if "build_ext" in command)
    assert build[-1] == "--inplace"
    reasons = left_out(tmp_path / "out")
    assert "environment: cuda: the library of CUDA kernels is unavailable: no record" in reasons
    assert set(NAMES) - CUDA_STAGES <= measured_stages(tmp_path / "out")
    if built:
        assert measured_stages(tmp_path / "out") >= CUDA_STAGES
    else:
        assert not CUDA_STAGES & measured_stages(tmp_path / "out")
        for stage in CUDA_STAGES:
            assert f"{stage}: cuda: the build failed: exit code 1: nvcc: error" in reasons


def test_stages_that_came_before_the_library_are_completed(
    host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [stage for stage in plan.FIRST_HOUR if stage.name in ("environment", "op", "smoke-cuda")]
    monkeypatch.setitem(plan.PLANS, "first-hour", tuple(stages))
    host.behaviors["environment", "cuda"] = fail("no record")
    assert rehearse(host, tmp_path / "out") == 0
    assert host.stages() == ["environment", "build-library", "op", "library", "smoke-cuda", "op-cuda"]
    (command,) = (command for _, stage, command in host.started if stage == "op-cuda")
    assert Settings.from_json(command[command.index("--settings") + 1]).backend == "cuda"


def test_library_that_crashes_the_interpreter(host: FakeHost, tmp_path: Path, removed: list[str]) -> None:
    """It is deleted, because fused_res would open it in every stage, and the environment is checked again."""
    for item in ("fused_res", "triton", "cuda"):
        host.behaviors["environment", item] = crash(-11, "Segmentation fault")
    assert rehearse(host, tmp_path / "out") == 0
    assert removed
    assert "environment: fused_res: ended by signal 11: Segmentation fault" in left_out(tmp_path / "out")
    assert set(NAMES) <= measured_stages(tmp_path / "out")


def test_own_libraries_are_never_deleted(
    host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: list[str]
) -> None:
    monkeypatch.setattr(library, "install", lambda: "there are none")
    host.behaviors["environment", "cuda"] = fail("no record")
    assert rehearse(host, tmp_path / "out") == 0
    host = FakeHost()
    for item in ("fused_res", "triton", "cuda"):
        host.behaviors["environment", item] = crash(-11, "Segmentation fault")
    assert rehearse(host, tmp_path / "out") == 0
    assert removed == []


def test_tool_that_finds_errors_is_reported(host: FakeHost, tmp_path: Path) -> None:
    """Its exit code is all that tells of them: every check passed."""
    original = FakeHost.start

    def start(self: FakeHost, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> FakeChild:
        child = original(self, command, log, environment)
        if command[0] == "compute-sanitizer" and "memcheck" in command:
            child.write(child.ends_at, b"========= ERROR SUMMARY: 2 errors\n", log)
            child.code = 1
        return child

    host.start = start.__get__(host)  # type: ignore[method-assign]
    assert rehearse(host, tmp_path / "out", "more") == 0
    assert left_out(tmp_path / "out") == ["memcheck-cuda: exit code 1: ========= ERROR SUMMARY: 2 errors"]


def test_illegal_access_ends_one_worker(host: FakeHost, tmp_path: Path) -> None:
    host.behaviors["smoke-cuda", "weight gradient"] = crash()
    assert rehearse(host, tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == [f"smoke-cuda: weight gradient: ended by signal 6: {ILLEGAL_ACCESS}"]
    checked = {record["item"] for record in results(tmp_path / "out") if record["stage"] == "smoke-cuda"}
    assert checked == set(ITEMS["smoke"]) - {"weight gradient"}
    restarted = [command for _, stage, command in host.started if stage == "smoke-cuda" and "--skip" in command]
    assert len(restarted) == 1 and restarted[0][-2:] == ["--skip", "weight gradient"]


def test_item_that_hangs(host: FakeHost, tmp_path: Path) -> None:
    """It is stopped, and a fresh worker measures the remaining items."""
    host.behaviors["conv", "1x1"] = hang
    assert rehearse(host, tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == ["conv: 1x1: stopped after 30 s without a result"]
    hung = next(child for child in host.children if child.stage == "conv")
    assert hung.killed_at is not None and hung.killed_at - 30 == pytest.approx(
        host.started_at("conv") + START_SECONDS, abs=1
    )
    assert [record["item"] for record in results(tmp_path / "out") if record["stage"] == "conv"] == ["3x3"]


def test_stage_that_hangs_past_its_deadline(host: FakeHost, tmp_path: Path) -> None:
    stage = next(stage for stage in plan.FIRST_HOUR if stage.name == "train-256-compile")
    host.behaviors[stage.name, "*"] = hang
    assert rehearse(host, tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == [f"{stage.name}: compile-channels-last: the stage's 90 s were over"]
    (hung,) = (child for child in host.children if child.stage == stage.name)
    assert hung.killed_at == pytest.approx(host.started_at(stage.name) + stage.seconds, abs=1)
    assert set(NAMES) - {stage.name} <= measured_stages(tmp_path / "out")


def test_everything_hangs(host: FakeHost, tmp_path: Path) -> None:
    for stage in plan.FIRST_HOUR[1:]:
        host.behaviors[stage.name, "*"] = hang
    assert rehearse(host, tmp_path / "out") == 0
    assert host.time > plan.SESSION_SECONDS - 30
    assert {one.partition(":")[0] for one in left_out(tmp_path / "out")} == set(NAMES) - {"environment"}
    assert all(child.killed_at is not None for child in host.children if child.code is None)
    assert any(one.endswith(("no time was left", "the session's time was over")) for one in left_out(tmp_path / "out"))


def test_garbage_in_journal_and_log(host: FakeHost, tmp_path: Path) -> None:
    host.behaviors["op", "stem"] = garbage
    assert rehearse(host, tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == ["op: 5 unreadable lines of its journal"]
    log = tmp_path / "build" / "gpu-work" / "op-0.log"
    assert log.stat().st_size <= 2 * LOG_BYTES + 2_000_000
    assert [record["item"] for record in results(tmp_path / "out") if record["stage"] == "op"] == ["layer1"]


def test_journal_without_end(host: FakeHost, tmp_path: Path) -> None:
    host.behaviors["op", "stem"] = flood
    assert rehearse(host, tmp_path / "out") == 0
    assert "op: stem: its journal is too large" in left_out(tmp_path / "out")
    assert "op: layer1: not started: its journal is too large" in left_out(tmp_path / "out")
    assert "conv" in measured_stages(tmp_path / "out")


def test_profiler_is_missing(host: FakeHost, tmp_path: Path) -> None:
    host.missing.add("ncu")
    assert rehearse(host, tmp_path / "out") == 0
    message = "cannot be started: No such file or directory: 'ncu'"
    assert left_out(tmp_path / "out") == [f"ncu-cuda: {message}", f"ncu-triton: {message}"]


def test_out_of_memory_costs_one_provider(host: FakeHost, tmp_path: Path) -> None:
    host.behaviors["train-256", "ours+graph"] = fail("OutOfMemoryError: CUDA out of memory", code=3)
    assert rehearse(host, tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == ["train-256: ours+graph: OutOfMemoryError: CUDA out of memory"]
    stage = next(stage for stage in plan.FIRST_HOUR if stage.name == "train-256")
    measured = [record["item"] for record in results(tmp_path / "out") if record["stage"] == "train-256"]
    assert measured == [name for name in stage.settings.only if name != "ours+graph"]


def test_worker_that_cannot_start_is_not_restarted_for_ever(host: FakeHost, tmp_path: Path) -> None:
    original = FakeHost.start

    def start(self: FakeHost, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> FakeChild:
        child = original(self, command, log, environment)
        if getattr(child, "stage", "") == "op":
            child.script = [(self.time, log, b"ImportError: no module\n")]
            child.ends_at, child.code = self.time + 1, 1
        return child

    host.start = start.__get__(host)  # type: ignore[method-assign]
    assert rehearse(host, tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == ["op: exit code 1: ImportError: no module"]
    assert sum(stage == "op" for _, stage, _ in host.started) == 1


def test_no_gpu_is_the_one_failure_of_the_session(host: FakeHost, tmp_path: Path) -> None:
    host.behaviors["environment", "gpu"] = fail("no NVIDIA GPU is available to this torch")
    assert rehearse(host, tmp_path / "out") == 1
    assert host.stages() == ["environment"]
    assert "op: gpu: no NVIDIA GPU is available to this torch" in left_out(tmp_path / "out")


def test_chosen_stages(host: FakeHost, tmp_path: Path) -> None:
    assert command_line.run("first-hour", tmp_path / "out", plan.SESSION_SECONDS, only=["conv", "op"], host=host) == 0
    assert host.stages() == ["environment", "op", "conv"]


def test_interrupted_session_ends_its_processes(host: FakeHost, tmp_path: Path) -> None:
    def sleep(seconds: float) -> None:
        host.time += seconds
        if host.time > 20:
            raise KeyboardInterrupt

    host.sleep = sleep  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        command_line.run("first-hour", tmp_path / "out", plan.SESSION_SECONDS, host=host)
    assert all(child.killed_at == host.time for child in host.children if child.ends_at > host.time)


def test_full_disk(host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Everything is printed, too."""
    original = Path.open

    def full(self: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        if mode == "a" and self.parent == tmp_path / "out":
            raise OSError(28, "No space left on device")
        return original(self, mode, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(archive.tarfile, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert command_line.run("first-hour", tmp_path / "out", plan.SESSION_SECONDS, host=host) == 0
    printed = capsys.readouterr().out
    assert "resnet50 train 256x224x224, ours+graph: 30.000 ms" in printed
    assert "left out of the archive: results.tar.gz: [Errno 28] No space left" in printed


def test_more_runs_what_takes_longer(host: FakeHost, tmp_path: Path) -> None:
    assert rehearse(host, tmp_path / "out", "more") == 0
    assert host.stages() == [stage.name for stage in plan.MORE]
    sanitizer = next(command for _, stage, command in host.started if stage == "memcheck-cuda")
    assert sanitizer[0] == "compute-sanitizer" and "benchmarks.gpu.worker" in sanitizer and "pytest" not in sanitizer


@pytest.fixture
def predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(summary, "PREDICTIONS", tmp_path / "predictions.json")
    summary.predictions.cache_clear()
    yield tmp_path / "predictions.json"
    summary.predictions.cache_clear()


def test_results_are_printed_against_the_predictions(
    host: FakeHost, tmp_path: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"resnet50 train 256x224x224": {"ours+graph": 24.0}}
    milliseconds = {
        "train": train,
        "op": {"stem": {"eager-channels-last": 4.0}, "layer1": {"eager-channels-last": 1.0}},
    }
    predictions.write_text(json.dumps({"milliseconds": milliseconds}))
    assert rehearse(host, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "resnet50 train 256x224x224, ours+graph: 30.000 ms (predicted 24.000, 1.25x)" in printed
    rows = [row.split() for row in printed.splitlines()]
    case = ["resnet50", "train", "256x224x224"]
    assert [*case, "ours+graph", "30.00", "8000", "1.00x", "24.00", "1.25", "nan"] in rows
    # Two cases, each twice in the network, of 2 ms; ratios of 0.5 and 2.
    assert ["eager-channels-last", "2", "8.000", "1.000", "1.000", "2.00", "layer1"] in rows


@pytest.mark.parametrize("text", ["{", "[]", '{"milliseconds": []}'])
def test_unreadable_predictions_are_no_predictions(text: str, predictions: Path) -> None:
    predictions.write_text(text)
    assert summary.predicted("op", "stem", "cudnn") is None


# Parts


def test_archive_leaves_out_the_least_valuable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "FILE_BYTES", 60_000)
    files = [tmp_path / name for name in ("results", "summary", "profile", "log", "huge")]
    noise = bytes((index * index * 2654435761 >> 13) & 255 for index in range(70_000))
    for file, size in zip(files, (1000, 2000, 30_000, 50_000, 70_000), strict=True):
        file.write_bytes(noise[:size])
    left_out = archive.write_archive(tmp_path / "out.tar.gz", files, limit=40_000)
    assert left_out == ["huge: 0 MiB", "log: the archive would exceed 0 MB"]
    with tarfile.open(tmp_path / "out.tar.gz") as packed:
        assert packed.getnames() == ["results", "summary", "profile"]
    assert (tmp_path / "out.tar.gz").stat().st_size <= 40_000


def test_session_imports_only_the_standard_library() -> None:
    """A broken torch, or an extension that crashes when it is imported, ends a worker and not the session."""
    code = "import benchmarks.gpu.__main__, sys; assert not {'torch', 'numpy', 'fused_res'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=host_module.ROOT, check=True)


def test_journal_of_parallel_writers(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    reader, writers = journal.JournalReader(path), [journal.Journal(path) for _ in range(2)]
    assert reader.read() == []
    for index in range(3):
        writers[index % 2].write({"state": "result", "item": str(index)})
    with path.open("ab") as file:
        file.write(b'{"state": "res')
    assert [record["item"] for record in reader.read()] == ["0", "1", "2"]
    with path.open("ab") as file:
        file.write(b'ult", "item": "3"}\n')
    assert [record["item"] for record in reader.read()] == ["3"]
    assert reader.unreadable == 0


def test_settings_travel_as_json() -> None:
    settings = Settings(backend="cuda", batch=64, only=("a", "b"), small=True)
    assert Settings.from_json(settings.to_json()) == settings
    assert dataclasses.replace(settings, rehearse=True).device == "cpu" and settings.device == "cuda"
