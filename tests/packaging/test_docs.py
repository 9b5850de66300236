"""Documentation: generated pages are up to date, links resolve, the README's examples run."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_res
from benchmarks import readme
from fused_res.testing import stub_torchvision_operators

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tools/*/README.md"), *readme.render_pages()}
)
MODULES = (fused_res, fused_res.backends, fused_res.fusion, fused_res.models, fused_res.nn, fused_res.report)
FUNCTIONS = ("batch_norm_act", "conv_bias_act", "residual_block")


def test_api_reference_is_up_to_date(tmp_path: Path) -> None:
    """`make docs` regenerates it from the docstrings."""
    pytest.importorskip("sphinx_markdown_builder", reason="requirements/dev.txt has it")
    output, doctrees = tmp_path / "api", tmp_path / "doctrees"
    command = [sys.executable, "-m", "sphinx", "-b", "markdown", "-q", "-W", "docs/sphinx", output, "-d", doctrees]
    subprocess.run(command, cwd=ROOT, check=True)
    assert api_pages(output) == api_pages(ROOT / "docs" / "api")


def api_pages(folder: Path) -> dict[str, str]:
    return {page.name: page.read_text() for page in folder.glob("*.md")}


def test_api_reference_contains_every_public_name() -> None:
    text = "\n".join(api_pages(ROOT / "docs" / "api").values())
    public = {name: getattr(module, name) for module in MODULES for name in module.__all__}
    # An alias, such as the former name of a class, has no entry of its own.
    names = {
        getattr(value, "__name__", name) for name, value in public.items() if not isinstance(value, types.ModuleType)
    }
    missing = {name for name in names.union(FUNCTIONS) if not re.search(rf"^### .*\.{name}\b", text, re.MULTILINE)}
    assert not missing


def test_measured_tables_are_up_to_date() -> None:
    """`make docs` regenerates them from the committed results."""
    for page, text in readme.render_pages().items():
        assert page.read_text() == text


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: those of its headings, and explicit ones."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def run_examples(page: Path) -> dict[str, Any]:
    """Execute the Python blocks of a page in one namespace, and return it."""
    stub_torchvision_operators()
    pytest.importorskip("torchvision", reason="the examples' model is torchvision's")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    return names


def test_readme_examples_run() -> None:
    names = run_examples(ROOT / "README.md")
    with torch.inference_mode():
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(names["frozen"](x), names["model"].eval()(x), rtol=1e-3, atol=1e-3)


API_PAGES = [page for page in sorted((ROOT / "docs" / "api").glob("*.md")) if page.stem != "index"]


@pytest.mark.parametrize("page", API_PAGES, ids=lambda page: page.stem)
def test_api_examples_run(page: Path) -> None:
    run_examples(page)


@pytest.mark.parametrize(
    "page", [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_named_files_exist(page: Path) -> None:
    """Every file that a page names in backquotes exists, as a path or as the end of one."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    named = re.findall(r"`([\w./-]+\.(?:py|cpp|h|cu|cuh|md|yml|toml|txt))`", page.read_text())
    missing = [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in tracked)]
    assert not missing
