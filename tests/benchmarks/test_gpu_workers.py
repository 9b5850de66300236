"""The workers of `make gpu` from end to end, on tiny tensors on the CPU, and the processes that run them."""

import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

import fused_res
from benchmarks import timing
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import host, kernel_calls, library, plan, smoke_items, stand_in, train_items, worker
from benchmarks.gpu.journal import Journal, JournalReader, Record
from benchmarks.gpu.settings import Settings
from fused_res import backends

if torch.cuda.is_available():
    pytest.skip("a rehearsal of what a GPU runs", allow_module_level=True)

BACKENDS = [name for name in ("triton", "cuda") if fused_res.backends.unavailable(name) is None]


@pytest.fixture
def calls() -> Iterator[list[str]]:
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    with stand_in.stand_in() as recorded:
        yield recorded
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = flags
    torch.backends.cuda.matmul.allow_tf32 = False


def work(kind: str, tmp_path: Path, **settings: object) -> tuple[list[Record], list[str]]:
    """Run a worker in this process and return its results, and why items failed."""
    path = tmp_path / "journal"
    worker.work(worker.load(kind), Settings(rehearse=True, **settings), Journal(path))
    records = JournalReader(path).read()
    assert records[0]["state"] == "items" and records[-1]["state"] in ("done", "failed")
    failed = [f"{record['item']}: {record['reason']}" for record in records if record["state"] == "failed"]
    return [record for record in records if record["state"] == "result"], failed


def test_environment(tmp_path: Path, calls: list[str]) -> None:
    records, failed = work("environment", tmp_path)
    features = {record["feature"]: record["reason"] for record in records if "feature" in record}
    assert features == dict.fromkeys(("gpu", "fused_res", *BACKENDS), "")
    assert len(failed) == 2 - len(BACKENDS)
    assert any(record.get("copy_bytes_per_s", 0) > 0 and record["bf16_flops_per_s"] > 0 for record in records)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smoke(backend: str, tmp_path: Path, calls: list[str]) -> None:
    records, failed = work("smoke", tmp_path, backend=backend)
    assert failed == []
    assert [record["item"] for record in records] == smoke_items.items(Settings())
    assert calls.count("capture") == 1 and calls.count("replay") == 1 and calls.count("stream") >= 2
    assert calls.count("synchronize") >= len(records), "an asynchronous error is that of the item that caused it"
    operators = {call(kernel_calls.Operands(Settings(rehearse=True))).operator for call in kernel_calls.CALLS.values()}
    missing = set(fused_res.ops.SCHEMAS) - operators
    assert missing == {"batch_norm_stats", "batch_norm_act_apply"}, "these are the parts of batch_norm_act_forward"


