"""Labelled images from an embedded set, CIFAR's files or a folder, and batches of them that can be repeated exactly.

What a batch holds is a pure function of (seed, epoch, step, rank, number of ranks): nothing is drawn from a generator
that lives longer than an epoch. So a run that was interrupted in mid-epoch sees, resumed, what it would have seen, and
the ranks of a distributed run share every epoch out without a word between them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Of ImageNet's training images, by channel, in units of a pixel's 0..255.
PHOTOGRAPH_MEAN = (123.675, 116.28, 103.53)
PHOTOGRAPH_STD = (58.395, 57.12, 57.375)
PHOTOGRAPH_SIZE = 224
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """The data that were asked for are not there, or not what they should be."""


class Images(Protocol):
    """A split: images of one size, and their classes, int64 of shape (N,)."""

    labels: Tensor

    def read(self, indices: Tensor) -> Tensor:
        """The images at `indices`: uint8, (len(indices), 3, size, size)."""
        ...


@dataclass(frozen=True)
class ImagesInMemory:
    images: Tensor
    labels: Tensor

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


@dataclass(frozen=True)
class ImageFiles:
    """Decoded when they are read, by `workers` threads: Pillow works outside of the interpreter's lock."""

    paths: list[Path]
    labels: Tensor
    size: int
    workers: int

    def read(self, indices: Tensor) -> Tensor:
        chosen = [self.paths[index] for index in indices.tolist()]
        if self.workers < 2:
            images = [_decode(path, self.size) for path in chosen]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                images = list(pool.map(_decode, chosen, [self.size] * len(chosen)))
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)


class Batch(NamedTuple):
    images: Tensor  #: float32, (n, 3, size, size), normalised
    labels: Tensor  #: int64, (n,)
    global_count: int  #: how many images this step has, over all ranks


