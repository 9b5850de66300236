"""Pages keep up with the code: what is generated is as generated, links lead somewhere, examples run."""

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
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tools/*/README.md"), *readme.pages()})
MODULES = (fused_res, fused_res.backends, fused_res.fusion, fused_res.models, fused_res.nn)
FUNCTIONS = ("batch_norm_act", "conv_bias_act", "residual_block")


def test_reference_is_made_of_the_docstrings(tmp_path: Path) -> None:
    """`make docs` brings it up to date."""
    pytest.importorskip("sphinx_markdown_builder", reason="requirements/dev.txt has it")
    source = tmp_path / "docs" / "api"
    source.mkdir(parents=True)
    for file in (ROOT / "docs" / "api").iterdir():
        (source / file.name).write_text(file.read_text())
    command = [sys.executable, "-m", "sphinx", "-b", "markdown", "-q", "-W", str(source), str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "docs" / "api.md").read_text() == (ROOT / "docs" / "api.md").read_text()


def test_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    public = {name: getattr(module, name) for module in MODULES for name in module.__all__}
    names = {name for name, value in public.items() if not isinstance(value, types.ModuleType)}
    missing = {name for name in names.union(FUNCTIONS) if not re.search(rf"^### .*\.{name}\b", text, re.MULTILINE)}
    assert not missing


def test_measured_tables_are_made_of_the_results() -> None:
    """`make docs` brings them up to date."""
    for page, text in readme.pages().items():
        assert page.read_text() == text


def anchors(page: Path) -> set[str]:
    """Of headings, as they are made of their words, and of what is marked by hand."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_examples_of_the_readme_run() -> None:
    stub_torchvision_operators()
    pytest.importorskip("torchvision", reason="the README's model is torchvision's")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)
    with torch.inference_mode():
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(names["frozen"](x), names["model"].eval()(x), rtol=1e-3, atol=1e-3)
