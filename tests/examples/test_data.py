"""examples/data.py: loading of each kind of data set, its errors, and deterministic batches."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import data
from examples.data import Batch, DataError, Loader

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


def joined(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def assert_same_batches(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for found, other in zip(actual, expected, strict=True):
        assert torch.equal(found.images, other.images) and torch.equal(found.labels, other.labels)
        assert found.global_batch_size == other.global_batch_size


# Digits


def test_digits_are_split_by_class_and_normalized(digits: data.Data) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    images, labels = joined(list(digits.train_loader(200, augment=False).batches()))
    test_images, test_labels = joined(list(digits.test_loader(200).batches()))
    assert (len(labels), len(test_labels)) == (1437, 360)
    shares = torch.from_numpy(original.target).bincount() * 0.2
    assert ((test_labels.bincount() - shares).abs() < 1).all()
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 8, 8)
    assert abs(float(images.double().mean())) < 1e-6
    assert abs(float(images.double().var(correction=0)) - 1) < 1e-6

    # Every original image is in exactly one of the two splits, with its label.
    def rows(images: Tensor, labels: Tensor) -> list[tuple[float, ...]]:
        return sorted((*image.flatten().tolist(), float(label)) for image, label in zip(images, labels, strict=True))

    pixels = torch.cat([images, test_images])[:, 0].double() * digits.std[0] + digits.mean[0]
    expected = torch.from_numpy(original.images), torch.from_numpy(original.target)
    assert rows(pixels.round(), torch.cat([labels, test_labels])) == rows(*expected)


def test_images_are_resized(digits: data.Data) -> None:
    larger = data.load("digits", image_size=16)
    assert (larger.size, larger.shift) == (16, 2)
    indices = torch.arange(50)
    halved = larger.test.read(indices).float().unflatten(-1, (8, 2)).mean(-1).unflatten(-2, (8, 2)).mean(-2)
    # Upsampled by 2, a pixel is 3/4 of the nearest one and 1/4 of the next; the mean of two has taps 1/8, 6/8, 1/8.
    taps = torch.tensor([0.125, 0.75, 0.125])
    blurred = F.conv2d(digits.test.read(indices).float().flatten(0, 1)[:, None], (taps[:, None] * taps)[None, None])
    assert (halved[:, :, 1:-1, 1:-1].flatten(0, 1)[:, None] - blurred).abs().max() <= 0.5  # uint8


def test_error_names_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"--data digits: .*pip install scikit-learn"):
        data.load("digits")


# Batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_partition_every_batch(digits: data.Data, world_size: int) -> None:
    global_batches = list(digits.train_loader(128, seed=5).batches(3))
    shares = [
        list(digits.train_loader(128, seed=5, rank=rank, world_size=world_size).batches(3))
        for rank in range(world_size)
    ]
    assert (
        [batch.global_batch_size for batch in global_batches]
        == [len(batch.labels) for batch in global_batches]
        == [128] * 11 + [29]
    )
    for share in shares:
        assert [batch.global_batch_size for batch in share] == [batch.global_batch_size for batch in global_batches]
    together = [
        Batch(*joined([share[step] for share in shares]), shares[0][step].global_batch_size)
        for step in range(len(global_batches))
    ]
    assert_same_batches(together, global_batches)


def test_last_batch_can_be_empty_on_a_rank(digits: data.Data) -> None:
    last = [list(digits.train_loader(1436, rank=rank, world_size=2).batches())[-1] for rank in (0, 1)]
    assert [len(batch.labels) for batch in last] == [1, 0]
    assert last[1].images.shape == (0, 3, 8, 8) and last[1].global_batch_size == 1


def test_epoch_has_every_image_once(digits: data.Data) -> None:
    def order(epoch: int, seed: int = 0) -> list[int]:
        loader = Loader(IndexImages(1437), (0.0,) * 3, (1.0,) * 3, 100, shuffle=True, seed=seed)
        return joined(list(loader.batches(epoch)))[0][:, 0, 0, 0].int().tolist()

    orders = [order(0), order(1), order(0, seed=1), order(1, seed=1)]
    for one in orders:
        assert sorted(one) == list(range(1437))
    assert len({tuple(one) for one in orders}) == 4
    assert order(1) == orders[1]


class IndexImages:
    """A split whose images hold their own index."""

    def __init__(self, count: int) -> None:
        self.labels = torch.zeros(count, dtype=torch.int64)

    def read(self, indices: Tensor) -> Tensor:
        return indices.view(-1, 1, 1, 1).expand(-1, 3, 1, 1).contiguous()


@pytest.mark.parametrize("start", [1, 6, 11, 12])
def test_epoch_resumes_from_any_step(digits: data.Data, start: int) -> None:
    loader = digits.train_loader(128, seed=1)
    assert_same_batches(list(loader.batches(2, start)), list(loader.batches(2))[start:])


def test_augmentation_shifts_and_flips_all_channels_alike() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 255, (400, 3, 5, 6 - 1), dtype=torch.uint8)
    split = data.ImagesInMemory(images, torch.arange(400))
    loader = Loader(split, (0.0,) * 3, (1.0,) * 3, 64, shift=2, mirror=True, seed=9)
    moved, which = joined(list(loader.batches()))
    padded = F.pad(images.float(), (2, 2, 2, 2))
    found = set()
    for image, index in zip(moved, which.tolist(), strict=True):
        fits = [
            (top, left, mirror)
            for top in range(5)
            for left in range(5)
            for mirror in (False, True)
            if torch.equal(
                image,
                padded[index, :, top : top + 5, left : left + 5].flip(-1)
                if mirror
                else padded[index, :, top : top + 5, left : left + 5],
            )
        ]
        assert len(fits) == 1
        found.add(fits[0])
    assert len(found) == 50  # every shift, flipped and not


def test_digits_are_not_flipped(digits: data.Data) -> None:
    loader = digits.train_loader(64)
    assert (loader.shift, loader.mirror, digits.test_loader(64).shift) == (1, False, 0)


# CIFAR


def write_cifar10(folder: Path, per_file: int = 4) -> dict[str, np.ndarray]:
    folder.mkdir()
    random = np.random.default_rng(0)
    written = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        written[name] = random.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        content = {"data": written[name], "labels": [i % 10 for i in range(per_file)], "batch_label": "x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return written


@pytest.mark.parametrize("parent", [False, True], ids=["itself", "parent"])
def test_cifar10_is_read(tmp_path: Path, parent: bool) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    written = write_cifar10(folder)
    loaded = data.load(tmp_path if parent else folder)
    assert (loaded.name, loaded.classes, loaded.size, loaded.shift, loaded.mirror) == ("CIFAR-10", 10, 32, 4, True)
    train = np.concatenate([written[f"data_batch_{i}"] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(loaded.train.read(torch.arange(20)).numpy(), train)
    assert np.array_equal(loaded.test.read(torch.arange(4)).numpy().reshape(4, -1), written["test_batch"])
    assert loaded.train.labels.tolist() == [0, 1, 2, 3] * 5
    assert np.allclose(loaded.mean, train.mean((0, 2, 3))) and np.allclose(loaded.std, train.std((0, 2, 3)))


def write_cifar100(folder: Path) -> None:
    folder.mkdir()
    for name in ("train", "test"):
        content = {"data": np.full((2, 3072), 7, np.uint8), "fine_labels": [99, 5], "coarse_labels": [1, 2]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def test_cifar100_is_read(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "cifar-100-python")
    loaded = data.load(tmp_path)
    assert (loaded.name, loaded.classes, loaded.train.labels.tolist()) == ("CIFAR-100", 100, [99, 5])


def test_two_data_sets_in_a_folder_raise(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    write_cifar100(tmp_path / "cifar-100-python")
    with pytest.raises(DataError, match=r"--data .* cifar-10-batches-py and cifar-100-python; choose one"):
        data.load(tmp_path)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_pickle_that_runs_code_raises(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    victim = tmp_path / "victim"
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Malicious(victim)}, protocol=2))
    with pytest.raises(DataError, match=r"--data.*data_batch_3.*mkdir"):
        data.load(folder)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data_batch_2 is not one of"),
        (pickle.dumps({"labels": [1]}), "data_batch_2 is not one of"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, protocol=2), "2 images .* 1 labels"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, protocol=2), "labels outside of 0..9"),
    ],
    ids=["truncated", "keys", "counts", "labels"],
)
def test_error_names_the_damaged_cifar_file(tmp_path: Path, content: bytes, message: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=f"--data.*{message}"):
        data.load(folder)


# Folders of images


def write_images(folder: Path, test: str = "val") -> None:
    from PIL import Image

    for split, count in (("train", 5), (test, 2)):
        for label, kind in enumerate(("cat", "dog")):
            (folder / split / kind).mkdir(parents=True)
            for index in range(count):
                # A wide picture: the center square has one color, the sides another.
                pixels = np.zeros((30, 50, 3), np.uint8)
                pixels[:, 6:44] = (100 * label + 20, 10 * index, 200)
                Image.fromarray(pixels).save(folder / split / kind / f"{index}.png")
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("test", ["val", "test"])
def test_image_folder_is_read(tmp_path: Path, test: str, workers: int) -> None:
    pytest.importorskip("PIL")
    write_images(tmp_path, test)
    loaded = data.load(tmp_path, image_size=16, workers=workers)
    assert (loaded.classes, loaded.size, loaded.train.labels.tolist()) == (2, 16, [0] * 5 + [1] * 5)
    images = loaded.train.read(torch.tensor([2, 7]))
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    for image, red in zip(images, (20, 120), strict=True):
        assert (image == torch.tensor([red, 20, 200], dtype=torch.uint8).view(3, 1, 1)).all()
    batches = list(loaded.train_loader(3).batches(1))
    assert [len(batch.labels) for batch in batches] == [3, 3, 3, 1]
    assert_same_batches(list(loaded.train_loader(3).batches(1, 2)), batches[2:])
    first = next(loaded.test_loader(4).batches()).images[0, :, 0, 0]  # an epoch that is not iterated to its end is fine
    pixel = first * torch.tensor(loaded.std) + torch.tensor(loaded.mean)
    assert torch.allclose(pixel, torch.tensor([20.0, 0, 200]), atol=1e-3)


def test_error_names_the_undecodable_image(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_images(tmp_path)
    (tmp_path / "train" / "dog" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"--data: .*dog/3\.png cannot be decoded"):
        list(data.load(tmp_path, 16).train_loader(4).batches())


def test_unknown_test_class_raises(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_images(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(DataError, match=r"--data.*val has classes that train does not have: wolf"):
        data.load(tmp_path)


def test_missing_data_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data .*nowhere: expected an existing folder"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"--data .*cifar-10-batches-py, cifar-100-python.*train/<class>"):
        data.load(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"--data .*no image found in train"):
        data.load(tmp_path)
