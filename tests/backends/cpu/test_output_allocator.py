"""The cache that large outputs of the C++ kernels come from (csrc/cpu/output_memory.cpp)."""

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

# The cache is part of the compiled extension. `make test` and CI insist on having that; a Python-only installation
# has nothing here to test.
pytestmark = pytest.mark.skipif(not _extension.loaded, reason=_extension.reason)

MB = 1 << 20


@pytest.fixture(autouse=True)
def cache():
    """An empty cache of 64 MB, and the usual one afterwards."""
    gc.collect()
    set_output_cache(0)
    set_output_cache(64)
    yield
    set_output_cache(0)
    set_output_cache(int(fused_res.env.CPU_CACHE.read()))


def norm(x):
    """An output of x's size."""
    return batch_norm_act(x, None, None, training=True, activation="identity", backend="cpu")


def image(megabytes, fill=None):
    x = torch.randn(megabytes, 64, 64, 64)
    return x if fill is None else x.fill_(fill)


def test_a_freed_output_is_the_next_one_of_its_size():
    x = image(4)
    y = norm(x)
    expected, address = y.clone(), y.data_ptr()
    del y
    assert output_cache_bytes() == 4 * MB
    again = norm(x)
    assert again.data_ptr() == address
    assert output_cache_bytes() == 0
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_live_outputs_never_share_memory():
    x = image(2)
    outputs = [norm(x + index) for index in range(4)]
    del outputs[1]
    outputs += [norm(2 * x), norm(3 * x)]
    assert len({y.data_ptr() for y in outputs}) == len(outputs)
    for y in outputs:
        torch.testing.assert_close(y, outputs[0], rtol=1e-3, atol=1e-3)  # a norm forgets shift and scale


def test_only_the_same_size_is_given_out():
    norm(image(4))
    kept = output_cache_bytes()
    y = norm(image(3))
    assert kept == output_cache_bytes() == 4 * MB
    del y
    assert output_cache_bytes() == 7 * MB


def test_small_outputs_stay_with_malloc():
    norm(torch.randn(4, 8, 16, 16))
    assert output_cache_bytes() == 0


def test_no_more_is_kept_than_the_limit_and_the_oldest_goes_first():
    set_output_cache(10)
    small, large = image(3), image(6)
    first, second = norm(small), norm(large)
    recent = second.data_ptr()
    del first, second
    assert output_cache_bytes() == 9 * MB
    del large
    norm(image(2))  # 11 MB would be kept: the 3 MB, freed first, go
    assert output_cache_bytes() == 8 * MB
    assert norm(image(6)).data_ptr() == recent
    set_output_cache(1)
    assert output_cache_bytes() == 0
    norm(image(2))
    assert output_cache_bytes() == 0


@pytest.mark.parametrize("wrong", [-1, 1.5, 1 << 40, "8"])
def test_another_limit_is_refused(wrong):
    norm(image(2))
    with pytest.raises(ValueError, match="megabytes must be a whole number, 0 or more, got"):
        set_output_cache(wrong)
    assert output_cache_bytes() == 2 * MB


def test_outputs_are_ordinary_tensors(tmp_path):
    y = norm(image(2))
    torch.save(y, tmp_path / "y")
    torch.testing.assert_close(torch.load(tmp_path / "y"), y, rtol=0, atol=0)
    before = y.clone()
    torch.testing.assert_close(y.share_memory_(), before, rtol=0, atol=0)
    array = y.numpy()
    total = array.sum()
    del y
    norm(image(2))  # must not get what the array still holds
    assert array.sum() == total
    lazy = torch._lazy_clone(source := norm(image(2)))
    lazy += 1
    torch.testing.assert_close(lazy - 1, source)
    grown = norm(image(2))
    kept = grown.flatten()[:100].clone()
    grown.resize_(4, 64, 64, 64)
    torch.testing.assert_close(grown.flatten()[:100], kept, rtol=0, atol=0)


def test_threads_do_not_get_in_each_others_way():
    xs = [image(2) + index for index in range(4)]
    expected = [norm(x).double().sum() for x in xs]

    def work(index):
        for _ in range(20):
            y = norm(xs[index])
            assert y.double().sum() == expected[index]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert output_cache_bytes() <= 64 * MB


def test_memory_stays_flat_over_training_steps():
    x = image(2).requires_grad_()
    for _ in range(3):
        norm(x).sum().backward()
    kept = output_cache_bytes()
    for _ in range(10):
        norm(x).sum().backward()
    assert output_cache_bytes() == kept


def test_a_forked_child_lives():
    norm(image(2))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        ok = norm(image(2)).isfinite().all().item()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_variable_turns_it_off():
    code = (
        "import torch, fused_res\n"
        "from fused_res.backends.cpu import output_cache_bytes\n"
        "x = torch.randn(2, 64, 64, 64)\n"
        "fused_res.functional.batch_norm_act(x, None, None, training=True)\n"
        "print(output_cache_bytes())"
    )
    for value, kept in (("0", "0"), ("8", str(2 * MB)), ("1", "0")):
        environ = os.environ | {"FUSED_RES_CPU_CACHE": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
        assert done.stdout.strip() == kept
