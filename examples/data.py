"""Image classification data sets (digits, CIFAR, image folders) and deterministic, resumable data loading.

A batch is a pure function of (seed, epoch, step, rank, world size): no random generator outlives an epoch. So a run
that is interrupted in mid-epoch resumes with the batches it would have had, and the ranks of a distributed run
partition every epoch without communication.
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

#: Per-channel mean and standard deviation of ImageNet's training images, in pixel units of 0..255.
PHOTOGRAPH_MEAN = (123.675, 116.28, 103.53)
PHOTOGRAPH_STD = (58.395, 57.12, 57.375)
PHOTOGRAPH_SIZE = 224
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """The requested data set is missing or invalid."""


class Images(Protocol):
    """A split of a data set: images of one size, and their labels, int64 of shape (N,)."""

    labels: Tensor

    def read(self, indices: Tensor) -> Tensor:
        """Return the images at `indices`: uint8, (len(indices), 3, size, size)."""
        ...


@dataclass(frozen=True)
class ImagesInMemory:
    images: Tensor
    labels: Tensor

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded on demand by `workers` threads: Pillow releases the interpreter's lock."""

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
    images: Tensor  #: float32, (n, 3, size, size), normalized
    labels: Tensor  #: int64, (n,)
    global_batch_size: int  #: number of images of this step over all ranks


@dataclass(frozen=True)
class Loader:
    """Batches of a split, sharded over ranks.

    The `batch_size` images of a step (fewer in the last one) are partitioned over the ranks without padding or
    repetition, so a rank may have one image less than another, or none.

    Args:
        images: the split.
        mean, std: per-channel statistics that normalize the images, in pixel units.
        batch_size: number of images per step over all ranks.
        shuffle: whether each epoch has its own random order.
        shift: largest random shift in pixels, in each direction; the border is filled with zeros.
        mirror: whether each image is flipped horizontally with probability 1/2.
        seed: seed of the order, the shifts and the flips.
        rank, world_size: rank of this process, and the number of processes.
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
    world_size: int = 1

    @property
    def steps(self) -> int:
        """Number of steps per epoch, equal on all ranks."""
        return -(-len(self.images.labels) // self.batch_size)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from step `start_step` on.

        Every batch equals the one at the same step of an epoch that is iterated from its start.

        Raises:
            DataError: a file of the split cannot be decoded.
        """
        count = len(self.images.labels)
        generator = torch.Generator().manual_seed(_epoch_seed(self.seed, epoch))
        # Drawn for the whole epoch at once, so that they depend only on the position in the epoch.
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        shifts = torch.randint(0, 2 * self.shift + 1, (count, 2), generator=generator)
        flipped = torch.randint(0, 2, (count,), generator=generator).bool() & self.mirror

        def assemble(step: int) -> Batch:
            global_indices = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, count))
            rank_indices = global_indices.tensor_split(self.world_size)[self.rank]
            chosen = order[rank_indices]
            images = self.images.read(chosen)
            if self.shift or self.mirror:
                images = _shift_and_flip(images, shifts[rank_indices], flipped[rank_indices], self.shift)
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
            return Batch((images.float() - mean) / std, self.images.labels[chosen], len(global_indices))

        steps = range(start_step, self.steps)
        return _prefetch(assemble, steps) if isinstance(self.images, ImageFiles) else map(assemble, steps)


