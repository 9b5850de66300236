"""Bytes that `act(bn(x) [+ residual])` has to move, and bytes that two ways of computing it move.

`n` is the number of bytes of one activation. Per-channel vectors are left out (they are at most 0.1 % here).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    forward: float
    backward: float

    def of(self, mode: str) -> float:
        """Bytes of a training step (`"train"`: forward and backward) or of an inference (`"eval"`)."""
        return self.forward + self.backward if mode == "train" else self.forward


def fewest(n: int, residual: bool) -> Traffic:
    """Every tensor once. Forward: read x [and residual], write y = (2 + r) n. Backward: read dy and x, write
    dx [and dresidual] = (3 + r) n. Where backward's ReLU mask comes from is nobody's necessity (it follows
    from x)."""
    r = int(residual)
    return Traffic((2 + r) * n, (3 + r) * n)


def fused(n: int, residual: bool, mode: str, relu: bool = True, element_size: int = 4) -> Traffic:
    """What the fused algorithm asks of the memory system if no cache helps.

    Forward in training: statistics read x; apply reads x [and residual], writes y and, with a residual, the
    ReLU mask of one bit an element: (3 + r) n + m. In inference there are no statistics: (2 + r) n. Backward:
    the reduction reads dy, x [and the mask]; apply reads them again and writes dx [and dresidual]: (5 + r) n
    + 2 m. Slices that stay in cache between statistics and apply make the real traffic smaller than this.
    """
    r = int(residual)
    mask = n / (8 * element_size) if residual and relu else 0.0
    if mode == "eval":
        return Traffic((2 + r) * n, 0.0)
    return Traffic((3 + r) * n + mask, (5 + r) * n + 2 * mask)


def eager(n: int, residual: bool, mode: str, relu: bool = True, device: str = "cpu") -> Traffic:
    """What PyTorch's separate kernels ask of the memory system if no cache helps.

    Forward in training: mean reads x, variance reads x (on a GPU one pass brings both), normalise reads x and
    writes (4 n; inference 2 n);
    the addition in place reads two and writes one (3 r n), the ReLU in place reads and writes (2 n).
    Backward: the ReLU reads dy and y and writes (3 n), the batch norm reads dy and x twice and writes dx (5
    n); the residual's gradient is the ReLU's output.
    """
    r, a = int(residual), int(relu)
    normalise = (4 if device == "cpu" else 3) if mode == "train" else 2
    return Traffic((normalise + 3 * r + 2 * a) * n, (3 * a + 5) * n if mode == "train" else 0.0)
