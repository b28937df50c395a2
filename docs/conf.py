"""How the site is built: `make docs`, which treats every warning as an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import made  # noqa: E402

project = "nnsplice"
author = copyright = "the nnsplice authors"  # noqa: A001
version = release = version_of("nnsplice")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "README.md", "made.py", "conf.py"]
# Notebooks are run by the tests; the site shows what they printed there.
nb_execution_mode = "off"
nb_merge_streams = True  # the lines of one cell stand in one box
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "ref.python",  # types named like a method of several classes
]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# No inventories of other projects: the site is built without a network.
intersphinx_mapping: dict[str, Any] = {}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "nnsplice"
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def setup(app: Any) -> None:
    """Write the pages that are made of code and notebooks, before Sphinx looks for pages."""
    made.write(HERE)
    app.connect("source-read", made.sessions)
    app.connect("autodoc-process-docstring", made.docstrings, priority=100)  # before napoleon reads them
