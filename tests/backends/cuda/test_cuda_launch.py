"""Launches of csrc/cuda/launch.h on a recording stand-in for the CUDA runtime, ``launch_recorder.cpp``.

The stand-in fails a launch beyond a kernel's limit of shared memory, counts the changes of that limit, and keeps an
error until it is cleared, as the CUDA runtime does.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def cuda_headers() -> Path | None:
    """Return the folder of the CUDA headers: of a toolkit, or of Triton's package; None if there is none."""
    nvcc, triton = shutil.which("nvcc"), importlib.util.find_spec("triton")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")]
    folders += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += [Path(triton.origin).parent / "backends/nvidia/include"] if triton and triton.origin else []
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").exists()), None)


HEADERS = cuda_headers()
KB = 1 << 10
#: Of the stand-in's two devices.
MAX_SHARED, MULTIPROCESSORS = (227 * KB, 99 * KB), (132, 84)
INVALID_VALUE, NOT_SUPPORTED, ILLEGAL_ADDRESS = 1, 801, 700

pytestmark = pytest.mark.skipif(HEADERS is None, reason="no CUDA headers")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("launch") / "recorder.so")


def build(path: Path, *options: str) -> Path:
    source = Path(__file__).with_name("launch_recorder.cpp")
    flags = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-fno-gnu-unique")
    folders = (f"-I{ROOT / 'csrc'}", "-isystem", str(HEADERS))
    subprocess.run(["g++", *flags, "-Wl,-Bsymbolic", *options, *folders, source, "-o", path], check=True)
    return path


class Recorder:
    """The library ``path``."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("launch", "grid", "resident"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def launch(self, kernel: int = 0, blocks: int = 1, shared: int = 0, cooperative: bool = False) -> str:
        arguments = kernel, ctypes.c_int64(blocks), ctypes.c_size_t(shared), ctypes.c_bool(cooperative)
        return self.library.launch(*arguments).decode()

    def resident(self, shared: int) -> tuple[int, str]:
        """Return the number of resident threadblocks of 256 threads, -1 after an error, and the error's message."""
        blocks = ctypes.c_int(-1)
        message = self.library.resident(0, ctypes.c_size_t(shared), ctypes.byref(blocks)).decode()
        return blocks.value, message

    def fail(self, call: str, error: int) -> None:
        self._call = ctypes.c_char_p(call.encode())  # a reference, because the C++ side holds none
        self.library.fail(self._call, error)


@pytest.fixture
def recorder(path: Path, tmp_path: Path) -> Recorder:
    """Return a recorder with fresh state: a copy of the library is another library."""
    copy = tmp_path / "recorder.so"
    copy.write_bytes(path.read_bytes())
    return Recorder(copy)


@pytest.mark.parametrize("cooperative", [False, True])
def test_shared_memory_limit_is_set_once_per_kernel_and_device_and_never_lowered(recorder, cooperative):
    for device in (0, 1, 0, 1):
        recorder.library.set_device(device)
        for kernel in (0, 1):
            for shared in (0, 48 * KB, 90 * KB, 49 * KB, MAX_SHARED[device], 60 * KB):
                assert recorder.launch(kernel, 1, shared, cooperative) == ""
                recorder.resident(shared)
    assert [recorder.library.opt_ins(kernel, device) for kernel in (0, 1) for device in (0, 1)] == [1] * 4
    assert [recorder.library.launches(kernel, device) for kernel in (0, 1) for device in (0, 1)] == [12] * 4
    assert recorder.library.times_lowered() == 0


def test_small_launches_query_nothing(recorder):
    assert recorder.launch(shared=48 * KB) == ""
    assert recorder.library.driver_queries() == 0 and recorder.library.opt_ins(0, 0) == 0


@pytest.mark.parametrize("cooperative", [False, True])
def test_too_much_shared_memory_raises_before_the_launch(recorder, cooperative):
    for device in (0, 1):
        recorder.library.set_device(device)
        message = recorder.launch(0, 1, MAX_SHARED[device] + 1, cooperative)
        assert message == (
            f"shared memory: expected at most {MAX_SHARED[device]} bytes per threadblock, the limit of this GPU,"
            f" got {MAX_SHARED[device] + 1}"
        )
        assert recorder.library.launches(0, device) == 0 and recorder.library.pending_error() == 0
        assert recorder.launch(0, 1, MAX_SHARED[device], cooperative) == ""


