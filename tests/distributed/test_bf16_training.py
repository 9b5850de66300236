"""The CPU's bfloat16 training kernels in two processes: averaged gradients, and synchronized batch norm.

Errors are against float64 and at most 1.2 times those of stock PyTorch in one process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fused_res
from tests.support import bf16_training as bf16
from tests.support.bf16_training import assert_error_at_most_stocks, assert_same_bits, buffers_of, fused, gradients_of
from tests.support.distributed_workers import WorkerGroup, worker_group

pytestmark = bf16.needs_bf16_products

Result = dict[str, Tensor]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    with worker_group(2, tmp_path_factory.mktemp("two")) as group:
        yield group


def batch(seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, labels, and weights of the losses.

    Means of the images and weights of the losses grow with the index, so each process's own sums, of activations and of
    gradients, are far from its share of the sums over all processes.
    """
    x, labels = bf16.batch(16, seed=seed)
    index = torch.arange(16)
    x = (x + index.view(-1, 1, 1, 1) / 8).bfloat16().float()
    return x[rows].contiguous(memory_format=torch.channels_last), labels[rows], (index[rows] - 6) / 4


def step(
    model: Any, x: Tensor, labels: Tensor, weights: Tensor, total: int, precision: torch.dtype = torch.bfloat16
) -> Tensor:
    """Run forward and backward of the weighted losses' sum divided by `total`; return the output."""
    x = x if precision == torch.bfloat16 else x.to(precision)
    with bf16.autocast(enabled=precision == torch.bfloat16):
        y = model(x)
    losses = F.cross_entropy(y.to(torch.promote_types(y.dtype, torch.float32)), labels, reduction="none")
    ((losses * weights).sum() / total).backward()
    return y.detach()


HALVES = slice(8), slice(8, None)


def distributed_data_parallel(seeds: Sequence[int]) -> tuple[Result, Result]:
    """Return gradients, accumulated over the batches, and buffers."""
    model = fused(bf16.network())
    # Each rank has its own statistics; DDP would replace them by those of rank 0.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    for seed in seeds[:-1]:
        with parallel.no_sync():
            step(parallel, *batch(seed, HALVES[dist.get_rank()]), 8)
    step(parallel, *batch(seeds[-1], HALVES[dist.get_rank()]), 8)
    assert bf16.operators_of(model).count("conv_backward") == 9
    return gradients_of(model), buffers_of(model)


def of_one_rank(model: Any, seeds: Sequence[int], rank: int, precision: torch.dtype) -> Any:
    for seed in seeds:
        step(model, *batch(seed, HALVES[rank]), 8, precision)
    return model


def averaged(models: Sequence[Any]) -> Result:
    first, second = (gradients_of(model) for model in models)
    return {name: (first[name] + second[name]) / 2 for name in first}


@pytest.mark.parametrize("seeds", [(0,), (1, 2, 3)], ids=["one batch", "accumulated"])
def test_ddp_averages_the_gradients_of_both_ranks(two: WorkerGroup, seeds: Sequence[int]) -> None:
    """They have the bits of two separate processes' average, and an error against float64 like stock's."""
    stock = bf16.network()
    ranks = two.run(distributed_data_parallel, seeds)
    assert_same_bits(ranks[0][0], ranks[1][0])
    ours = [of_one_rank(fused(stock), seeds, rank, torch.bfloat16) for rank in (0, 1)]
    assert_same_bits(ranks[0][0], averaged(ours))
    for rank in (0, 1):
        assert_same_bits(ranks[rank][1], buffers_of(ours[rank]))
    theirs = [of_one_rank(copy.deepcopy(stock), seeds, rank, torch.bfloat16) for rank in (0, 1)]
    exact = [of_one_rank(copy.deepcopy(stock).double(), seeds, rank, torch.float64) for rank in (0, 1)]
    assert_error_at_most_stocks(*({"all": bf16.flat(averaged(models))} for models in (ours, theirs, exact)))
    assert not torch.equal(ranks[0][1]["stem.1.running_mean"], ranks[1][1]["stem.1.running_mean"])


def synchronized(sizes: tuple[int, int], seeds: Sequence[int]) -> list[tuple[Tensor, Result, Result]]:
    """Return output, gradients and buffers of each batch's step, with synchronized statistics."""
    results = []
    start = sizes[0] * dist.get_rank()
    for seed in seeds:
        model = fused_res.fuse(fused_res.convert_sync_batchnorm(bf16.network()))
        y = step(model, *batch(seed, slice(start, start + sizes[dist.get_rank()])), sum(sizes))
        results.append((y, gradients_of(model), buffers_of(model)))
    operators = bf16.operators_of(model)
    convolutions = 9 if sizes[dist.get_rank()] else 0  # those of an empty batch are ATen's
    assert operators.count("conv_bn_stats") == operators.count("conv_backward") == convolutions, operators
    assert operators.count("gather_partials") == 9 and "total_sums" in operators, operators
    return results


@pytest.mark.parametrize("sizes", [(8, 8), (5, 11), (16, 0)], ids=str)
def test_synchronized_statistics_are_those_of_the_joined_batch(two: WorkerGroup, sizes: tuple[int, int]) -> None:
    """Partial statistics cross the processes between a convolution's epilogue and the next one's prologue."""
    stock, seeds = bf16.network(), range(3)
    ranks = two.run(synchronized, sizes, seeds)
    found: list[dict[str, list[Tensor]]] = [{"output": [], "gradients": [], "statistics": []} for _ in range(3)]
    for seed, first, second in zip(seeds, *ranks, strict=True):
        assert_same_bits(first[2], second[2])
        models = fused(stock), copy.deepcopy(stock), copy.deepcopy(stock).double()
        precisions = torch.bfloat16, torch.bfloat16, torch.float64
        outputs = [step(m, *batch(seed), 16, precision) for m, precision in zip(models, precisions, strict=True)]
        # The stem's outputs have the same bits in one process, so its statistics differ by float32's rounding only.
        for name in ("running_mean", "running_var"):
            one = models[0].stem[1].get_buffer(name)
            torch.testing.assert_close(first[2][f"stem.1.{name}"], one, rtol=1e-6, atol=1e-6)
        total = {name: first[1][name] + second[1][name] for name in first[1]}
        ours = torch.cat([first[0], second[0]]), total, first[2]
        others = [(y, gradients_of(m), buffers_of(m)) for y, m in zip(outputs[1:], models[1:], strict=True)]
        for index, (y, gradients, buffers) in enumerate((ours, *others)):
            for name, value in zip(found[index], (y, bf16.flat(gradients), bf16.flat(buffers)), strict=True):
                found[index][name].append(value.double())
        assert all(first[2][name] == 1 for name in first[2] if "num_batches_tracked" in name)
    assert_error_at_most_stocks(*({name: torch.cat(values) for name, values in result.items()} for result in found))
