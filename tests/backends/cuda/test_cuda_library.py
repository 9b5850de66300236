"""Reasons why a library of CUDA kernels is not used: built for another torch, CUDA version or GPU architecture.

The build records are written by the tests; no library is opened.
"""

import functools
import json
from collections.abc import Callable

import pytest
import torch

import fused_res
from fused_res import _extension, env
from fused_res.__main__ import info
from fused_res.backends import registry

RECORD = {
    "torch": torch.__version__,
    "cuda": "13.0",
    "nvcc": "13.0.88",
    "flags": "-O3",
    "architectures": ["sm_80", "sm_90", "compute_90"],
}


@pytest.fixture
def unavailable(tmp_path, monkeypatch) -> Callable[..., str]:
    """Return a function that returns the reason why backend cuda is unavailable with a build record and GPUs, or ""."""

    def reason(capabilities=((9, 0),), torch_cuda="13.0", **changes) -> str:
        library = tmp_path / _extension.CUDA_LIBRARY
        library.touch()
        library.with_suffix(".json").write_text(json.dumps(RECORD | changes))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        _extension.cuda_library.cache_clear()
        found = fused_res.backends.unavailable("cuda") or ""
        assert found in info()
        if found:
            with pytest.raises(fused_res.BackendUnavailableError) as error:
                registry.resolve("cuda", torch.device("cuda"))
            assert str(error.value) == f"backend 'cuda' is not available: {found}"
        return found

    monkeypatch.delenv(env.SIMULATOR.name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        _extension, "read_build_record", functools.partial(_extension.read_build_record, package=tmp_path)
    )
    yield reason
    _extension.cuda_library.cache_clear()


def test_library_for_another_torch(unavailable):
    found = unavailable(torch="2.11.0+cu130")
    assert f"it was built for torch 2.11.0+cu130, but this is torch {torch.__version__}. To build it: " in found


def test_library_for_another_cuda_major_version(unavailable):
    assert "it was built for CUDA 12.8, but this torch was built for CUDA 13.0. To build" in unavailable(cuda="12.8")
    assert "it was built for CUDA 13.0, but this torch was built without CUDA. To" in unavailable(torch_cuda=None)
    assert unavailable(cuda="13.2") == ""


@pytest.mark.parametrize(
    ("architectures", "capability", "supported"),
    [
        (["sm_90"], (9, 0), True),
        (["sm_90"], (8, 0), False),
        (["sm_90"], (10, 0), False),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (12, 0), True),
        (["compute_90"], (8, 9), False),
        (["sm_80", "sm_120"], (12, 0), True),
        (["sm_80", "sm_120"], (12, 1), True),
        (["sm_80", "sm_100"], (9, 0), False),
    ],
)
def test_library_without_code_for_the_gpu(unavailable, architectures, capability, supported):
    found = unavailable([capability], architectures=architectures)
    this = "sm_" + "".join(map(str, capability))
    expected = f"it contains code for {', '.join(architectures)}, this GPU is {this}. To build it: "
    assert found == "" if supported else expected in found


def test_one_of_several_gpus_suffices(unavailable):
    assert unavailable([(8, 0), (9, 0)], architectures=["sm_80"]) == ""
    assert "this GPU is sm_90" in unavailable([(8, 0), (9, 0)], architectures=["sm_100"])


def test_gpu_that_is_too_old(unavailable):
    assert unavailable([(7, 5)]) == "the kernels require a GPU of compute capability 8.0 or newer, got 7.5"