@pytest.mark.parametrize(
    "grid", [(2**31, 1, 1), (2**32 + 5, 1, 1), (0, 1, 1), (1, 65536, 1), (1, 1, 65536), (-1, 1, 1)]
)
def test_grid_beyond_the_limits_raises(recorder, grid):
    message = recorder.library.grid(*map(ctypes.c_int64, grid)).decode()
    assert message.startswith("grid: expected 1 to 2147483647 by 65535 by 65535 threadblocks, got")
    assert recorder.library.grid(*map(ctypes.c_int64, (2**31 - 1, 65535, 65535))) == b""
    assert recorder.launch(blocks=2**31) and recorder.library.launches(0, 0) == 0


def test_resident_blocks_on_two_devices(recorder):
    for device in (0, 1, 0):
        recorder.library.set_device(device)
        assert recorder.resident(0) == (8 * MULTIPROCESSORS[device], "")
        assert recorder.resident(99 * KB) == (2 * MULTIPROCESSORS[device], "")
        assert recorder.resident(MAX_SHARED[device] + 1) == (0, "")
    queries = recorder.library.driver_queries()
    recorder.resident(99 * KB)
    assert recorder.library.driver_queries() == queries


@pytest.mark.parametrize(
    "call",
    [
        "cudaGetDevice",
        "cudaDeviceGetAttribute",
        "cudaFuncSetAttribute",
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
    ],
)
def test_failed_query_leaves_no_state(recorder, call):
    """Neither a cached 0 nor a pending error: the next call succeeds."""
    recorder.fail(call, INVALID_VALUE)
    blocks, message = recorder.resident(90 * KB)
    assert blocks == -1 and message.endswith(": some error") and recorder.library.pending_error() == 0
    recorder.fail("", 0)
    assert recorder.resident(90 * KB) == (2 * MULTIPROCESSORS[0], "")
    assert recorder.launch(shared=90 * KB) == ""
    assert recorder.library.opt_ins(0, 0) == 1


def test_error_of_a_launch_is_cleared(recorder):
    recorder.fail("cudaLaunchKernel", NOT_SUPPORTED)
    assert recorder.launch() == "cannot launch a kernel: some error"
    assert recorder.library.pending_error() == 0
    recorder.fail("", 0)
    assert recorder.launch() == ""


def test_sticky_error_says_that_the_process_must_be_restarted(recorder):
    recorder.fail("cudaLaunchKernel", ILLEGAL_ADDRESS)
    expected = (
        "cannot launch a kernel: illegal address. A kernel launched earlier failed; CUDA cannot be used in this process"
        " anymore: restart it"
    )
    assert recorder.launch() == expected
    recorder.fail("", 0)
    assert recorder.launch() == expected


def test_sticky_errors_are_those_of_the_cuda_headers(recorder):
    """The comment of each error in driver_types.h says whether the process must be terminated."""
    assert HEADERS is not None
    text = (HEADERS / "driver_types.h").read_text()
    found = re.findall(r"/\*\*((?:(?!\*/).)*)\*/\s*cudaError\w+\s*=\s*(\d+)", text, re.DOTALL)
    assert len(found) > 100
    documented = {
        int(number)
        for comment, number in found
        if "process must be terminated" in " ".join(comment.replace("*", "").split())
    }
    assert documented == {int(number) for _, number in found if recorder.library.sticky(int(number))}


def test_launches_from_many_threads_on_two_devices(recorder):
    assert recorder.library.launch_from_threads(8, 400) == 0
    assert [recorder.library.opt_ins(kernel, device) for kernel in (0, 1) for device in (0, 1)] == [1] * 4
    assert sum(recorder.library.launches(kernel, device) for kernel in (0, 1) for device in (0, 1)) == 8 * 400
    assert recorder.library.times_lowered() == 0


def test_launches_have_no_data_races(tmp_path):
    """The same under ThreadSanitizer, in a process of its own."""
    program = tmp_path / "main.cpp"
    program.write_text(
        'extern "C" int launch_from_threads(int, int);\nint main() { return launch_from_threads(8, 200); }\n'
    )
    library = build(tmp_path / "librecorder.so", "-fsanitize=thread", "-g1")
    command = ["g++", "-fsanitize=thread", program, library, f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "main"]
    subprocess.run(command, check=True)
    completed = subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr[-4000:]
