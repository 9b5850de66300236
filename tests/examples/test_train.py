"""examples/train.py: interrupted runs resume bit-identically, and training matches plain PyTorch."""

import csv
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import checkpoint, data, networks, train
from examples.checkpoint import file_name
from examples.schedule import lr_factor
from examples.trainer import Trainer
from fused_res.testing import stub_torchvision_operators
from tests.support.distributed_workers import run_ranks

pytest.importorskip("sklearn")

SCRIPT = Path(train.__file__)
#: Six steps an epoch, the last of 157 images.
SMALL = ["--model", "cifar_resnet8", "--width", "8", "--batch-size", "256", "--warmup-epochs", "1", "--threads", "1"]
QUIET = ["--no-tensorboard"]
LAST = 3 * 6
#: Measured times, which differ from run to run.
TIMES = {"seconds", "images_per_second"}


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(out: Path, *arguments: str, expected: int = 0) -> None:
    status = train.main([*SMALL, *QUIET, "--epochs", "3", "--out", str(out), *arguments])
    assert status == expected


def state(out: Path, step: int = LAST) -> dict[str, Any]:
    return torch.load(out / file_name(step), weights_only=True)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def differences(actual: Any, expected: Any, path: str = "") -> list[str]:
    """Return the paths at which two states are not bit-identical, apart from measured times."""
    if isinstance(expected, Tensor):
        return [] if torch.equal(actual, expected) else [path]
    if isinstance(expected, dict):
        if list(actual) != list(expected):
            return [f"{path}: {list(actual)}"]
        pairs = [(key, actual[key], expected[key]) for key in expected if key not in TIMES]
    elif isinstance(expected, list):
        pairs = list(zip(itertools.count(), actual, expected, strict=False))
        if len(actual) != len(expected):
            return [f"{path}: {len(actual)}"]
    else:
        return [] if actual == expected else [f"{path}: {actual} != {expected}"]
    return [found for key, mine, other in pairs for found in differences(mine, other, f"{path}.{key}")]


