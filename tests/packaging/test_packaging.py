"""Environment variables, the fallback without the compiled extension, build records, the wheel and the sdist."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from fused_res import _extension, env

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fused_res"
BUILD_REQUIRES = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
INSTALL = f"pip install {shlex.join(BUILD_REQUIRES)}"

needs_extension = pytest.mark.skipif(not _extension.loaded, reason=_extension.unavailable_reason)


def run(*command: str | Path, cwd: Path, fails: bool = False, **variables: str) -> str:
    """Run a command and return its output; the environment has no FUSED_RES variables but the given ones."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FUSED_RES", "PYTHON"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


# --- environment variables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [one for one in env.VARIABLES if not one.path], ids=lambda one: one.name)
def test_variable_is_validated(variable: env.Variable) -> None:
    assert variable.read({}) == variable.read({variable.name: ""}) == variable.default
    for value in variable.allowed or ("0", "4096"):
        assert variable.read({variable.name: f" {value.upper()} "}) == value
    expected = variable.allowed[-1] if variable.allowed else "a non-negative integer"
    for invalid in ("quick", "-1"):
        with pytest.raises(ValueError, match=f"{variable.name}='{invalid}'.*{expected}"):
            variable.read({variable.name: invalid})
    with pytest.raises(FrozenInstanceError):
        variable.default = "quick"  # type: ignore[misc]


def test_path_variable_is_not_validated() -> None:
    assert env.SIMULATOR.read({}) == ""
    assert env.SIMULATOR.read({env.SIMULATOR.name: " /tmp/Library.so "}) == "/tmp/Library.so"


def test_unknown_variable_warns() -> None:
    with pytest.warns(UserWarning, match="FUSED_RES_BACKENDS has no effect"):
        env.check({"FUSED_RES_BACKENDS": "cpu"})


def test_every_variable_is_declared_in_env() -> None:
    files = [ROOT / "setup.py", *PACKAGE.rglob("*.py"), *ROOT.glob("benchmarks/**/*.py"), ROOT / "Makefile"]
    named = {name for file in files for name in re.findall(r"\bFUSED_RES_[A-Z]\w*", file.read_text())}
    assert named - {"FUSED_RES_SOURCES"} <= {variable.name for variable in env.VARIABLES}


def test_invalid_value_makes_the_import_fail() -> None:
    for name, values in (("FUSED_RES_BACKEND", "auto, reference"), ("FUSED_RES", "1, 0")):
        printed = run(sys.executable, "-c", "import fused_res", cwd=ROOT, fails=True, **{name: "gpu"})
        expected = f"ValueError: {name}='gpu' is not a known value: use one of {values}"
        assert printed.splitlines()[-1].startswith(expected)


# --- without the extension ----------------------------------------------------------------------------------


@pytest.fixture
def python_only(tmp_path: Path) -> Path:
    """A copy of the package without the compiled libraries, to be imported from its parent folder."""
    shutil.copytree(PACKAGE, tmp_path / "fused_res", ignore=shutil.ignore_patterns("_C.*", "_cuda.*", "__pycache__"))
    return tmp_path / "fused_res"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, r"has no _C\..*\.json"),
        ({"_C.cpython-27.so": ""}, r"found _C\.cpython-27\.so, for another Python"),
        ({"record": "{"}, "cannot be read"),
        ({"record": {"skipped": "no compiler"}}, r"omitted when fused_res was installed \(no compiler\)"),
        ({"record": {"torch": torch.__version__}}, r"has no _C\..*\.so"),
        (
            {"record": {"torch": "2.11.0+cu130"}, "module": ""},
            r"built for torch 2\.11\.0\+cu130, but this is torch",
        ),
        ({"record": {"torch": torch.__version__.partition("+")[0] + "+cu999"}, "module": ""}, "^$"),
        (
            {"record": {"torch": torch.__version__, "cuda": "99.1"}, "module": ""},
            "built for CUDA 99.1, but this torch was built (for|without) CUDA",
        ),
        ({"record": {"torch": torch.__version__, "cuda": torch.version.cuda}, "module": ""}, "^$"),
    ],
)
def test_reason_why_the_extension_does_not_load(files: dict[str, object], reason: str, tmp_path: Path) -> None:
    module = tmp_path / _extension._MODULE
    names = {"record": module.with_suffix(".json").name, "module": module.name}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / names.get(name, name)).write_text(text)
    assert re.search(reason, _extension.read_build_record(tmp_path)[1])


USE_THE_REFERENCE = """
import torch
import fused_res
from fused_res import _extension, functional

assert not _extension.loaded
x, mean, var = torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3)
torch.testing.assert_close(functional.batch_norm_act(x, mean, var, eps=0.0), x.relu())
try:
    functional.batch_norm_act(x, mean, var, backend="cpu")
except fused_res.BackendUnavailableError as error:
    print(error)
"""


