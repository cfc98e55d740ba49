"""Settings of the documentation site: `make docs`.

The source is the repository itself, so that a link between two of its pages is right here and where it lies.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "circuits"
author = "the authors of circuits"
version = release = version_of("fact-circuits")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "reference_pages",
    "offline",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "runs", "build", "circuits", "tests", "benchmarks", "data", "shared", "*.egg-info"]
exclude_patterns += ["**/.ipynb_checkpoints", "docs/_*"]

# markdown: as a repository shows it
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]  # a figure is shown as its image

# notebooks: as they were executed
nb_execution_mode = "off"
nb_merge_streams = True

# docstrings
default_role = "py:obj"  # a name in backticks is a link if there is such a name
add_module_names = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
python_maximum_signature_line_length = 100

# the page
html_theme = "furo"
html_title = "circuits"
html_static_path = ["_static"]
html_css_files = ["circuits.css"]
html_additional_pages = {"index": "to_start.html"}
templates_path = ["_templates"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
