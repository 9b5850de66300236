"""Per-channel vectors with gaps in memory, or with stride 0, as arguments of every Triton operator that takes one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fused_res.backends import registry

C, K = 12, 16
Vectors = list[Tensor]


def every_second(vector: Tensor) -> Tensor:
    """Return the vector with stride 2, between NaN."""
    return torch.full((2 * len(vector),), float("nan"), dtype=vector.dtype)[::2].copy_(vector)


def column(vector: Tensor) -> Tensor:
    """Return the vector as a column of a matrix of NaN."""
    return torch.full((len(vector), 3), float("nan"), dtype=vector.dtype)[:, 1].copy_(vector)


def expanded(vector: Tensor) -> Tensor:
    """Return a constant vector with stride 0 and one element of memory."""
    return vector[:1].clone().expand(len(vector))


def images(channels: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(2, channels, 5, 4, generator=generator).to(memory_format=torch.channels_last)


def new_stats() -> Tensor:
    stats = torch.rand(5, C, generator=torch.Generator().manual_seed(1)) + 0.5
    stats[0] = 0
    return stats


def inference(kernels: Any, v: Vectors) -> Tensor:
    x = images()
    kernels.batch_norm_act_inference_(x, None, None, v[0], v[1], v[2], v[3], 1e-5, "relu")
    return x


def update(kernels: Any, v: Vectors) -> Vectors:
    kernels.update_running_stats([v[0]], [v[1]], [new_stats()], [0.1])
    return v[:2]


def partials() -> Tensor:
    return torch.stack(
        (torch.full((C,), 8.0), torch.randn(C, generator=torch.Generator().manual_seed(2)), torch.ones(C))
    )


GEOMETRY = ([1, 1], [0, 0], [1, 1], 1)
#: Operator -> function of the kernels and four vectors of C elements, or of K elements, that returns all results.
CALLS: dict[str, Callable[[Any, Vectors], Any]] = {
    "batch_norm_stats, training": lambda k, v: k.batch_norm_stats(images(), *v[:2], None, None, True, 1e-5),
    "batch_norm_stats": lambda k, v: k.batch_norm_stats(images(), *v, False, 1e-5),
    "batch_norm_act_forward, training": lambda k, v: k.batch_norm_act_forward(
        images(), None, None, *v, True, 1e-5, "relu", False
    ),
    "batch_norm_act_forward": lambda k, v: k.batch_norm_act_forward(
        images(), None, None, *v, False, 1e-5, "relu", False
    ),
    "batch_norm_act_inference_": inference,
    "merge_stats": lambda k, v: k.merge_stats(partials()[None], *v[:2], 1e-5, False),
    "batch_norm_act_backward": lambda k, v: k.batch_norm_act_backward(
        images(), images(), v[0], new_stats(), None, True, "relu", [True] * 4
    ),
    "batch_norm_act_backward_pair": lambda k, v: k.batch_norm_act_backward_pair(
        images(), images(), v[0], new_stats(), images(), v[1], new_stats(), None, True, True, [True] * 6
    ),
    "update_running_stats": update,
    "conv_bias_act": lambda k, v: k.conv_bias_act(images(C), torch.ones(C, C, 1, 1), v[0], None, *GEOMETRY, True),
    "conv_bn_stats": lambda k, v: k.conv_bn_stats(
        images(C), torch.ones(C, C, 1, 1), v[0], None, False, *GEOMETRY, True
    ),
}


def flatten(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [*results]


@pytest.mark.parametrize("layout", [every_second, column, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("operator", CALLS)
def test_strided_vectors_give_the_bits_of_dense_ones(operator: str, layout: Callable[[Tensor], Tensor]):
    kernels = registry.resolve("triton", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.rand(C, generator=generator) + 0.5 for _ in range(4)]
    if layout is expanded:
        vectors = [v[:1].expand(C).clone() for v in vectors]
    strided = [layout(vector) for vector in vectors]
    if operator == "update_running_stats" and layout is expanded:
        pytest.skip("written in place: the elements of an expanded vector share memory")
    expected = flatten(CALLS[operator](kernels, [v.clone() for v in vectors]))
    for actual, wanted in zip(flatten(CALLS[operator](kernels, strided)), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_strided_weight_of_dgrad_gives_the_bits_of_a_dense_one():
    kernels = registry.resolve("triton", torch.device("cpu"))
    weight = torch.randn(C, K, 1, 1, generator=torch.Generator().manual_seed(3))
    wide = torch.full((C, 2 * K, 1, 1), float("nan"))[:, ::2].copy_(weight)
    arguments = images(), images(), new_stats(), None, True, new_stats()[:2], 40
    dense, strided = (kernels.conv_dgrad(*arguments, w, None, None, False)[0] for w in (weight, wide))
    assert torch.equal(dense, strided)
