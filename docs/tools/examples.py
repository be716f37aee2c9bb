"""A griffe extension: docstrings here say ``Example:``, and griffe knows the section as ``Examples:``."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section, so that doctests are shown as code."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each function, class, module and attribute when it was read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
