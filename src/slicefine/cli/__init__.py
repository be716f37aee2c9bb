"""The command line: ``slicefine train | eval | merge | info``. One file per verb."""

from .main import main

__all__ = ["main"]
