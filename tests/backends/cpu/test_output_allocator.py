"""The caching allocator for large outputs of the C++ kernels (csrc/cpu/output_allocator.cpp)."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fused_res
from fused_res import _extension
from fused_res.backends.cpu import output_cache_bytes, set_output_cache
from fused_res.functional import batch_norm_act

# The cache is part of the compiled extension. `make test` and CI require the extension; a Python-only installation
# skips these tests.
pytestmark = pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason)

MB = 1 << 20


@pytest.fixture(autouse=True)
def cache():
    """Set an empty cache of 64 MB; restore the configured limit afterwards."""
    gc.collect()
    set_output_cache(0)
    set_output_cache(64)
    yield
    set_output_cache(0)
    set_output_cache(int(fused_res.env.CPU_CACHE.read()))


def norm(x):
    """Return an output of x's size that the C++ kernels allocated."""
    return batch_norm_act(x, None, None, training=True, activation="identity", backend="cpu")


def input_of(megabytes, fill=None):
    x = torch.randn(megabytes, 64, 64, 64)
    return x if fill is None else x.fill_(fill)


def test_freed_output_is_reused_for_same_size():
    x = input_of(4)
    y = norm(x)
    expected, address = y.clone(), y.data_ptr()
    del y
    assert output_cache_bytes() == 4 * MB
    again = norm(x)
    assert again.data_ptr() == address
    assert output_cache_bytes() == 0
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_live_outputs_never_share_memory():
    x = input_of(2)
    outputs = [norm(x + index) for index in range(4)]
    del outputs[1]
    outputs += [norm(2 * x), norm(3 * x)]
    assert len({y.data_ptr() for y in outputs}) == len(outputs)
    for y in outputs:
        torch.testing.assert_close(y, outputs[0], rtol=1e-3, atol=1e-3)  # batch norm is invariant to shift and scale


def test_freed_output_is_not_reused_for_other_sizes():
    norm(input_of(4))
    cached = output_cache_bytes()
    y = norm(input_of(3))
    assert cached == output_cache_bytes() == 4 * MB
    del y
    assert output_cache_bytes() == 7 * MB


def test_small_outputs_use_malloc():
    norm(torch.randn(4, 8, 16, 16))
    assert output_cache_bytes() == 0


def test_limit_evicts_oldest_outputs_first():
    set_output_cache(10)
    small, large = input_of(3), input_of(6)
    first, second = norm(small), norm(large)
    recent = second.data_ptr()
    del first, second
    assert output_cache_bytes() == 9 * MB
    del large
    norm(input_of(2))  # 11 MB would exceed the limit: the 3 MB, freed first, are evicted
    assert output_cache_bytes() == 8 * MB
    assert norm(input_of(6)).data_ptr() == recent
    set_output_cache(1)
    assert output_cache_bytes() == 0
    norm(input_of(2))
    assert output_cache_bytes() == 0


@pytest.mark.parametrize("wrong", [-1, 1.5, 1 << 40, "8"])
def test_invalid_limit_raises(wrong):
    norm(input_of(2))
    with pytest.raises(ValueError, match=r"megabytes must be an integer from 0 to 2\*\*30, got"):
        set_output_cache(wrong)
    assert output_cache_bytes() == 2 * MB


def test_outputs_support_save_share_numpy_clone_and_resize(tmp_path):
    y = norm(input_of(2))
    torch.save(y, tmp_path / "y")
    torch.testing.assert_close(torch.load(tmp_path / "y"), y, rtol=0, atol=0)
    before = y.clone()
    torch.testing.assert_close(y.share_memory_(), before, rtol=0, atol=0)
    array = y.numpy()
    total = array.sum()
    del y
    norm(input_of(2))  # must not reuse memory that the array still references
    assert array.sum() == total
    lazy = torch._lazy_clone(source := norm(input_of(2)))
    lazy += 1
    torch.testing.assert_close(lazy - 1, source)
    grown = norm(input_of(2))
    before = grown.flatten()[:100].clone()
    grown.resize_(4, 64, 64, 64)
    torch.testing.assert_close(grown.flatten()[:100], before, rtol=0, atol=0)


def test_concurrent_threads_do_not_share_outputs():
    xs = [input_of(2) + index for index in range(4)]
    expected = [norm(x).double().sum() for x in xs]

    def work(index):
        for _ in range(20):
            y = norm(xs[index])
            assert y.double().sum() == expected[index]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert output_cache_bytes() <= 64 * MB


def test_cache_size_is_constant_over_training_steps():
    x = input_of(2).requires_grad_()
    for _ in range(3):
        norm(x).sum().backward()
    cached = output_cache_bytes()
    for _ in range(10):
        norm(x).sum().backward()
    assert output_cache_bytes() == cached


def test_forked_child_can_allocate():
    norm(input_of(2))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        ok = norm(input_of(2)).isfinite().all().item()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_environment_variable_sets_limit():
    code = (
        "import torch, fused_res\n"
        "from fused_res.backends.cpu import output_cache_bytes\n"
        "x = torch.randn(2, 64, 64, 64)\n"
        "fused_res.functional.batch_norm_act(x, None, None, training=True)\n"
        "print(output_cache_bytes())"
    )
    for value, cached in (("0", "0"), ("8", str(2 * MB)), ("1", "0")):
        environ = os.environ | {"FUSED_RES_CPU_CACHE": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
        assert done.stdout.strip() == cached
