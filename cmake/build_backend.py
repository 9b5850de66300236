"""PEP 517 build backend: `setuptools.build_meta`, after a check of the version of setuptools.

`pip install --no-build-isolation` ignores the build requirements of pyproject.toml. A new virtual environment of Python
3.11 contains setuptools 65.5, one of Python 3.12 contains none, and installing torch upgrades neither.
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

#: The command that installs the build requirements.
INSTALL = f"pip install {shlex.join(_requires)}"


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _check_setuptools() -> None:
    """Exit with an install command if setuptools is missing or older than pyproject.toml requires.

    A version above the upper bound works as well: that bound exists because some torch releases require setuptools<82.
    """
    (minimum,) = re.findall(r"setuptools>=([\d.]+)", " ".join(_requires))
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if _release(version) < _release(minimum):
        found = f"got {version}" if version else "not installed"
        raise SystemExit(
            f"setuptools: expected {minimum} or newer, {found}. Run this, then install again:\n    {INSTALL}"
        )


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
