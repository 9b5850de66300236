"""examples/checkpoint.py: writes are atomic, and damaged checkpoints are detected."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples import checkpoint
from examples.checkpoint import CheckpointError


def state(value: float = 1.0) -> dict[str, Any]:
    return {"model": {"weight": torch.full((300, 10), value)}, "step": 7, "rows": [{"loss": 0.1}], "none": None}


def saved(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / checkpoint.file_name(step) for step in steps]
    for path, step in zip(paths, steps, strict=True):
        checkpoint.save(state(step), path)
    return paths


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 3)
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["model"].pop("weight"), torch.full((300, 10), 3.0))
        assert loaded == {"model": {}, "step": 7, "rows": [{"loss": 0.1}], "none": None}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.9, 0.99, 0.9999])
def test_truncated_checkpoint_raises(tmp_path: Path, fraction: float) -> None:
    (path,) = saved(tmp_path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
        checkpoint.load(path)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_single_flipped_bit_raises(tmp_path: Path, where: float) -> None:
    (path,) = saved(tmp_path, 3)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} is (damaged|truncated)"):
        checkpoint.load(path)


def test_foreign_and_missing_files_raise(tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt"
    torch.save({"weight": torch.ones(3)}, plain)
    with pytest.raises(CheckpointError, match=r"plain\.pt is truncated or not a checkpoint"):
        checkpoint.load(plain)
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: No such file"):
        checkpoint.load(tmp_path / "nowhere.pt")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "objects.pt"
    checkpoint.save({"path": Path("x")}, path)
    with pytest.raises(CheckpointError, match=r"objects\.pt cannot be read"):
        checkpoint.load(path)


def test_latest_returns_the_newest_valid_checkpoint(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path, warnings.append) is None
    paths = saved(tmp_path, 10, 200, 3000)
    (tmp_path / "step-9999.txt").touch()
    assert checkpoint.newest_first(tmp_path) == paths[::-1]
    assert checkpoint.latest(tmp_path, warnings.append) == paths[2] and not warnings
    paths[2].write_bytes(paths[2].read_bytes()[:-9])
    assert checkpoint.latest(tmp_path, warnings.append) == paths[1]
    assert len(warnings) == 1 and paths[2].name in warnings[0] and "truncated" in warnings[0]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 3 checkpoints in .* are damaged"):
        checkpoint.latest(tmp_path, warnings.append)


def test_prune_retains_the_newest(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2, 3, 4)
    (tmp_path / f".{paths[3].name}.123.tmp").touch()  # left by a process that was killed while writing
    (tmp_path / "log.csv").touch()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", paths[2].name, paths[3].name]


def test_failed_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 3)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"weight": torch.ones(1000), "last": lambda: None}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_contents_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = checkpoint.os.fsync, Path.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (done.append("replace"), replace(self, target))[1])
    saved(tmp_path, 3)
    assert done == ["fsync", "replace", "fsync"]
