"""Batches of real photographs: crops of scikit-learn's two sample images, so that nothing is downloaded."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The usual ImageNet statistics per channel.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def photographs(batch: int, size: int, seed: int = 0) -> Tensor:
    """Return random square crops, half of them horizontally flipped, resized and normalized.

    Returns:
        Images of shape (batch, 3, size, size), float32.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise SystemExit(
            "scikit-learn: not installed; the benchmarks use its photographs: pip install scikit-learn"
        ) from error
    generator = torch.Generator().manual_seed(seed)

    def random_int(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    images = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    crops = []
    for index in range(batch):
        image = images[index % len(images)]
        height, width = image.shape[1:]
        side = random_int(min(height, width) // 2, min(height, width))
        top, left = random_int(0, height - side), random_int(0, width - side)
        crop = image[:, top : top + side, left : left + side]
        if random_int(0, 1):
            crop = crop.flip(2)
        crops.append(F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True, align_corners=False))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.cat(crops) - mean) / std


def labels(batch: int, classes: int, seed: int = 0) -> Tensor:
    """Return random class indices below `classes`, shape (batch,), int64."""
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))
