"""Layering of the package: a module imports only from lower layers, so that there are no import cycles."""

import ast
from pathlib import Path

import pytest

import fused_res

ROOT = Path(fused_res.__file__).parent

#: Layers from bottom to top; modules of one layer do not import each other.
LAYERS = (
    ("_torch_compat", "env"),
    ("_extension", "ops"),
    ("dispatch", "spec"),
    ("backends",),
    ("distributed",),
    ("block",),
    ("autograd",),
    ("functional",),
    ("nn",),
    ("models",),
    ("graph",),
    ("fusion",),
    ("report",),
    ("__init__", "testing"),
    ("_cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Return the modules of fused_res that a file imports, at module level or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fused_res":
            modules |= {f"fused_res.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return {module for module in modules if module.split(".")[0] == "fused_res"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_module_imports_only_lower_layers(file: Path):
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imported(file):
        _, *rest = module.split(".")
        layer = rest[0] if rest and rest[0] in LEVEL else "__init__"
        assert layer == own or LEVEL[layer] < LEVEL[own], f"{own} imports {module}"
