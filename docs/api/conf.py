"""Of Sphinx, for `make docs`: docs/api.md, the API reference as one page of Markdown, out of the docstrings."""

from pathlib import Path
from typing import Any

from sphinx_markdown_builder.translator import MarkdownTranslator

from fused_res import env

project = "fused_res"
root_doc = "api"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_markdown_builder"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
smartquotes = False
markdown_anchor_signatures = True
napoleon_use_param = False  # arguments that are documented together stay together


def list_variables(app: Any, name: str, source: list[str]) -> None:
    rows = (f"* ``{variable.name}`` ({variable.default or 'unset'}): {variable.doc}." for variable in env.VARIABLES)
    source[0] = source[0].replace("@VARIABLES@", "\n".join(rows))


def write(app: Any, exception: Exception | None) -> None:
    if exception is None:
        made = (Path(app.outdir) / "api.md").read_text()
        together = made.replace("****,** **", ", ")  # ValueError, TypeError: as the builder marks them, two words
        headed = together.replace("(#module-fused_res.", "(#fused_res")  # a module's section is its heading
        (Path(app.srcdir).parent / "api.md").write_text(headed)


def setup(app: Any) -> None:
    # The builder would leave out the `*` in front of arguments that are passed by name alone.
    MarkdownTranslator.visit_abbreviation = lambda self, node: None
    MarkdownTranslator.depart_abbreviation = lambda self, node: None
    app.connect("source-read", list_variables)
    app.connect("build-finished", write)
