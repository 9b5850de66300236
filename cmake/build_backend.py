"""PEP 517 build backend: `setuptools.build_meta`, after a check of setuptools' version.

`pip install --no-build-isolation` does not read the requirements of pyproject.toml, a virtual environment of Python
3.11 starts with setuptools 65.5, one of Python 3.12 with none, and torch upgrades neither.
"""

import importlib.metadata
import platform
import re
import shlex
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    raise SystemExit(f"Python: expected 3.11 or newer, got {platform.python_version()}") from None

_pyproject = tomllib.loads(Path(__file__).resolve().parent.with_name("pyproject.toml").read_text())
_requires = _pyproject["build-system"]["requires"]

#: The command that installs what the build requires.
INSTALL = f"pip install {shlex.join(_requires)}"


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _check_setuptools() -> None:
    """Exit with the command to type where setuptools is missing or older than pyproject.toml requires.

    A version above the upper bound builds as well: that bound keeps torch releases satisfied that require
    setuptools<82.
    """
    (minimum,) = re.findall(r"setuptools>=([\d.]+)", " ".join(_requires))
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if _release(version) < _release(minimum):
        found = f"got {version}" if version else "not installed"
        raise SystemExit(f"setuptools: expected {minimum} or newer, {found}. Type, then install again:\n    {INSTALL}")


_check_setuptools()

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