def assert_same_run(actual: Path, expected: Path, step: int = LAST) -> None:
    assert not differences(state(actual, step), state(expected, step))
    assert rows(actual) == rows(expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with a checkpoint at every step and every kind of state in it."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(out, *EVERYTHING, "--checkpoint-every", "1", "--keep", "100")
    return out


EVERYTHING = ["--ema", "0.9", "--label-smoothing", "0.1", "--accumulate", "2"]


# Interrupted runs


@pytest.mark.parametrize("step", [1, 6, 11, 12, 16])
def test_killed_run_resumes_bit_identically(tmp_path: Path, undisturbed: Path, step: int) -> None:
    shutil.copy(undisturbed / file_name(step), tmp_path)
    shutil.copy(undisturbed / "log.csv", tmp_path)  # has rows of epochs that the resumed run has not completed
    torch.manual_seed(1234)  # the resumed process starts with another random state
    run(tmp_path, *EVERYTHING)
    assert_same_run(tmp_path, undisturbed)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_gradient_scaler_state_is_resumed(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(whole, "--amp", "fp16", "--epochs", "2", "--checkpoint-every", "8", "--keep", "9")
    resumed.mkdir()
    shutil.copy(whole / file_name(8), resumed)
    assert state(whole, 8)["scaler"]["_growth_tracker"] > 0
    run(resumed, "--amp", "fp16", "--epochs", "2")
    assert_same_run(resumed, whole, 12)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("method", "calls", "saved"), [("_train_step", 9, 9), ("_compute_logits", 27, 12)])
def test_signal_finishes_the_step_and_saves(
    tmp_path: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    method: str,
    calls: int,
    saved: int,
) -> None:
    """In the middle of a step, and of the evaluation after epoch 2.

    Call 27 of `_compute_logits`: twelve steps of two micro-batches, two test batches after epoch 1, the first after 2.
    """
    original, done = getattr(Trainer, method), itertools.count(1)

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        if next(done) == calls:
            signal.raise_signal(number)
        return original(self, *arguments)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, interrupted)
        run(tmp_path, *EVERYTHING, "--resume", "never")
    assert signal.getsignal(number) is before
    assert f"stopped by a signal after step {saved} of 18" in capsys.readouterr().out
    assert checkpoint.newest_first(tmp_path)[0].name == file_name(saved)
    assert state(tmp_path, saved)["epoch"] == 1  # an interrupted evaluation is repeated
    run(tmp_path, *EVERYTHING)
    assert_same_run(tmp_path, undisturbed)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with status {process.returncode} before it could be interrupted"
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def started(command: list[str], out: Path, *arguments: str, small: Sequence[str] = SMALL) -> Iterator[subprocess.Popen]:
    """Start the script by its path from another folder, and terminate it when the block ends."""
    process = subprocess.Popen(
        [*command, str(SCRIPT), *small, *QUIET, "--out", str(out), *arguments],
        cwd=out.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun terminates its workers


def finish(process: subprocess.Popen) -> str:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout


def test_sigterm_exits_with_status_0(tmp_path: Path) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    with started([sys.executable], out, "--epochs", "16") as process:
        wait_for(lambda: checkpoint.newest_first(out), process)
        process.send_signal(signal.SIGTERM)
        assert "stopped by a signal after step" in finish(process)
    assert checkpoint.newest_first(out)[0].name < file_name(96)
    for folder in (out, expected):
        run(folder, "--epochs", "16")
    assert_same_run(out, expected, 96)


def test_non_finite_loss_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--lr", "1e30", expected=1)
    error = capsys.readouterr().err
    assert "train.py: the loss is nan in epoch 1, step 2, at a learning rate of 3.333e+29" in error
    assert not checkpoint.newest_first(tmp_path)


def test_non_finite_weights_are_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._train_step

    def corrupt_weight(self: Trainer, batch: data.Batch) -> Tensor:
        sums = original(self, batch)  # finite: a step's loss is computed from the weights before its update
        if self.step == 8:
            self.model.fc.bias.data[3] = math.nan
        return sums

    monkeypatch.setattr(Trainer, "_train_step", corrupt_weight)
    run(tmp_path, "--checkpoint-every", "3", expected=1)
    assert "fc.bias is not finite in epoch 2, step 9, at" in capsys.readouterr().err
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == [file_name(6), file_name(3)]


def test_steps_skipped_by_the_gradient_scaler_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: GradScaler(*a, **k, init_scale=2.0**40))
    run(tmp_path, "--amp", "fp16", "--epochs", "6")
    saved = state(tmp_path, 36)
    assert saved["scaler"]["scale"] < 2.0**40  # halved with each skipped step
    assert saved["model"]["bn1.num_batches_tracked"] == 36 and float(rows(tmp_path)[-1]["test_error"]) < 0.9


GradScaler = torch.amp.GradScaler


