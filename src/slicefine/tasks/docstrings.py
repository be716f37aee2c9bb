"""Real text that every machine has: docstrings of installed libraries, labelled by library, names masked.

Source files are parsed, never imported. Every order and every draw is by hash, so the corpus and its split are the
same in every run on the same installation.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["LIBRARIES", "MASK", "docstring_splits", "extract", "mask_names"]

MASK = "[MASK]"
PER_LIBRARY = 400
_SPLIT = {"train": 300, "validation": 50, "test": 50}
_SHORTEST, _LONGEST = 50, 200  # characters: shorter texts say nothing, longer ones are cut
_LARGE = 40_000  # bytes: larger files take long to parse
_PER_FILE = 20  # texts per file at most, so that no file stands for its library

# label -> further names by which texts call the library; a word that contains the label itself is masked anyway
LIBRARIES = {
    "matplotlib": ("mpl", "plt", "pyplot", "pylab"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "python": ("stdlib",),
    "scipy": ("sp",),
    "sklearn": ("scikit",),
    "sympy": (),
    "torch": (),
    "transformers": ("hf", "huggingface"),
}
_SKIPPED = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_COMMON = {
    "a",
    "an",
    "as",
    "at",
    "by",
    "for",
    "from",
    "in",
    "io",
    "is",
    "it",
    "no",
    "of",
    "on",
    "or",
    "the",
    "to",
    "with",
}
# what follows the prose: a section of numpy or Google style, a field list, a directive, an example
_SECTION = re.compile(
    r"^\s*(?:>>>|\.\. |:\w+|@|[-=~^]{3,}|"
    r"(?:Parameters|Args|Arguments|Returns?|Yields?|Raises|Examples?|Notes?|See Also|Attributes|References|"
    r"Explanation)\s*:*$)",
    re.MULTILINE | re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z_][\w]*(?:[.\-][A-Za-z_]\w*)*")
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # what snake_case and CamelCase are made of
_LABEL = re.compile("|".join(LIBRARIES), re.IGNORECASE)
_SHORT = frozenset(alias for aliases in LIBRARIES.values() for alias in aliases)
_MASKS = re.compile(rf"{re.escape(MASK)}(?:[\w.\-/]*{re.escape(MASK)})+")


def docstring_splits(seed: int = 0) -> dict[str, Any]:
    """``{"train", "validation", "test"}`` with columns ``text`` and ``label``; the same rows for the same seed.

    Raises:
        DataError: if a library is not installed.

    Example:
        >>> docstring_splits()["train"].column_names  # doctest: +SKIP
        ['text', 'label']
    """
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=sorted(LIBRARIES))})
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in _SPLIT}
    for label, texts in _corpus().items():
        ordered = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())
        start = 0
        for split, share in _SPLIT.items():
            stop = start + round(len(ordered) * share / PER_LIBRARY)
            rows[split] += [{"text": text, "label": label} for text in ordered[start:stop]]
            start = stop
    return {split: Dataset.from_list(items, features=features).shuffle(seed=seed) for split, items in rows.items()}


def extract(root: Path, limit: int = PER_LIBRARY) -> list[str]:
    """Masked prose of the docstrings below ``root``, at most ``limit``, spread over its files.

    Args:
        root: a package's folder.
        limit: how many.
    """
    found: dict[str, None] = {}
    for path in _files(root):
        own = [part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"]
        taken = 0
        for text in _docstrings(path):
            masked = mask_names(prose(text), own)
            if len(masked) >= _SHORTEST and masked not in found:
                found[masked] = None
                taken += 1
            if taken == _PER_FILE:
                break
        if len(found) >= limit:
            break
    return list(found)[:limit]


def prose(docstring: str) -> str:
    """A docstring's beginning, up to its first section, field list or example, as one line.

    Example:
        >>> prose("Add two numbers.\\n\\nParameters\\n----------\\na : int")
        'Add two numbers.'
    """
    text = inspect.cleandoc(docstring[: 4 * _LONGEST])
    section = _SECTION.search(text)
    words = " ".join((text[: section.start()] if section else text).split())
    return words if len(words) <= _LONGEST else words[:_LONGEST].rpartition(" ")[0]


def mask_names(text: str, module: list[str]) -> str:
    """Replace every name of a library, and every name of the text's own module, by the mask token.

    Args:
        text: a docstring's prose.
        module: parts of the module's path inside its library, such as ``["signal", "_filter_design"]``.

    Example:
        >>> mask_names("Filters for scipy.signal, as in NumPy.", ["signal"])
        'Filters for [MASK], as in [MASK].'
    """
    own = {part.strip("_").lower() for part in module} - _COMMON - {""}
    text = re.sub("hugging face", "huggingface", text, flags=re.IGNORECASE)

    def mask(match: re.Match[str]) -> str:
        word = match.group()
        if _LABEL.search(word) or not _SHORT.isdisjoint(piece.lower() for piece in _PIECE.findall(word)):
            return MASK
        parts = [part.strip("_") for part in re.split(r"[.\-]", word.lower())]
        return word if own.isdisjoint(parts) else MASK

    return _MASKS.sub(MASK, _WORD.sub(mask, text))


@cache
def _corpus() -> dict[str, tuple[str, ...]]:
    texts = {label: extract(_root(label)) for label in sorted(LIBRARIES)}
    seen: set[str] = set()
    for label, found in texts.items():  # the same text in two libraries would have two labels
        texts[label] = [text for text in found if text not in seen]
        seen.update(texts[label])
    return {label: tuple(found) for label, found in texts.items()}


def _root(label: str) -> Path:
    if label == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(label)
    if spec is None or spec.origin is None:
        raise DataError(
            f'data.path="docstrings" reads the sources of {label}, which is not installed; '
            'run: pip install "slicefine[demo]"'
        )
    return Path(spec.origin).parent


def _files(root: Path) -> list[Path]:
    """A library's source files in a fixed, well mixed order; tests are left out."""
    files = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(root).parts[:-1]) and not path.name.startswith("test_")
    ]
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():  # other people's sources may hold invalid escapes
        warnings.simplefilter("ignore")
        try:
            source = path.read_bytes()
            tree = ast.parse(source if len(source) < _LARGE and b'"""' in source else b"")
        except (SyntaxError, ValueError, OSError):  # a template, or a file for another Python: nothing to be had
            return
    yield from _of_node(tree)


def _of_node(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node, clean=False)
    if text:
        yield text
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of_node(child)