def test_import_without_extension(python_only: Path) -> None:
    printed = run(sys.executable, "-c", USE_THE_REFERENCE, cwd=python_only.parent)
    assert "pip install --no-build-isolation" in printed


def test_reason_names_the_installed_package_that_the_sources_shadow(python_only: Path, tmp_path: Path) -> None:
    """After `pip install .` in a clone, Python is started in the clone."""
    installed = tmp_path / "site-packages"
    (installed / "fused_res").mkdir(parents=True)
    (installed / "fused_res" / _extension._MODULE).with_suffix(".json").write_text("{}")
    printed = run(sys.executable, "-m", "fused_res", "info", cwd=python_only.parent, PYTHONPATH=str(installed))
    assert f"the package installed in {installed / 'fused_res'} has one: start Python outside {tmp_path}" in printed


def test_info_does_not_open_an_extension_for_another_torch(python_only: Path) -> None:
    """The module is not a valid library, so opening it would print another reason."""
    module = python_only / _extension._MODULE
    module.write_text("not a library")
    record = {"torch": "1.0", "python": "", "compiler": "cc 1", "flags": "-O0", "isas": {}}
    module.with_suffix(".json").write_text(json.dumps(record))
    printed = run(sys.executable, "-m", "fused_res", "info", cwd=python_only.parent)
    assert f"it was built for torch 1.0, but this is torch {torch.__version__}" in printed
    assert "pip install --no-build-isolation" in printed
    assert re.search(r"batch_norm_act +yes +no \(1\)", printed)


def test_reference_runs_if_the_extension_does_not_open(python_only: Path) -> None:
    module = python_only / _extension._MODULE
    module.write_text("not a library")
    module.with_suffix(".json").write_text(json.dumps({"torch": torch.__version__}))
    printed = run(sys.executable, "-c", USE_THE_REFERENCE, cwd=python_only.parent)
    assert "it could not be opened" in printed


# --- the extension ------------------------------------------------------------------------------------------


@needs_extension
def test_info() -> None:
    printed = run(sys.executable, "-m", "fused_res", "info", cwd=ROOT, FUSED_RES_CPU_ISA="baseline")
    assert torch.__version__ in printed
    assert re.search(r"status +loaded\n +instruction set +baseline \(built: baseline", printed)
    assert re.search(r"batch_norm_act +yes +yes", printed)
    assert re.search(r"FUSED_RES_CPU_ISA +baseline ", printed)
    assert re.search(r"FUSED_RES_BACKEND +auto \(default\)", printed)
    assert "FUSED_RES=0" not in printed
    printed = run(sys.executable, "-m", "fused_res", "info", cwd=ROOT, FUSED_RES="0")
    assert re.search(r"FUSED_RES +0  ", printed) and "FUSED_RES=0 is set: fused, frozen" in printed


@pytest.mark.parametrize(
    ("record", "printed"),
    [
        ({"skipped": "no nvcc"}, r"status +the library of CUDA kernels is unavailable: it was omitted .* \(no nvcc\)"),
        (
            {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "nvcc": "13.0.88",
                "flags": "-O3",
                "architectures": ["sm_80", "compute_80"],
            },
            rf"status +\S+{re.escape(_extension.CUDA_LIBRARY)}\n(.*\n)*.*nvcc 13\.0\.88\n(.*\n)*.* sm_80, compute_80\n",
        ),
    ],
)
def test_info_about_cuda_kernels(record: dict[str, object], printed: str, python_only: Path) -> None:
    (python_only / _extension.CUDA_LIBRARY).touch()
    (python_only / _extension.CUDA_LIBRARY).with_suffix(".json").write_text(json.dumps(record))
    assert re.search(printed, run(sys.executable, "-m", "fused_res", "info", cwd=python_only.parent))