def test_smoke_detects_wrong_results(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker reports them and goes on; any other error ends it, after it has reported it."""
    backend = BACKENDS[0]
    kernels = fused_res.backends.resolve(backend, torch.device("cpu"))
    forward = kernels.batch_norm_act_forward
    monkeypatch.setattr(kernels, "batch_norm_act_forward", lambda x, *rest: forward(1.01 * x, *rest))
    records, failed = work("smoke", tmp_path, backend=backend, only=("norm forward", "gradient sums"))
    (message,) = failed
    assert message.startswith("norm forward: batch_norm_act_forward, result ") and "expected at most" in message
    assert [record["item"] for record in records] == ["gradient sums"]

    def illegal_access(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(kernels, "batch_norm_sums", illegal_access)
    with pytest.raises(SystemExit) as caught:
        work("smoke", tmp_path, backend=backend, only=("gradient sums", "norm input gradient"))
    assert caught.value.code == 3
    last = JournalReader(tmp_path / "journal").read()[-1]
    assert last["reason"] == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_asynchronous_error_is_reported_for_its_item(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(SystemExit):
        work("smoke", tmp_path, backend=BACKENDS[0], only=("running statistics",))
    states = [(record["state"], record.get("reason")) for record in JournalReader(tmp_path / "journal").read()]
    assert states[-1] == ("failed", "RuntimeError: CUDA error: misaligned address")
    assert ("done", None) not in states


@pytest.mark.parametrize("warm", [True, False])
def test_op(warm: bool, tmp_path: Path, calls: list[str]) -> None:
    records, failed = work("op", tmp_path, only=("16x5x5 +add +relu",), warm=warm)
    assert failed == []
    if warm:
        assert records == [] and "sleep" not in calls
        return
    (record,) = records
    assert record["failures"] == {} and record["kind"] == "op" and record["count"] == 1
    assert set(record["providers"]) == {"eager-channels-last", *(f"ours-{backend}" for backend in BACKENDS)}
    assert calls.count("sleep") >= 10 * len(record["providers"]), "every call is queued after a sleep"


@pytest.mark.parametrize("warm", [True, False])
def test_conv(warm: bool, tmp_path: Path, calls: list[str]) -> None:
    item = "resnet50 layer1.0.conv1 1x1 64>64 8x8 +relu"
    records, failed = work("conv", tmp_path, only=(item,), warm=warm)
    assert failed == []
    if warm:
        assert records == [] and "sleep" not in calls
        return
    (record,) = records
    ours = {f"ours-{backend}{suffix}" for backend in BACKENDS for suffix in ("", "+stats")}
    assert record["failures"] == {} and set(record["providers"]) == {"aten", "aten-unfused", *ours}
    assert record["case"] == item and all(one["median_s"] > 0 for one in record["providers"].values())


def test_training(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.EventClock, "warm_up_calls", 1)
    preferences = []

    class Step(train_items.ModelStep):
        def step(self) -> torch.Tensor:
            preferences.append(backends.registry.conv_preference())
            return super().step()

    monkeypatch.setattr(train_items, "ModelStep", Step)
    names = ("eager-channels-last+graph", "ours-norms", "compile-reduce-overhead")
    records, failed = work("train", tmp_path, only=names)
    assert failed == []
    assert [record["item"] for record in records] == list(names)
    losses = [record["first_loss"] for record in records]
    assert losses == pytest.approx([losses[0]] * len(names), rel=1e-3), "equal weights and images"
    assert calls.count("capture") == 1 and "replay" in calls
    assert preferences.count("aten") == 1, "the settings of ours-norms hold for its first step"
    assert [call for call in calls if call.startswith("compile")] == ["compile reduce-overhead"]
    assert "sleep" not in calls, "a network is timed as it runs"
    for record in records:
        assert record["kind"] == "train" and record["images_per_s"] > 0
        assert set(record["providers"]) == {record["item"]}


def test_training_out_of_memory(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nMore")

    monkeypatch.setattr(train_items, "build_module", build)
    with pytest.raises(SystemExit):
        work("train", tmp_path, only=("ours+graph", "ours"))
    last = JournalReader(tmp_path / "journal").read()[-1]
    assert last["item"] == "ours+graph"
    assert last["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"


@pytest.mark.parametrize("backend", BACKENDS)
def test_profiled_kernels(backend: str, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on = kernel_calls.Call.on
    monkeypatch.setattr(kernel_calls.Call, "on", lambda *arguments: calls.append("run") or on(*arguments))
    records, failed = work("profile", tmp_path, backend=backend, only=("norm forward", "weight gradient"))
    assert failed == [] and len(records) == 2
    ranges = [call for call in calls if call != "synchronize"]
    assert ranges == 2 * ["run", "profiler start", "run", "profiler stop"], "kernels are compiled before the range"


def test_every_provider_of_the_plans_exists() -> None:
    from benchmarks.providers import NETWORK_PROVIDERS

    for stage in (*plan.FIRST_HOUR, *plan.MORE):
        if stage.kind == "train":
            assert set(stage.settings.only) <= set(NETWORK_PROVIDERS)
        elif stage.kind and stage.settings.only:
            assert set(stage.settings.only) <= set(worker.load(stage.kind).items(stage.settings))


# Processes


def test_local_processes(tmp_path: Path) -> None:
    """A killed process takes its descendants with it; one that ends leaves none."""
    local, log = host.LocalHost(), tmp_path / "log"
    code = "import subprocess, sys; c = subprocess.Popen(['sleep', '600']); print(c.pid, flush=True); {}"
    for last, kill in (("c.wait()", True), ("", False)):
        log.unlink(missing_ok=True)
        child = local.start([sys.executable, "-c", code.format(last)], log, {"VARIABLE": "value"})
        until = time.monotonic() + 20
        while not (log.exists() and log.read_text().endswith("\n")) or (not kill and child.poll() is None):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert child.poll() == (None if kill else 0)
        if kill:
            child.kill()
        grandchild = int(log.read_text())
        while not _ended(grandchild):
            assert time.monotonic() < until, "the descendant still runs"
            time.sleep(0.05)
    with pytest.raises(OSError, match="no-such-program"):
        local.start(["no-such-program"], log, {})


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_session_of_real_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A stage of real workers, one of a backend that is unavailable, and one whose process ends by a signal."""
    crash = plan.Stage("crash", needs=("gpu",), command=(sys.executable, "-c", "import os; os.abort()"))
    variables = {"FUSED_RES_SIMULATOR": "/missing"}
    settings = Settings(only=("cuda",))
    unavailable = plan.Stage("unavailable", "environment", 60, 60, settings, ("gpu",), environment=variables)
    monkeypatch.setitem(plan.PLANS, "first-hour", (plan.ENVIRONMENT, unavailable, crash))
    assert command_line.run("first-hour", tmp_path / "out", 120, rehearse=True) == 0
    printed = capsys.readouterr().out
    assert "left out: crash: ended by signal 6" in printed
    assert "left out: unavailable: cuda: FUSED_RES_SIMULATOR: /missing does not exist\n" in printed
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {record["feature"] for record in records if "feature" in record} >= {"gpu", "fused_res", *BACKENDS}
    assert (tmp_path / "out" / "results.tar.gz").stat().st_size > 0


@pytest.mark.full
def test_rehearsal(tmp_path: Path) -> None:
    assert command_line.run("first-hour", tmp_path / "out", 3000, rehearse=True) == 0
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "compile-reduce-overhead" in summary and "smoke-cuda: " in summary


# The carried library


def test_carried_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried, package = tmp_path / "carried", tmp_path / "package"
    carried.mkdir()
    package.mkdir()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert library.install(carried, package).endswith("has none (make gpu-library)")
    (carried / library.RECORD).write_text("{")
    assert "cannot be read" in library.install(carried, package)
    record = {"sources": library.source_digest(), "suffix": suffix}
    for name in ("_C", "_cuda"):
        (carried / f"{name}{suffix}").write_text("library")
        (carried / f"{name}{suffix}").with_suffix(".json").write_text("{}")
    for key, value, reason in (
        ("suffix", ".cpython-27.so", "they were built for another Python: .cpython-27.so, this one needs "),
        ("sources", "0", "the sources have changed since they were built (make gpu-library)"),
    ):
        (carried / library.RECORD).write_text(json.dumps({**record, key: value}))
        assert library.install(carried, package).startswith(reason) and not os.listdir(package)
    (carried / library.RECORD).write_text(json.dumps(record))
    assert library.install(carried, package) == ""
    assert set(os.listdir(package)) == set(os.listdir(carried)) - {library.RECORD}
    library.remove(package)
    assert os.listdir(package) == []


def test_digest_of_the_sources_changes_with_them(tmp_path: Path) -> None:
    for name in ("CMakeLists.txt", "setup.py", "cmake/nvcc.cmake", "csrc/cuda/norm.cuh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    digests = {library.source_digest(tmp_path)}
    (tmp_path / "csrc/cuda/norm.cuh").write_text("b")
    digests.add(library.source_digest(tmp_path))
    (tmp_path / "csrc/cuda/norm.cuh").rename(tmp_path / "csrc/cuda/other.cuh")
    digests.add(library.source_digest(tmp_path))
    assert len(digests) == 3
