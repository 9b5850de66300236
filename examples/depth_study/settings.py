"""What a study is made of, and what a training's result depends on."""

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

#: Of He et al. 2015, section 4.2.
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
#: Of the learning rate's rise: He et al. start their 110 layers at a tenth of it, too.
WARMUP_EPOCHS = 5


@dataclass(frozen=True)
class Training:
    """Everything that the result of a training depends on: equal ones end with equal weights.

    Args: network: what is trained. seed: of the weights, of the order of the images and of their shifts. epochs,
    batch_size, learning_rate: of SGD with Nesterov momentum; the rate rises over `WARMUP_EPOCHS` and falls along a
    cosine. backend: of fused_res. data: :func:`fingerprint`. versions: of what computes.
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
        """Of its files; another one for other settings."""
        key = hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.network.label}-seed-{self.seed}-{key[:16]}"

    def cost(self, images: int) -> int:
        """Layers times steps, which its time is about proportional to."""
        return self.network.depth * self.epochs * -(-images // self.batch_size)


def fingerprint(data: Data) -> str:
    """Tells data sets apart by what they hold (image files: by their names and sizes), not by where they lie."""
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
    """The settings of a whole study; see ``python -m examples.depth_study --help``."""

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
    ) -> Training:
        return Training(
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
        """What the shallowest is compared with: 56 layers as in He et al.'s first figure, where they are there."""
        return 56 if 56 in self.depths[1:] else self.depths[-1]

    @property
    def landmarks(self) -> tuple[int, ...]:
        """The depths whose layers are looked at one by one."""
        return tuple(sorted({self.shallow, self.deep, self.depths[-1]}))
