"""Small Triton kernels for tests of the interpreter: elementwise addition, row sum and matrix multiplication."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.backends.triton.launch import launch


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n, other=0).to(tl.float32)
    y = tl.load(y_ptr + at, at < n, other=0).to(tl.float32)
    tl.store(out_ptr + at, (x + y).to(out_ptr.dtype.element_ty), at < n)


def add(x: Tensor, y: Tensor, block: int = 1024) -> Tensor:
    out = torch.empty_like(x)
    launch(add_kernel, (triton.cdiv(x.numel(), block),), x, y, out, x.numel(), block)
    return out


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + col, col < cols, other=0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


def row_sum(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    launch(row_sum_kernel, (x.shape[0],), x, out, x.shape[1], triton.next_power_of_2(x.shape[1]), num_warps=4)
    return out


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], (m[:, None] < M) & (k[None, :] < K), other=0)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :], (k[:, None] < K) & (n[None, :] < N), other=0)
        acc = tl.dot(a, b, acc)
    at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(at, acc.to(c_ptr.dtype.element_ty), (m[:, None] < M) & (n[None, :] < N))


def matmul(a: Tensor, b: Tensor, block_k: int = 32) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n)
    grid = triton.cdiv(m, 64), triton.cdiv(n, 64)
    launch(matmul_kernel, grid, a, b, c, m, n, k, 64, 64, block_k, num_warps=4, num_stages=3)
    return c
