"""Settings of the study, and of each training run in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fused_res
from examples.data import Data, ImagesInMemory
from examples.depth_study.networks import Network

#: The values of He et al. 2015, section 4.2.
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
#: Epochs of linear warm-up: He et al. 2015 also warm up their 110 layers, at a tenth of the learning rate.
WARMUP_EPOCHS = 5


@dataclass(frozen=True)
class TrainingConfig:
    """All settings that determine the result of a training run: equal configurations end with equal weights.

    Args:
        network: the network that is trained.
        seed: seed of the weights, of the order of the images and of their shifts.
        epochs, batch_size, learning_rate: settings of SGD with Nesterov momentum; the learning rate has a linear
            warm-up over `WARMUP_EPOCHS` and cosine decay.
        backend: backend of fused_res.
        data: :func:`fingerprint` of the data set.
        versions: versions of torch and fused_res.
    """

    network: Network
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    backend: str
    data: str
    versions: str = f"torch {torch.__version__}, fused_res {fused_res.__version__}"

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "warmup_epochs": WARMUP_EPOCHS,
        }

    @property
    def label(self) -> str:
        return f"{self.network.label}, lr {self.learning_rate:g}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Stem of the training's file names, unique to its settings."""
        key = hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.network.label}-seed-{self.seed}-{key[:16]}"

    def cost(self, images: int) -> int:
        """Return layers times steps, to which the training time is about proportional."""
        return self.network.depth * self.epochs * -(-images // self.batch_size)


def fingerprint(data: Data) -> str:
    """Return a hash of the data set's contents (of the names and sizes of image files), not of its path."""
    digest = hashlib.sha256(f"{data.name} {data.classes} {data.size} {data.mean} {data.std} {data.shift}".encode())
    for split in (data.train, data.test):
        digest.update(split.labels.numpy().tobytes())
        if isinstance(split, ImagesInMemory):
            digest.update(split.images.numpy().tobytes())
        else:
            digest.update(repr([(path.name, path.stat().st_size) for path in split.paths]).encode())
    return f"{data.name} {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Study:
    """The settings of the study; see ``python -m examples.depth_study --help``."""

    data: Data
    source: str
    depths: tuple[int, ...]
    seeds: int
    epochs: int
    width: int
    batch_size: int
    learning_rate: float
    backend: str
    quick: bool
    out: Path

    def training(
        self, kind: str, depth: int, seed: int = 0, learning_rate: float | None = None, span: int = 2
    ) -> TrainingConfig:
        return TrainingConfig(
            Network(kind, depth, self.width, span),
            seed,
            self.epochs,
            self.batch_size,
            self.learning_rate if learning_rate is None else learning_rate,
            self.backend,
            fingerprint(self.data),
        )

    @property
    def shallow(self) -> int:
        return self.depths[0]

    @property
    def deep(self) -> int:
        """Depth compared with the shallowest: 56 as in figure 1 of He et al. 2015 if trained, else the deepest."""
        return 56 if 56 in self.depths[1:] else self.depths[-1]

    @property
    def probed_depths(self) -> tuple[int, ...]:
        """Depths of the networks whose gradients are measured layer by layer."""
        return tuple(sorted({self.shallow, self.deep, self.depths[-1]}))
