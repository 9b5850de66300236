"""The compiled libraries that travel to the GPU machine: built here, for its Python and torch and one architecture.

    make gpu-library GPU_ENV=<virtual environment with the other machine's Python and torch>

compiles them with nvcc into `build/gpu-library`, which git ignores and the device tool carries: about 10 MB, of the 64
that may travel. A session copies them into the package if Python and sources are those that they were built for.
Whether torch, CUDA and the GPU are, `fused_res` itself decides by the build record.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.gpu.host import ROOT

CARRIED = ROOT / "build" / "gpu-library"
PACKAGE = ROOT / "fused_res"
#: The architecture of the machine that is lent: an H200.
ARCHITECTURE = "9.0"
RECORD = "sources.json"


def source_digest(root: Path = ROOT) -> str:
    """Return a hash of everything that the libraries are compiled from."""
    files = [root / "CMakeLists.txt", root / "setup.py", *root.glob("cmake/*.cmake"), *root.glob("csrc/**/*.*")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def build() -> None:
    """Build the libraries for the Python that runs this, stripped, with the record that `install` reads."""
    shutil.rmtree(CARRIED, ignore_errors=True)
    variables = {"FUSED_RES_CPP": "1", "FUSED_RES_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(CARRIED)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)
    for file in (CARRIED / "fused_res").iterdir():
        if file.suffix == ".so":
            subprocess.run(["strip", "--strip-unneeded", str(file)], check=True)
        file.rename(CARRIED / file.name)
    (CARRIED / "fused_res").rmdir()
    record = {"sources": source_digest(), "suffix": sysconfig.get_config_var("EXT_SUFFIX")}
    (CARRIED / RECORD).write_text(json.dumps(record) + "\n")


def install(carried: Path = CARRIED, package: Path = PACKAGE) -> str:
    """Copy the carried libraries into the package.

    Returns:
        The reason why they are not used, "" if they are.
    """
    try:
        record = json.loads((carried / RECORD).read_text())
        sources, suffix = record["sources"], record["suffix"]
    except FileNotFoundError:
        return f"{carried} has none (make gpu-library)"
    except (ValueError, KeyError, TypeError) as error:
        return f"{carried / RECORD} cannot be read ({error!r})"
    if suffix != (here := sysconfig.get_config_var("EXT_SUFFIX")):
        return f"they were built for another Python: {suffix}, this one needs {here}"
    if sources != source_digest():
        return "the sources have changed since they were built (make gpu-library)"
    for file in carried.iterdir():
        if file.name != RECORD:
            shutil.copy2(file, package / file.name)
    return ""


def remove(package: Path = PACKAGE) -> None:
    """Delete this Python's libraries from the package."""
    for name in ("_C", "_cuda"):
        file = package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        file.unlink(missing_ok=True)
        file.with_suffix(".json").unlink(missing_ok=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    build()
    for file in sorted(CARRIED.iterdir()):
        print(f"{file.stat().st_size / 1e6:7.2f} MB  {file.relative_to(ROOT)}")
    print(
        "On the GPU machine (tool `run`):\n"
        '  command    python3 -m benchmarks.gpu --out "$OUT"\n'
        f'  carry      ["{CARRIED.relative_to(ROOT)}"]\n'
        "  timeout_s  590"
    )


if __name__ == "__main__":
    main()