@dataclass(frozen=True)
class Data:
    """A data set, as returned by :func:`load`.

    ``mean`` and ``std`` are per channel, in units of the uint8 pixels. ``shift`` (pixels) and ``mirror`` are the
    augmentation that suits these images.
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

    def train_loader(
        self, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, augment: bool = True
    ) -> Loader:
        """Return a loader of shuffled training batches of `batch_size` images over all ranks."""
        shift, mirror = (self.shift, self.mirror) if augment else (0, False)
        return Loader(self.train, self.mean, self.std, batch_size, True, shift, mirror, seed, rank, world_size)

    def test_loader(self, batch_size: int, rank: int = 0, world_size: int = 1, split: Images | None = None) -> Loader:
        """Return a loader of the test set, or of another `split`, in order and without augmentation."""
        return Loader(split or self.test, self.mean, self.std, batch_size, rank=rank, world_size=world_size)


def load(source: str | Path, image_size: int | None = None, workers: int = 0) -> Data:
    """Load a data set.

    Args:
        source: ``"digits"``: scikit-learn's 1797 grey 8x8 images of handwritten digits, in a fixed stratified split of
            80 to 20 %. Or a folder: CIFAR-10's or CIFAR-100's Python files (``cifar-10-batches-py``,
            ``cifar-100-python``, or a folder that contains one of them), or images as ``train/<class>/*`` and
            ``val/<class>/*`` (or ``test``).
        image_size: side of the square images in pixels; None for the original size, or 224 for a folder of images.
        workers: number of threads that decode files.

    Raises:
        DataError: `source` (``--data``) is none of these, or damaged.
    """
    if str(source) == "digits":
        return _load_digits(image_size)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"--data {source}: expected an existing folder, or digits, which is bundled with scikit-learn")
    found = [variant for variant in CIFAR_VARIANTS if variant.find_folder(folder)]
    if len(found) > 1:
        raise DataError(f"--data {source}: holds {' and '.join(one.folder for one in found)}; choose one of them")
    if found:
        return _load_cifar(found[0], folder, image_size)
    tests = [name for name in ("val", "test") if (folder / name).is_dir()]
    if (folder / "train").is_dir() and tests:
        return _load_folder(folder, tests[0], image_size or PHOTOGRAPH_SIZE, workers)
    raise DataError(
        f"--data {source}: expected CIFAR's files ({', '.join(variant.folder for variant in CIFAR_VARIANTS)}) or images"
        " in train/<class>/* with val/<class>/* or test/<class>/*, found neither"
    )


def _load_digits(image_size: int | None) -> Data:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data digits: needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=bunch.target)
    train, test = (ImagesInMemory(images[part].contiguous(), labels[part]) for part in map(torch.from_numpy, parts))
    return _in_memory("digits", train, test, 10, image_size, mirror=False)


@dataclass(frozen=True)
class CifarVariant:
    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    classes: int

    def find_folder(self, folder: Path) -> Path | None:
        """Return `folder` or its subfolder of this variant's name if it has this variant's files, else None."""
        for candidate in (folder, folder / self.folder):
            if all((candidate / name).is_file() for name in (*self.train, self.test)):
                return candidate
        return None


CIFAR_VARIANTS = (
    CifarVariant(
        "CIFAR-10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels", 10
    ),
    CifarVariant("CIFAR-100", "cifar-100-python", ("train",), "test", "fine_labels", 100),
)


class _RestrictedUnpickler(pickle.Unpickler):
    """An unpickler restricted to containers and numpy arrays, which is all that CIFAR's files hold."""

    ALLOWED_GLOBALS = frozenset(
        {
            ("_codecs", "encode"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which is not allowed in a data set")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _load_cifar(kind: CifarVariant, folder: Path, image_size: int | None) -> Data:
    found = kind.find_folder(folder)
    assert found is not None

    def split(names: tuple[str, ...]) -> ImagesInMemory:
        images, labels = zip(*(_read_cifar_file(found / name, kind) for name in names), strict=True)
        return ImagesInMemory(torch.cat(images), torch.cat(labels))

    return _in_memory(kind.name, split(kind.train), split((kind.test,)), kind.classes, image_size, mirror=True)


def _read_cifar_file(path: Path, kind: CifarVariant) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            content = _RestrictedUnpickler(file, encoding="latin1").load()
        images = torch.from_numpy(np.ascontiguousarray(content["data"]).reshape(-1, 3, 32, 32))
        labels = torch.tensor(content[kind.labels], dtype=torch.int64)
    except Exception as error:  # unpickling a damaged file can raise any exception
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
        train, test = (ImagesInMemory(_resize(split.images, size), split.labels) for split in (train, test))
    std, mean = torch.std_mean(train.images.double(), dim=(0, 2, 3), correction=0)
    # Shifts of an eighth of the side: He et al. 2015 use 4 of CIFAR's 32 pixels.
    return Data(name, train, test, classes, size, tuple(mean.tolist()), tuple(std.tolist()), size // 8, mirror)


def _load_folder(folder: Path, test: str, size: int, workers: int) -> Data:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"--data {folder}: images are decoded with Pillow: pip install pillow") from error
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if unknown := sorted({path.name for path in (folder / test).iterdir() if path.is_dir()} - set(classes)):
        raise DataError(f"--data {folder}: {test} has classes that train does not have: {', '.join(unknown)}")

    def split(name: str) -> ImageFiles:
        found = [
            (path, label)
            for label, kind in enumerate(classes)
            for path in sorted((folder / name / kind).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not found:
            raise DataError(f"--data {folder}: no image found in {name}/<class>/ ({', '.join(IMAGE_SUFFIXES)})")
        return ImageFiles([path for path, _ in found], torch.tensor([label for _, label in found]), size, workers)

    return Data(
        folder.name, split("train"), split(test), len(classes), size, PHOTOGRAPH_MEAN, PHOTOGRAPH_STD, size // 8, True
    )


def _decode(path: Path, size: int) -> Tensor:
    """Return the center square of the picture, resized: uint8, (3, size, size)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            fitted = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"--data: {path} cannot be decoded: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _resize(images: Tensor, size: int) -> Tensor:
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _shift_and_flip(images: Tensor, shifts: Tensor, flipped: Tensor, max_shift: int) -> Tensor:
    """Zero-pad `images` by `max_shift`, crop them at `shifts` ((n, 2), 0..2 `max_shift`), and flip where `flipped`."""
    size = images.shape[-1]
    padded = F.pad(images, (max_shift,) * 4)
    across = torch.arange(size)
    columns = torch.where(flipped[:, None], across.flip(0), across) + shifts[:, 1:]
    rows = across + shifts[:, :1]
    which = torch.arange(len(images))
    # Indices on both sides of a slice put the slice's dimension last: (n, rows, columns, 3).
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed derived from both, so that runs of adjacent seeds and adjacent epochs are independent."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _prefetch(assemble: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """Yield the batches in order and assemble the next one in a background thread."""
    with ThreadPoolExecutor(1) as background:
        pending = [background.submit(assemble, step) for step in steps[:1]]
        for step in steps:
            batch = pending.pop().result()
            if step + 1 in steps:
                pending.append(background.submit(assemble, step + 1))
            yield batch
