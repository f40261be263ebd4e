"""Sphinx configuration. Build with ``sphinx-build -W docs docs/_build``; nothing is fetched from the network."""

from __future__ import annotations

from typing import Any

import gresbox

project = "gresbox"
author = "The gresbox authors"
copyright = "The gresbox authors"
version = release = gresbox.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/**/*.ipynb", "gallery/**/*.py", "gallery/**/*.json", "gallery/**/*.md5", "gallery/**/*.zip"]

myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "forward, extra_repr"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Args and Shape"]
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/\d\d_",
    "plot_gallery": "False",  # the test suite runs every example; the documentation only shows them
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
}

html_theme = "pydata_sphinx_theme"
html_title = f"gresbox {release}"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "show_prev_next": True}
html_sidebars: dict[str, list[str]] = {"changelog": [], "notation": []}


def without_bases_of_torch(app: Any, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Keep the signatures of bases short: nn.Module says all there is to say."""
    bases[:] = [base for base in bases if base is not object] or [object]


def setup(app: Any) -> None:
    """Register the hook above."""
    app.connect("autodoc-process-bases", without_bases_of_torch)
