"""The error tree: one base class, one leaf per kind of mistake.

::

    SliceFineError
    ├── ConfigError        (ValueError)           a setting is wrong or contradicts another
    ├── DataError          (ValueError)           a data set, column or label is not usable
    ├── AdapterFileError   (ValueError)           an adapter file is missing, corrupt or for another base
    ├── ContentError       (RuntimeError)         a backward pass would see other weights than its forward
    ├── OptimizerError     (RuntimeError)         the optimizer does not, or cannot, step the slices
    ├── NumericalError     (ArithmeticError)      a loss or a slice became NaN or infinite
    └── UnsupportedError   (NotImplementedError)  a combination that is refused by name

Every message says where, what came, what was expected, and what to do.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "ContentError",
    "DataError",
    "NumericalError",
    "OptimizerError",
    "SliceFineError",
    "UnsupportedError",
    "nearest",
]


class SliceFineError(Exception):
    """Base class of every error that slicefine raises on purpose."""


class ConfigError(SliceFineError, ValueError):
    """A setting is wrong or contradicts another one."""


class DataError(SliceFineError, ValueError):
    """A data set, a column or a label cannot be used."""


class AdapterFileError(SliceFineError, ValueError):
    """An adapter file is missing, corrupt, or belongs to another base model."""


class ContentError(SliceFineError, RuntimeError):
    """A backward pass would read other weights than its forward pass did."""


class OptimizerError(SliceFineError, RuntimeError):
    """The optimizer does not step the slices, or cannot do so correctly."""


class NumericalError(SliceFineError, ArithmeticError):
    """A loss or a slice became NaN or infinite."""


class UnsupportedError(SliceFineError, NotImplementedError):
    """A combination that is refused by name."""


def nearest(name: str, known: Iterable[str], otherwise: str = "see its docstring.") -> str:
    """What to say of a name that does not exist.

    Args:
        name: what was given.
        known: the names that exist.
        otherwise: what to say if none of them is near.

    Example:
        >>> nearest("intervall", ["interval", "moves"])
        'did you mean interval?'
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else otherwise
