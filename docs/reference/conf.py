"""The reference, from the docstrings: ``make reference`` writes it to build/reference."""

import clce_ext

project = "clce_ext"
version = release = clce_ext.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
