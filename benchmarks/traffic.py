"""Memory traffic of `act(bn(x) [+ residual])`: the compulsory traffic, and the traffic of two algorithms.

`n` is the number of bytes of one activation. Per-channel vectors are omitted (they are at most 0.1 % here).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    forward: float
    backward: float

    def total(self, mode: str) -> float:
        """Return the bytes of a training step (`"train"`: forward and backward) or of an inference (`"eval"`)."""
        return self.forward + self.backward if mode == "train" else self.forward


def compulsory(n: int, residual: bool) -> Traffic:
    """Return the compulsory traffic, every tensor once.

    Forward: read x [and residual], write y = (2 + r) n. Backward: read dy and x, write dx [and dresidual] = (3 + r) n.
    The ReLU mask of the backward is not compulsory, because it follows from x.
    """
    r = int(residual)
    return Traffic((2 + r) * n, (3 + r) * n)


def fused(n: int, residual: bool, mode: str, relu: bool = True, element_size: int = 4) -> Traffic:
    """Return the traffic of the fused algorithm without cache reuse.

    Forward in training: the statistics kernel reads x; the apply kernel reads x [and residual], writes y and, with a
    residual, the ReLU mask of one bit per element: (3 + r) n + m. Inference has no statistics: (2 + r) n. Backward: the
    reduction reads dy, x [and the mask]; the apply kernel reads them again and writes dx [and dresidual]: (5 + r) n +
    2 m. Slices that stay in cache between the two kernels make the actual traffic smaller.
    """
    r = int(residual)
    mask = n / (8 * element_size) if residual and relu else 0.0
    if mode == "eval":
        return Traffic((2 + r) * n, 0.0)
    return Traffic((3 + r) * n + mask, (5 + r) * n + 2 * mask)


def eager(n: int, residual: bool, mode: str, relu: bool = True, device: str = "cpu") -> Traffic:
    """Return the traffic of PyTorch's separate kernels without cache reuse.

    Forward in training: the mean reads x, the variance reads x (on a GPU one kernel computes both), the normalization
    reads x and writes (4 n; inference 2 n); the addition in place reads two tensors and writes one (3 r n), the ReLU in
    place reads and writes (2 n). Backward: the ReLU reads dy and y and writes (3 n), the batch norm reads dy and x
    twice and writes dx (5 n); the residual's gradient is the ReLU's output.
    """
    r, a = int(residual), int(relu)
    normalize = (4 if device == "cpu" else 3) if mode == "train" else 2
    return Traffic((normalize + 3 * r + 2 * a) * n, (3 * a + 5) * n if mode == "train" else 0.0)