@dataclass(frozen=True)
class Loader:
    """Batches of a split, cut over ranks.

    A step's `batch_size` images (fewer in the last one) are shared out without padding or repetition, so that a rank
    may get one image less than another, or none.

    Args: images: the split. mean, std: by channel, in the images' units. batch_size: over all ranks. shuffle: another
    order each epoch. shift: moves each image by up to so many pixels, filling with zeros. mirror: mirrors every other
    one. seed: of the order and both of these. rank, world: which of how many processes this is.
    """

    images: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    shuffle: bool = False
    shift: int = 0
    mirror: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1

    @property
    def steps(self) -> int:
        """Of an epoch; the same on all ranks."""
        return -(-len(self.images.labels) // self.batch_size)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start_step` on, all of them the same as in an epoch seen from the start.

        Raises: DataError: a file of the split cannot be decoded.
        """
        count = len(self.images.labels)
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        # Drawn for the whole epoch at once, so that they depend on nothing but the position in it.
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        shifts = torch.randint(0, 2 * self.shift + 1, (count, 2), generator=generator)
        mirrored = torch.randint(0, 2, (count,), generator=generator).bool() & self.mirror

        def assemble(step: int) -> Batch:
            whole = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, count))
            own = whole.tensor_split(self.world)[self.rank]
            chosen = order[own]
            images = self.images.read(chosen)
            if self.shift or self.mirror:
                images = _moved(images, shifts[own], mirrored[own], self.shift)
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
            return Batch((images.float() - mean) / std, self.images.labels[chosen], len(whole))

        steps = range(start_step, self.steps)
        return _one_ahead(assemble, steps) if isinstance(self.images, ImageFiles) else map(assemble, steps)


@dataclass(frozen=True)
class Data:
    """What :func:`load` found.

    ``mean`` and ``std`` are by channel, in units of the pixels (uint8). ``shift`` and ``mirror`` are the augmentation
    that suits these images.
    """

    name: str
    train: Images
    test: Images
    classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int
    mirror: bool

    def training(self, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, augment: bool = True) -> Loader:
        """Shuffled batches of the training set; `batch_size` counts over all ranks."""
        shift, mirror = (self.shift, self.mirror) if augment else (0, False)
        return Loader(self.train, self.mean, self.std, batch_size, True, shift, mirror, seed, rank, world)

    def testing(self, batch_size: int, rank: int = 0, world: int = 1, split: Images | None = None) -> Loader:
        """The test set, or another `split`, once and in order: nothing is left out, repeated or changed."""
        return Loader(split or self.test, self.mean, self.std, batch_size, rank=rank, world=world)


def load(source: str | Path, image_size: int | None = None, workers: int = 0) -> Data:
    """Loads a data set.

    Args:
        source: ``"digits"``: scikit-learn's 1797 grey 8x8 images of handwritten digits, in a fixed stratified split of
            80 to 20 %. Or a folder: CIFAR-10's or CIFAR-100's Python files (``cifar-10-batches-py``,
            ``cifar-100-python``, or where one of these lies), or images as ``train/<class>/*`` and
            ``val/<class>/*`` (or ``test``).
        image_size: side of the square images; None: as they are, and 224 for a folder of images.
        workers: threads that decode files.

    Raises:
        DataError: `source` (``--data``) is none of these, or damaged.
    """
    if str(source) == "digits":
        return _load_digits(image_size)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"--data {source}: there is no such folder (nor is it the embedded set, digits)")
    found = [kind for kind in CIFAR_KINDS if kind.folder_in(folder)]
    if len(found) > 1:
        raise DataError(f"--data {source}: holds {' and '.join(kind.folder for kind in found)}; name one of them")
    if found:
        return _load_cifar(found[0], folder, image_size)
    tests = [name for name in ("val", "test") if (folder / name).is_dir()]
    if (folder / "train").is_dir() and tests:
        return _load_folder(folder, tests[0], image_size or PHOTOGRAPH_SIZE, workers)
    raise DataError(
        f"--data {source}: looked for CIFAR's files ({', '.join(kind.folder for kind in CIFAR_KINDS)}) and for images"
        " in train/<class>/* with val/<class>/* or test/<class>/*, and found neither"
    )


def _load_digits(image_size: int | None) -> Data:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data digits: comes with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=bunch.target)
    train, test = (ImagesInMemory(images[part].contiguous(), labels[part]) for part in map(torch.from_numpy, parts))
    return _in_memory("digits", train, test, 10, image_size, mirror=False)


@dataclass(frozen=True)
class CifarKind:
    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    classes: int

    def folder_in(self, folder: Path) -> Path | None:
        """`folder` itself or the one of this name inside it, if this data set's files are there."""
        for candidate in (folder, folder / self.folder):
            if all((candidate / name).is_file() for name in (*self.train, self.test)):
                return candidate
        return None


CIFAR_KINDS = (
    CifarKind(
        "CIFAR-10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels", 10
    ),
    CifarKind("CIFAR-100", "cifar-100-python", ("train",), "test", "fine_labels", 100),
)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what CIFAR's files hold, containers and numpy arrays: a pickle may not run anything else."""

    ADMITTED = frozenset(
        {
            ("_codecs", "encode"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which no data set needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _load_cifar(kind: CifarKind, folder: Path, image_size: int | None) -> Data:
    found = kind.folder_in(folder)
    assert found is not None

    def split(names: tuple[str, ...]) -> ImagesInMemory:
        images, labels = zip(*(_read_cifar_file(found / name, kind) for name in names), strict=True)
        return ImagesInMemory(torch.cat(images), torch.cat(labels))

    return _in_memory(kind.name, split(kind.train), split((kind.test,)), kind.classes, image_size, mirror=True)


def _read_cifar_file(path: Path, kind: CifarKind) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        images = torch.from_numpy(np.ascontiguousarray(content["data"]).reshape(-1, 3, 32, 32))
        labels = torch.tensor(content[kind.labels], dtype=torch.int64)
    except Exception as error:  # a pickle can fail in any way at all
        raise DataError(f"--data: {path} is not one of {kind.name}'s files: {error}") from error
    if images.dtype != torch.uint8 or len(images) != len(labels):
        raise DataError(f"--data: {path} holds {len(images)} images of {images.dtype} and {len(labels)} labels")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < kind.classes:
        raise DataError(f"--data: {path} has labels outside of 0..{kind.classes - 1}")
    return images, labels


def _in_memory(
    name: str, train: ImagesInMemory, test: ImagesInMemory, classes: int, image_size: int | None, mirror: bool
) -> Data:
    size = image_size or train.images.shape[-1]
    if size != train.images.shape[-1]:
        train, test = (ImagesInMemory(_resized(split.images, size), split.labels) for split in (train, test))
    std, mean = torch.std_mean(train.images.double(), dim=(0, 2, 3), correction=0)
    # An eighth of the side: He et al.'s 4 pixels of CIFAR's 32.
    return Data(name, train, test, classes, size, tuple(mean.tolist()), tuple(std.tolist()), size // 8, mirror)


def _load_folder(folder: Path, test: str, size: int, workers: int) -> Data:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"--data {folder}: images are decoded with Pillow: pip install pillow") from error
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if unknown := sorted({path.name for path in (folder / test).iterdir() if path.is_dir()} - set(classes)):
        raise DataError(f"--data {folder}: {test} has classes that train has not: {', '.join(unknown)}")

    def split(name: str) -> ImageFiles:
        found = [
            (path, label)
            for label, kind in enumerate(classes)
            for path in sorted((folder / name / kind).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not found:
            raise DataError(f"--data {folder}: there is no image in {name}/<class>/ ({', '.join(IMAGE_SUFFIXES)})")
        return ImageFiles([path for path, _ in found], torch.tensor([label for _, label in found]), size, workers)

    return Data(
        folder.name, split("train"), split(test), len(classes), size, PHOTOGRAPH_MEAN, PHOTOGRAPH_STD, size // 8, True
    )


def _decode(path: Path, size: int) -> Tensor:
    """The middle square of the picture, resized: uint8, (3, size, size)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            fitted = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"--data: {path} cannot be decoded: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _resized(images: Tensor, size: int) -> Tensor:
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _moved(images: Tensor, shifts: Tensor, mirrored: Tensor, most: int) -> Tensor:
    """Windows of the size of `images`, cut out of them after padding by `most`, at `shifts` (0..2 `most`: (n, 2))."""
    size = images.shape[-1]
    padded = F.pad(images, (most,) * 4)
    across = torch.arange(size)
    columns = torch.where(mirrored[:, None], across.flip(0), across) + shifts[:, 1:]
    rows = across + shifts[:, :1]
    which = torch.arange(len(images))
    # Indices on both sides of a slice put the slice's dimension last: (n, rows, columns, 3).
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _mix(seed: int, epoch: int) -> int:
    """One seed of both, such that neighbouring runs and epochs have nothing in common."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _one_ahead(assemble: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """Batches in order, the next one assembled while the caller works on the last."""
    with ThreadPoolExecutor(1) as background:
        pending = [background.submit(assemble, step) for step in steps[:1]]
        for step in steps:
            batch = pending.pop().result()
            if step + 1 in steps:
                pending.append(background.submit(assemble, step + 1))
            yield batch