@needs_extension
def test_build_record_matches_the_extension() -> None:
    info = _extension.build_info
    assert _extension._module.build_info() == info
    assert info["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert _extension.cpu_isa() in info["isas"]
    flags = " ".join([info["flags"], *info["isas"].values()])
    assert "-ffp-contract=off" in flags
    assert "-march=" not in flags
    assert info["isas"]["baseline"] == ""


ONE_OPENMP_TWO_THREADS = """
import os
from pathlib import Path

import torch
from fused_res import functional

x, mean, var = torch.randn(64, 64, 32, 32), torch.zeros(64), torch.ones(64)


def threads():
    return len(os.listdir("/proc/self/task"))


torch.set_num_threads(2)  # starts an additional thread, for other libraries
before = threads()
functional.batch_norm_act(x, mean, var, training=True, backend="cpu")
maps = Path("/proc/self/maps").read_text().split()
print(threads() - before, *{path for path in maps if "omp" in Path(path).name and ".so" in path})
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_and_two_threads() -> None:
    """A second OpenMP runtime would have its own threads, whose number torch.set_num_threads does not control."""
    more_threads, *runtimes = run(sys.executable, "-c", ONE_OPENMP_TWO_THREADS, cwd=ROOT, OMP_NUM_THREADS="1").split()
    assert int(more_threads) == 1
    assert len(runtimes) == 1, runtimes


# --- the wheel ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    path: Path
    build: Path  # CMake's build folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """A wheel of the repository; the build reuses the object files of `pip install --editable .` with this Python."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--verbose"]
    printed = run(*pip, "--wheel-dir", folder, ".", cwd=ROOT, FUSED_RES_CPP="1")
    build = re.search(r"Build files have been written to: (.*)", printed)
    assert build is not None
    (path,) = folder.glob("*.whl")
    return Wheel(path, Path(build[1].strip()))


@needs_extension
def test_second_build_compiles_nothing(wheel: Wheel) -> None:
    cmake = re.search(r"CMAKE_COMMAND:INTERNAL=(.*)", (wheel.build / "CMakeCache.txt").read_text())
    assert cmake is not None
    assert "no work to do" in run(cmake[1], "--build", wheel.build, cwd=ROOT)


@needs_extension
def test_wheel_content(wheel: Wheel) -> None:
    with zipfile.ZipFile(wheel.path) as archive:
        names = set(archive.namelist())
        module = archive.read(f"fused_res/{_extension._MODULE}")
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    module_record, cuda_record = (
        str(Path("fused_res", library).with_suffix(".json"))
        for library in (_extension._MODULE, _extension.CUDA_LIBRARY)
    )
    cuda = {f"fused_res/{_extension.CUDA_LIBRARY}"} & names  # only if this torch was built for CUDA
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == sources | cuda | {f"fused_res/{_extension._MODULE}", module_record, cuda_record}
    for path in (ROOT, Path(torch.__file__).parent):
        assert os.fsencode(path) not in module, "the module contains a path of this machine"


SMOKE = """
import sys

import torch
import fused_res
from fused_res import _extension, functional

assert fused_res.__file__.startswith(sys.prefix), fused_res.__file__
assert _extension.loaded, _extension.unavailable_reason
x = torch.randn(4, 16, 8, 8, requires_grad=True)
for backend in ("cpu", "reference"):
    mean, var = torch.zeros(16), torch.ones(16)
    y = functional.batch_norm_act(x, mean, var, training=True, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    print(backend, *(f"{value:.3f}" for value in (y.sum(), grad.abs().sum(), mean.abs().sum(), var.sum())))
"""


