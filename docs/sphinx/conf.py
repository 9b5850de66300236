"""Sphinx configuration of the API pages: Markdown in docs/api, HTML in build/docs/html, both by `make docs`."""

import re
from pathlib import Path
from typing import Any

from sphinx_markdown_builder.translator import MarkdownTranslator

import fused_res
from fused_res import env

project = "fused_res"
release = version = fused_res.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_markdown_builder"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
smartquotes = False
napoleon_use_param = False  # keeps arguments that are documented together on one line
markdown_anchor_signatures = True
html_theme = "alabaster"
html_theme_options = {
    "description": "Fused conv-BN-add-ReLU for PyTorch",
    "fixed_sidebar": True,
    "page_width": "1100px",
}
html_show_sourcelink = False


def list_variables(app: Any, name: str, source: list[str]) -> None:
    rows = (f"* ``{variable.name}`` ({variable.default or 'unset'}): {variable.doc}." for variable in env.VARIABLES)
    source[0] = source[0].replace("@VARIABLES@", "\n".join(rows))


def tidy_markdown(app: Any, exception: Exception | None) -> None:
    if exception is not None or app.builder.name != "markdown":
        return
    for page in Path(app.outdir).glob("*.md"):
        text = page.read_text().replace("****,** **", ", ")  # the builder marks "ValueError, TypeError" as two words
        text = re.sub(r"\((\w+\.md)?#module-[\w.]+\)", r"(\1)", text)  # a module's anchor is its page
        page.write_text(text.rstrip("\n") + "\n")


def setup(app: Any) -> None:
    # The builder drops the `*` before keyword-only arguments.
    MarkdownTranslator.visit_abbreviation = lambda self, node: None
    MarkdownTranslator.depart_abbreviation = lambda self, node: None
    app.connect("source-read", list_variables)
    app.connect("build-finished", tidy_markdown)