# Checkpoints


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_damaged_checkpoint_is_skipped(tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (7, 9):
        shutil.copy(undisturbed / file_name(step), tmp_path)
    damage(tmp_path / file_name(9))
    run(tmp_path, *EVERYTHING, "--keep", "1")
    output = capsys.readouterr().out
    assert f"{file_name(9)} is truncated" in output and f"resuming from {tmp_path / file_name(7)}" in output
    assert_same_run(tmp_path, undisturbed)
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == [file_name(LAST)]


def test_only_damaged_checkpoints_raise(tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(undisturbed / file_name(7), tmp_path)
    damage(tmp_path / file_name(7))
    run(tmp_path, *EVERYTHING, expected=1)
    assert "train.py: all 1 checkpoints in" in capsys.readouterr().err
    run(tmp_path, *EVERYTHING, "--resume", str(tmp_path / file_name(7)), expected=1)
    assert "is truncated" in capsys.readouterr().err
    run(tmp_path, *EVERYTHING, "--resume", "never")
    assert_same_run(tmp_path, undisturbed)


def test_run_resumes_from_a_named_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    # Later checkpoints in the folder are of another run and are removed.
    for step in (14, 17):
        (tmp_path / file_name(step)).write_bytes(b"of another branch")
    run(tmp_path, *EVERYTHING, "--resume", str(undisturbed / file_name(8)), "--checkpoint-every", "5")
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == [file_name(LAST), file_name(15)]
    assert_same_run(tmp_path, undisturbed)


def test_other_settings_raise(tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(undisturbed / file_name(7), tmp_path)
    run(tmp_path, *EVERYTHING, "--lr", "0.25", "--seed", "3", expected=1)
    error = capsys.readouterr().err
    assert "other settings (lr was 0.1, is 0.25; seed was 0, is 3)" in error and "--out" in error


def test_finished_run_is_not_repeated(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(undisturbed / file_name(LAST), tmp_path)
    run(tmp_path, *EVERYTHING)
    assert rows(tmp_path) == rows(undisturbed)
    assert f"{1 - float(rows(tmp_path)[-1]['test_error']):.2%} of 360 test images" in capsys.readouterr().out


# Numerical results


def test_learning_rate_warms_up_linearly_and_decays_to_zero() -> None:
    rates = [0.4 * lr_factor(step, 100, 20) for step in range(100)]
    assert rates[0] == pytest.approx(0.02) and rates[19] == rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.2) and 0 < rates[99] < 0.001
    assert lr_factor(0, 10, 0) == 1


def test_steps_match_sgd_on_the_mean_loss(undisturbed: Path) -> None:
    """Compared with plain PyTorch, written from the formulas, with stock layers."""
    torch.manual_seed(0)
    model = networks.build("cifar_resnet8", 10, 8)
    networks.set_fusion(model, False, "auto", "none")
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    velocity = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    # Only two steps: later, ReLU inputs that are zero up to rounding can have different masks.
    for step, batch in enumerate(itertools.islice(data.load("digits").train_loader(256).batches(), 2)):
        for part in range(2):
            outputs = model(batch.images.tensor_split(2)[part])
            target = F.one_hot(batch.labels.tensor_split(2)[part], 10) * 0.9 + 0.01
            (-(F.log_softmax(outputs, 1) * target).sum() / 256).backward()
        with torch.no_grad():
            for name, value in model.named_parameters():
                decay = 0.0 if value.dim() == 1 else 5e-4
                velocity[name] = 0.9 * velocity[name] + value.grad + decay * value
                value -= 0.1 * (step + 1) / 6 * velocity[name]
                value.grad = None
        for name, value in state(undisturbed, step + 1)["model"].items():
            change, expected = (other.double() - initial[name] for other in (value, model.state_dict()[name]))
            rounding = 1e-7 * initial[name].double().norm()
            assert (change - expected).norm() <= 1e-3 * expected.norm() + rounding, (step, name)


def test_ema_of_the_weights_is_exponential_and_is_evaluated(undisturbed: Path) -> None:
    average: dict[str, Tensor] = {}
    for step in range(1, LAST + 1):
        saved = state(undisturbed, step)
        for name, value in saved["model"].items():
            if value.is_floating_point():
                average[name] = 0.9 * average[name] + 0.1 * value.double() if step > 1 else value.double()
                found = saved["average"][f"module.{name}"]
                assert torch.allclose(found.double(), average[name], rtol=1e-4, atol=1e-6), (step, name)

    model = networks.build("cifar_resnet8", 10, 8)
    saved = {name.removeprefix("module."): value for name, value in state(undisturbed)["average"].items()}
    saved.pop("n_averaged")
    model.load_state_dict(saved)
    (batch,) = data.load("digits").test_loader(360).batches()
    outputs = model.eval()(batch.images)
    assert float(rows(undisturbed)[-1]["test_loss"]) == pytest.approx(F.cross_entropy(outputs, batch.labels).item())
    errors = int((outputs.argmax(1) != batch.labels).sum())
    assert float(rows(undisturbed)[-1]["test_error"]) == errors / 360


#: A network without batch norm, so that micro-batches, and the shards of several processes, add up to the batch.
NORMLESS = ["--model", "timm/test_convnext", "--image-size", "32", "--epochs", "1", "--batch-size", "718"]


def without_width(arguments: list[str]) -> list[str]:
    return [value for value in arguments if value not in ("--width", "8")]


@pytest.fixture(scope="module")
def normless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of 718 images, and one of a single image."""
    stub_torchvision_operators()  # timm imports torchvision
    pytest.importorskip("timm")
    out = tmp_path_factory.mktemp("normless")
    assert train.main([*without_width(SMALL), *QUIET, *NORMLESS, "--out", str(out)]) == 0
    return out


def assert_close_run(actual: Path, expected: Path, step: int) -> None:
    for name, value in state(actual, step)["model"].items():
        other = state(expected, step)["model"][name]
        assert (value - other).abs().max() <= 1e-4 * other.abs().max() + 1e-6, name
    for mine, other in zip(rows(actual), rows(expected), strict=True):
        assert {name: float(value) for name, value in mine.items()} == pytest.approx(
            {name: float(value) for name, value in other.items()}, rel=1e-4
        )


def test_gradient_accumulation_matches_the_full_batch(tmp_path: Path, normless: Path) -> None:
    assert train.main([*without_width(SMALL), *QUIET, *NORMLESS, "--accumulate", "3", "--out", str(tmp_path)]) == 0
    assert_close_run(tmp_path, normless, 3)


@pytest.mark.parametrize(
    "other", [["--recompute", "conv"], ["--checkpoint-blocks"], ["--log-every", "1"], ["--keep", "1"]], ids=" ".join
)
def test_memory_and_logging_options_do_not_change_results(tmp_path: Path, undisturbed: Path, other: list[str]) -> None:
    run(tmp_path, *EVERYTHING, *other)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("other", [["--no-fuse"], ["--backend", "reference"], ["--no-channels-last"]], ids=" ".join)
def test_other_kernels_match_within_tolerance(tmp_path: Path, undisturbed: Path, other: list[str]) -> None:
    run(tmp_path, *EVERYTHING, *other)
    for row, other in zip(rows(tmp_path), rows(undisturbed), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=2e-3)


def test_bfloat16_training_converges(tmp_path: Path) -> None:
    exact, half = tmp_path / "exact", tmp_path / "half"
    for out, amp in ((exact, "off"), (half, "bf16")):
        run(out, "--epochs", "6", "--amp", amp)
    assert rows(half) != rows(exact)
    assert state(half, 36)["model"]["conv1.weight"].dtype == torch.float32
    assert float(rows(half)[-1]["test_error"]) < 0.3


def test_tensorboard_has_each_point_once_after_resume(tmp_path: Path, undisturbed: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # the second run resumes from step 8
        run(tmp_path, *EVERYTHING, "--tensorboard", "--checkpoint-every", "8", "--keep", "9")
        for step in (12, 16, 18):
            (tmp_path / file_name(step)).unlink()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("test/error")]
    assert found == [(int(row["step"]), pytest.approx(float(row["test_error"]))) for row in rows(undisturbed)]
    assert [event.step for event in events.Scalars("train/loss")] == [6, 10, 12, 18]


def test_default_recipe_converges_on_digits(tmp_path: Path) -> None:
    """The default recipe for 12 epochs: about 12 s on one core."""
    arguments = ["--epochs", "12", "--threads", "1", *QUIET, "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    assert float(rows(tmp_path)[-1]["test_error"]) <= 0.02


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: expected an integer of at least 1, got '0'"),
        (["--lr", "nan"], "--lr: expected a number of at least 0"),
        (["--momentum", "1"], "--momentum: expected a number of at least 0 and below 1"),
        (["--device", "cuda:99"], "--device: cuda:99: PyTorch found"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda"),
        (["--no-fuse", "--recompute", "norm"], "--recompute norm: .* --no-fuse"),
        (["--fsdp"], "--fsdp: start it with torchrun"),
        (["--warmup-epochs", "9", "--epochs", "3"], "--warmup-epochs 9: exceeds --epochs 3"),
        (["--resume", "nowhere.pt"], "--resume nowhere.pt: expected auto, never or an existing file"),
        (["--out", str(SCRIPT)], "--out .*: is not a folder"),
        (["--amp", "int8"], "--amp: invalid choice"),
    ],
)
def test_error_names_the_invalid_option(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        train.main(arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: expected an existing folder"),
        (["--model", "cifar_resnet9"], "--model cifar_resnet9: depth must be 6n"),
        (["--model", "lenet"], "--model lenet: expected cifar_resnet<depth>"),
        (["--model", "torchvision/lenet"], "--model torchvision/lenet: Unknown model"),
        (["--model", "resnet18", "--width", "8"], "--width: expected a cifar_resnet"),
        (["--model", "torchvision/resnet18", "--plain"], "--plain: expected a network of fused_res"),
        (["--model", "torchvision/alexnet", "--checkpoint-blocks"], "--checkpoint-blocks: AlexNet has no residual"),
    ],
)
def test_missing_data_or_model_fails_before_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert train.main([*arguments, *QUIET, "--out", str(tmp_path / "out")]) == 1
    assert f"train.py: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert "torchrun --nproc-per-node" in printed and "--checkpoint-every STEPS" in printed


# Distributed training


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]


def run_many(processes: int, out: Path, *arguments: str, small: Sequence[str] = SMALL) -> None:
    """Train with `processes` processes, started as torchrun would."""
    run_ranks(processes, train.main, [*small, *QUIET, "--out", str(out), *arguments])


def test_two_processes_match_one(tmp_path: Path, normless: Path) -> None:
    """The last batch is a single image, so one process has none, and most of its micro-batches are empty."""
    out = tmp_path / "out"
    run_many(2, out, *NORMLESS, "--accumulate", "2", small=without_width(SMALL))
    assert_close_run(out, normless, 3)


@pytest.mark.parametrize(("processes", "kind"), [(4, "--ddp"), (2, "--fsdp")])
def test_sync_batch_norm_matches_one_process(tmp_path: Path, processes: int, kind: str) -> None:
    """The last batch is a single image again: the other processes contribute no elements to its statistics."""
    arguments = ["--batch-size", "718", "--lr", "0.02", "--sync-bn"]
    many, one = tmp_path / "many", tmp_path / "one"
    run_many(processes, many, "--epochs", "1", *arguments, kind)
    run(one, *arguments, "--epochs", "1")
    assert_close_run(many, one, 3)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in Linux's /proc")
def test_torchrun_restarts_and_resumes_after_a_killed_process(tmp_path: Path) -> None:
    disturbed, expected = tmp_path / "disturbed", tmp_path / "expected"
    arguments = ["--epochs", "12", "--checkpoint-every", "4", "--ema", "0.9"]
    with started(torchrun("--max-restarts", "1"), disturbed, *arguments) as process:
        wait_for(lambda: checkpoint.newest_first(disturbed), process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert f"resuming from {disturbed}" in finish(process)
    run_many(2, expected, *arguments)
    assert_same_run(disturbed, expected, 72)


def test_sharded_training_resumes_with_any_number_of_processes(tmp_path: Path) -> None:
    whole, resumed, alone = tmp_path / "whole", tmp_path / "resumed", tmp_path / "alone"
    arguments = ["--epochs", "2", "--ema", "0.9"]
    run_many(2, whole, *arguments, "--checkpoint-every", "4", "--keep", "9", "--fsdp")
    for out in (resumed, alone):
        out.mkdir()
        shutil.copy(whole / file_name(8), out)
    run_many(2, resumed, *arguments, "--fsdp")
    assert_same_run(resumed, whole, 12)
    run(alone, *arguments)
    # In a single process batch norm's statistics are of the full batch.
    assert [float(row["train_loss"]) for row in rows(alone)] == pytest.approx(
        [float(row["train_loss"]) for row in rows(whole)], rel=0.05
    )


def test_torchrun_forwards_a_signal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(torchrun(), out, "--epochs", "200") as process:
        wait_for(lambda: checkpoint.newest_first(out), process)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=120)  # torchrun itself exits with an error status
    assert "stopped by a signal after step" in stdout
    checkpoint.check(checkpoint.newest_first(out)[0])