@needs_extension
def test_wheel_in_empty_environment(wheel: Wheel, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    # torch comes from this environment, whose own .pth files, such as that of an editable fused_res, are not read.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, "--ignore-installed", wheel.path, cwd=tmp_path)
    ours, reference = run(python, "-W", "error", "-c", SMOKE, cwd=tmp_path).splitlines()
    # The backends add thousands of float32 terms in different orders; the last of the three printed digits may differ.
    theirs = [float(number) for number in reference.split()[1:]]
    assert [float(number) for number in ours.split()[1:]] == pytest.approx(theirs, rel=1e-6, abs=1.1e-3)


@needs_extension
def test_kernels_share_no_symbols(wheel: Wheel) -> None:
    """The linker keeps one copy of a weak symbol, so the baseline might call one that was compiled for AVX-512."""
    seen: set[str] = set()
    for isa in _extension.build_info["isas"]:
        (kernels,) = wheel.build.glob(f"CMakeFiles/kernels_{isa}.dir/**/*.o")
        symbols = [line.split()[-2:] for line in run("nm", kernels, cwd=ROOT).splitlines()]
        defined = {name for kind, name in symbols if kind.isupper() and kind != "U"}
        weak = {name for kind, name in symbols if kind in "uVvWw"}
        assert defined, f"{isa} has no kernels"
        assert not weak, f"weak symbols compiled for {isa}: {sorted(weak)}"
        assert not defined & seen, f"defined for {isa} and for another instruction set: {sorted(defined & seen)}"
        seen |= defined


@needs_extension
def test_no_native_instruction_set_outside_kernels(wheel: Wheel) -> None:
    commands = json.loads((wheel.build / "compile_commands.json").read_text())
    for entry in commands:
        assert "=native" not in entry["command"]
        # Only the kernels' own file may use a wider instruction set.
        if "kernels_" not in entry["command"]:
            assert not re.search(r" -m(arch|avx|fma|f16c)", entry["command"]), entry["file"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = ["setup.py", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    run(sys.executable, *command, cwd=ROOT, FUSED_RES_CPP="0")
    (path,) = folder.glob("*.tar.gz")
    return path


def test_source_distribution_contains_the_build_inputs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = ("CMakeLists.txt", "pyproject.toml", "cmake/*.*", "csrc/**/*.*", "fused_res/**/*.py")
    assert {str(path.relative_to(ROOT)) for pattern in files for path in ROOT.glob(pattern)} <= names


# --- setuptools ---------------------------------------------------------------------------------------------


@pytest.fixture
def sources(sdist: Path, tmp_path: Path) -> Path:
    """A copy of the sources, because an editable installation writes build records into the source folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / sdist.name.removesuffix(".tar.gz")


def pip_install(environment: Path) -> list[str | Path]:
    python = environment / "bin" / "python"
    offline = ["--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation"]
    return [sys.executable, "-m", "pip", "--python", python, "install", *offline]


@pytest.mark.parametrize("setuptools", ["stock", "none"])
def test_outdated_or_missing_setuptools_is_reported(setuptools: str, sources: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True, with_pip=setuptools == "stock")
    found = list(tmp_path.glob("venv/lib/python*/site-packages/setuptools-*.dist-info"))
    if setuptools == "stock" and not found:
        pytest.skip("virtual environments have setuptools only before Python 3.12")
    printed = run(*pip_install(tmp_path / "venv"), "--editable", sources, cwd=tmp_path, fails=True)
    assert "Traceback" not in printed and "ModuleNotFoundError" not in printed
    assert re.search("setuptools: expected [0-9.]+ or newer, " + ("got 65" if found else "not installed"), printed)
    assert f"    {INSTALL}\n" in printed


@pytest.mark.parametrize("form", ["editable", "sdist"])
def test_install_with_this_setuptools(form: str, sdist: Path, sources: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "setuptools.pth").write_text(str(Path(importlib.metadata.distribution("setuptools").locate_file(""))))
    what = ["--editable", sources] if form == "editable" else [sdist]
    run(*pip_install(tmp_path / "venv"), *what, cwd=tmp_path, FUSED_RES_CPP="0")
    code = "import importlib.util; print(importlib.util.find_spec('fused_res').origin)"
    origin = run(tmp_path / "venv" / "bin" / "python", "-c", code, cwd=tmp_path)
    assert Path(origin.strip()) == (sources if form == "editable" else site) / "fused_res" / "__init__.py"


def test_setup_py_checks_setuptools() -> None:
    """`make gpu` runs `python setup.py`, without the build backend."""
    code = "import runpy, sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; runpy.run_path('setup.py')"
    printed = run(sys.executable, "-S", "-c", code, cwd=ROOT, fails=True)
    assert "setuptools: expected" in printed and "Traceback" not in printed


def test_setuptools_requirements_agree() -> None:
    """The README and the pin of requirements/dev.txt agree with pyproject.toml."""
    (required,) = (one for one in BUILD_REQUIRES if one.startswith("setuptools"))
    assert f"pip install torch cmake ninja '{required}'\n" in (ROOT / "README.md").read_text()
    pin = re.search(r"^setuptools==(.*)$", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    assert pin is not None and pin[1] in Requirement(required).specifier


def test_requirements_of_torch_are_installed() -> None:
    for text in importlib.metadata.requires("torch") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(version, prereleases=True), f"torch requires {text}, got {version}"


def test_contradicting_build_variables_raise() -> None:
    printed = run(sys.executable, "setup.py", "--version", cwd=ROOT, fails=True, FUSED_RES_CPP="0", FUSED_RES_CUDA="1")
    assert "FUSED_RES_CUDA: expected 0 or auto with FUSED_RES_CPP=0" in printed


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built for CUDA")
def test_required_cuda_kernels_that_cannot_be_built_raise() -> None:
    printed = run(
        sys.executable, "setup.py", "build_ext", cwd=ROOT, fails=True, FUSED_RES_CPP="auto", FUSED_RES_CUDA="1"
    )
    assert "FUSED_RES_CUDA=1, but the CUDA kernels cannot be built: this torch" in printed


# --- the project's files ------------------------------------------------------------------------------------


def test_versions_agree() -> None:
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "fused_res.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog.index("## [Unreleased]") < changelog.index("### Added")  # the newest section


def test_tested_versions_of_torch_are_the_ends_of_the_supported_range() -> None:
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest, newest = (
        re.search(r"^torch==(\d+\.\d+)\.", (ROOT / "requirements" / name).read_text(), re.MULTILINE)
        for name in ("gpu.txt", "dev.txt")
    )
    assert oldest and newest and requirement == f"torch>={oldest[1]}"
    assert tuple(map(int, oldest[1].split("."))) < tuple(map(int, newest[1].split(".")))
